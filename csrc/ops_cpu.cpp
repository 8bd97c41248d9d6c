// The CPU operators: checks (once, here), segments, and the parallel loops over work items.
// next: cpu/schedule.h, cpu/forward.inl, cpu/backward.inl
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/params.h"
#include "cpu/schedule.h"

namespace fastattn::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    text << "fastattn: ";
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// A macro, so that the parts of the message are only made when it is needed.
#define CHECK(condition, ...) \
    if (!(condition)) fail(__VA_ARGS__)

constexpr int64_t MAX_LENGTH = int64_t(1) << 30;  // rows and keys are counted in int, with sums

// --- tensors ------------------------------------------------------------------------------------

std::optional<Dtype> dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return Dtype::F32;
        case ScalarType::Double: return Dtype::F64;
        case ScalarType::BFloat16: return Dtype::BF16;
        case ScalarType::Half: return Dtype::F16;
        case ScalarType::Bool: return Dtype::BOOL;
        default: return std::nullopt;
    }
}

std::string shape_of(const Tensor& t) {
    std::ostringstream text;
    text << "[";
    for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
    text << "]";
    return text.str();
}

void check_cpu(const Tensor& t, const char* name) {
    CHECK(t.is_cpu(), name, " must be on the CPU, where q is");
}

// A 4-D operand of kernel `params`: strides in elements, 0 along broadcast dimensions.
Tensor4 operand4(const Tensor& t) {
    Tensor4 x;
    x.data = static_cast<char*>(t.data_ptr());
    x.dtype = *dtype_of(t);
    x.batch = t.size(0) == 1 ? 0 : t.stride(0);
    x.head = t.size(1) == 1 ? 0 : t.stride(1);
    x.row = t.size(2) == 1 ? 0 : t.stride(2);
    x.col = t.size(3) == 1 ? 0 : t.stride(3);
    return x;
}

// q, k, v and their likes: unit last stride.
Tensor4 rows4(const Tensor& t) {
    Tensor4 x = operand4(t);
    x.batch = t.stride(0);
    x.head = t.stride(1);
    x.row = t.stride(2);
    x.col = 1;
    return x;
}

// lse and its likes, [B, Hq, Sq].
Tensor4 lse4(const Tensor& t) {
    Tensor4 x;
    x.data = static_cast<char*>(t.data_ptr());
    x.dtype = *dtype_of(t);
    x.batch = t.stride(0);
    x.head = t.stride(1);
    x.row = t.stride(2);
    return x;
}

Tensor unit_stride(const Tensor& t) {
    return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

bool is_dense(const Tensor& t) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t i = 0; i < t.dim(); i++)
        if (t.size(i) != 1) dims.emplace_back(t.stride(i), t.size(i));
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (auto [stride, size] : dims) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, sizes, dtype);
}

ScalarType accumulate_type(const Tensor& q) {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// --- the call -----------------------------------------------------------------------------------

// The operands of both operators, in the order of their schemas.
struct Call {
    Tensor q, k, v;
    OptionalTensor mask, bias, alibi_slopes, sinks, kv_lens, kv_starts, document_ids, cu_seqlens_q,
        cu_seqlens_k, page_table, dropout_seed;
    double scale, softcap;
    int64_t left, right;
    bool align_end;
    double dropout_p;

    // filled by prepare()
    std::vector<int> page_entries{};  // page_table, contiguous
    std::vector<float> slopes{};
    std::vector<Segment> segments{};
    int64_t entries = 0, max_q = 0, max_kv = 0;
    bool covers_rows = true, covers_keys = true;  // false: some rows or keys belong to no segment
    Params params{};

    void prepare();

private:
    void check_operands();
    void make_segments();
    std::vector<int> int_vector(const OptionalTensor& t, const char* name, int64_t size) const;
    void check_broadcast(const Tensor& t, const char* name) const;
};

std::vector<int> Call::int_vector(const OptionalTensor& t, const char* name, int64_t size) const {
    if (!t) return {};
    check_cpu(*t, name);
    CHECK(t->scalar_type() == ScalarType::Int, name, " must be int32");
    CHECK(t->dim() == 1 && (size < 0 || t->size(0) == size), name, " has shape ", shape_of(*t),
          ", expected [", size, "]");
    std::vector<int> out(t->size(0));
    const int* from = static_cast<const int*>(t->data_ptr());
    for (size_t i = 0; i < out.size(); i++) out[i] = from[static_cast<int64_t>(i) * t->stride(0)];
    return out;
}

void Call::check_broadcast(const Tensor& t, const char* name) const {
    check_cpu(t, name);
    int64_t full[4] = {entries, q.size(1), max_q, max_kv};
    bool ok = t.dim() == 4;
    for (int i = 0; ok && i < 4; i++)
        ok = t.size(i) == 1 || t.size(i) == full[i] ||
             (cu_seqlens_q && i >= 2 && t.size(i) > full[i]);  // packed: at least the longest
    CHECK(ok, name, " has shape ", shape_of(t), ", which does not broadcast to [", full[0], ", ", full[1],
          ", ", full[2], ", ", full[3], "]");
}

void Call::check_operands() {
    const Tensor* all[3] = {&q, &k, &v};
    const char* names[3] = {"q", "k", "v"};
    for (int i = 0; i < 3; i++) {
        check_cpu(*all[i], names[i]);
        CHECK(all[i]->dim() == 4, names[i], " must have 4 dimensions, got shape ", shape_of(*all[i]));
        CHECK(all[i]->scalar_type() == q.scalar_type(), names[i], " must have q's dtype");
        for (int d = 0; d < 4; d++)
            CHECK(all[i]->size(d) < MAX_LENGTH, names[i], " has a dimension of ", all[i]->size(d),
                  ", the limit is 2^30");
    }
    auto dtype = dtype_of(q);
    CHECK(dtype && *dtype != Dtype::BOOL, "q must be float32, float64, bfloat16 or float16");
    CHECK(q.size(3) == k.size(3) && q.size(3) >= 1, "q and k must have one head dimension >= 1, got ",
          q.size(3), " and ", k.size(3));
    CHECK(v.size(3) >= 1, "v must have a head dimension >= 1");
    CHECK(q.size(3) <= 65536 && v.size(3) <= 65536, "head dimensions above 65536 are not supported");
    CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2), "k has shape ",
          shape_of(k), " and v ", shape_of(v), ": all but the last dimension must agree");
    CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "q has ", q.size(1),
          " heads, which is not a multiple of the ", k.size(1), " heads of k");
    CHECK(std::isfinite(scale), "scale must be finite, got ", scale);
    CHECK(softcap >= 0 && std::isfinite(softcap), "softcap must be finite and >= 0, got ", softcap);
    CHECK(left >= -1 && right >= -1, "left and right must be >= -1");
    CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p must be in [0, 1), got ", dropout_p);
    CHECK(!cu_seqlens_q == !cu_seqlens_k, "cu_seqlens_q and cu_seqlens_k come together");
    if (!cu_seqlens_q && !page_table)
        CHECK(q.size(0) == k.size(0), "q has batch size ", q.size(0), " and k ", k.size(0));
    if (dropout_p > 0) {
        CHECK(dropout_seed.has_value(), "dropout needs dropout_seed");
        check_cpu(*dropout_seed, "dropout_seed");
        CHECK(dropout_seed->scalar_type() == ScalarType::Long && dropout_seed->dim() == 1 &&
                  dropout_seed->size(0) == 2,
              "dropout_seed must be int64 [2]: seed and offset");
    }
}

// Lengths, documents, packed sequences and pages, all as segments.
void Call::make_segments() {
    int batch = static_cast<int>(q.size(0)), q_rows = static_cast<int>(q.size(2));
    int kv_rows = static_cast<int>(k.size(2));
    std::vector<int> q_begins, k_begins;
    if (cu_seqlens_q) {
        CHECK(q.size(0) == 1, "with cu_seqlens_q, q must have batch size 1");
        q_begins = int_vector(cu_seqlens_q, "cu_seqlens_q", -1);
        CHECK(!q_begins.empty(), "cu_seqlens_q must have at least one element");
        k_begins = int_vector(cu_seqlens_k, "cu_seqlens_k", static_cast<int64_t>(q_begins.size()));
        auto check_cu = [](const std::vector<int>& cu, const char* name, int64_t limit) {
            CHECK(cu[0] == 0, name, " must start with 0, got ", cu[0]);
            for (size_t i = 1; i < cu.size(); i++)
                CHECK(cu[i] >= cu[i - 1], name, " decreases at ", i, ": ", cu[i - 1], " to ", cu[i]);
            CHECK(cu.back() <= limit, name, " ends with ", cu.back(), ", beyond the ", limit, " rows");
        };
        check_cu(q_begins, "cu_seqlens_q", q_rows);
        check_cu(k_begins, "cu_seqlens_k", page_table ? MAX_LENGTH - 1 : kv_rows);
        if (!page_table) CHECK(k.size(0) == 1, "with cu_seqlens_k, k must have batch size 1");
        CHECK(!document_ids, "document_ids cannot be combined with cu_seqlens_q");
    }
    bool packed = !q_begins.empty();
    entries = packed ? static_cast<int64_t>(q_begins.size()) - 1 : batch;
    std::vector<int> lens = int_vector(kv_lens, "kv_lens", entries);
    std::vector<int> starts = int_vector(kv_starts, "kv_starts", entries);
    int pages = 0, page_size = 1;
    if (page_table) {
        check_cpu(*page_table, "page_table");
        CHECK(page_table->scalar_type() == ScalarType::Int && page_table->dim() == 2 &&
                  page_table->size(0) == entries,
              "page_table must be int32 [", entries, ", pages], got shape ", shape_of(*page_table));
        CHECK(packed || kv_lens, "page_table needs kv_lens");
        CHECK(!document_ids, "document_ids cannot be combined with page_table");
        CHECK(kv_rows > 0 || page_table->size(1) == 0, "pages must hold at least one key");
        pages = static_cast<int>(page_table->size(1));
        page_size = std::max(1, kv_rows);
        const int* from = static_cast<const int*>(page_table->data_ptr());
        for (int64_t e = 0; e < entries; e++)
            for (int64_t i = 0; i < pages; i++)
                page_entries.push_back(from[e * page_table->stride(0) + i * page_table->stride(1)]);
    }
    const int* documents = nullptr;
    if (document_ids) {
        check_cpu(*document_ids, "document_ids");
        CHECK(document_ids->scalar_type() == ScalarType::Int && document_ids->dim() == 2 &&
                  document_ids->size(0) == batch && document_ids->size(1) == q_rows && q_rows == kv_rows,
              "document_ids must be int32 [batch, S] with S = ", q_rows, " rows of q and of k, got shape ",
              shape_of(*document_ids));
        documents = static_cast<const int*>(document_ids->data_ptr());
    }

    int window_left = static_cast<int>(std::min<int64_t>(left, MAX_LENGTH));
    int window_right = static_cast<int>(std::min<int64_t>(right, MAX_LENGTH));
    for (int e = 0; e < entries; e++) {
        int q_len = packed ? q_begins[e + 1] - q_begins[e] : q_rows;
        int64_t capacity = packed       ? k_begins[e + 1] - k_begins[e]
                           : page_table ? static_cast<int64_t>(pages) * page_size
                                        : kv_rows;
        int kv_len = static_cast<int>(std::min<int64_t>(capacity, MAX_LENGTH - 1));
        if (!lens.empty()) {
            CHECK(lens[e] >= 0 && lens[e] <= capacity, "kv_lens[", e, "] is ", lens[e],
                  ", outside [0, ", capacity, "]");
            kv_len = lens[e];
        }
        int first = 0;
        if (!starts.empty()) {
            CHECK(starts[e] >= 0, "kv_starts[", e, "] is ", starts[e], ", must be >= 0");
            first = std::min(starts[e], kv_len);
        }
        if (page_table) {
            CHECK(static_cast<int64_t>(pages) * page_size >= kv_len, "page_table has ", pages, " pages of ",
                  page_size, " keys, too few for the ", kv_len, " keys of entry ", e);
            for (int64_t i = 0; i < (static_cast<int64_t>(kv_len) + page_size - 1) / page_size; i++) {
                int page = page_entries[e * pages + i];
                CHECK(page >= 0 && page < k.size(0), "page_table[", e, ", ", i, "] is ", page,
                      ", outside the ", k.size(0), " pages");
            }
        }
        Segment s{};
        s.batch = packed ? 0 : e;
        s.entry = e;
        int offset = align_end ? kv_len - q_len : 0;
        auto add = [&](int row, int rows, int key, int key_end) {
            s.q_begin = (packed ? q_begins[e] : 0) + row;
            s.kv_begin = (packed && !page_table ? k_begins[e] : 0) + key;
            s.row0 = row;
            s.key0 = key;
            s.band = {window_left, window_right, offset + row - key, rows, std::max(0, key_end - key)};
            segments.push_back(s);
            covers_keys &= !packed && lens.empty() && starts.empty();
        };
        if (documents == nullptr) {
            add(0, q_len, first, kv_len);
        } else {
            const int* ids = documents + e * document_ids->stride(0);
            int64_t step = document_ids->stride(1);
            for (int begin = 0, end; begin < q_len; begin = end) {
                for (end = begin + 1; end < q_len && ids[end * step] == ids[begin * step]; end++) {}
                CHECK(end == q_len || ids[end * step] > ids[begin * step], "document_ids decreases at row ",
                      end, " of batch entry ", e);
                add(begin, end - begin, std::max(begin, first), std::min(end, kv_len));
            }
        }
        max_q = std::max<int64_t>(max_q, q_len);
        max_kv = std::max<int64_t>(max_kv, packed ? kv_len : capacity);
    }
    if (!packed) max_q = q_rows;
    covers_rows = !packed || q_begins.back() == q_rows;
}

void Call::prepare() {
    check_operands();
    q = unit_stride(q);
    k = unit_stride(k);
    v = unit_stride(v);
    make_segments();
    Params& p = params;
    p.scale = scale;
    p.softcap = softcap;
    p.dropout = dropout_p > 0;
    if (p.dropout) {
        const int64_t* seed = static_cast<const int64_t*>(dropout_seed->data_ptr());
        p.dropout_key = DropoutKey::make(seed[0], seed[dropout_seed->stride(0)], dropout_p);
    }
    p.dtype = *dtype_of(q);
    p.q = rows4(q);
    p.k = rows4(k);
    p.v = rows4(v);
    p.heads = static_cast<int>(q.size(1));
    p.kv_heads = static_cast<int>(k.size(1));
    p.head_dim = static_cast<int>(q.size(3));
    p.v_dim = static_cast<int>(v.size(3));
    if (mask) {
        CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
        check_broadcast(*mask, "mask");
        p.mask = operand4(*mask);
    }
    if (bias) {
        auto dtype = dtype_of(*bias);
        CHECK(dtype && *dtype != Dtype::BOOL, "bias must be a floating-point tensor");
        check_broadcast(*bias, "bias");
        p.bias = operand4(*bias);
    }
    if (alibi_slopes) {
        const Tensor& t = *alibi_slopes;
        check_cpu(t, "alibi_slopes");
        CHECK(t.scalar_type() == ScalarType::Float && (t.dim() == 1 || (t.dim() == 2 && t.size(0) == entries)) &&
                  t.size(t.dim() - 1) == q.size(1),
              "alibi_slopes must be float32 [", q.size(1), "] or [", entries, ", ", q.size(1),
              "], got shape ", shape_of(t));
        const float* from = static_cast<const float*>(t.data_ptr());
        for (int64_t e = 0; e < (t.dim() == 2 ? entries : 1); e++)
            for (int64_t h = 0; h < q.size(1); h++)
                slopes.push_back(from[(t.dim() == 2 ? e * t.stride(0) : 0) + h * t.stride(t.dim() - 1)]);
        p.slopes = slopes.data();
        p.slopes_batch = t.dim() == 2 ? q.size(1) : 0;
    }
    if (sinks) {
        auto dtype = dtype_of(*sinks);
        check_cpu(*sinks, "sinks");
        CHECK(dtype && *dtype != Dtype::BOOL && sinks->dim() == 1 && sinks->size(0) == q.size(1),
              "sinks must be a floating-point tensor [", q.size(1), "], got shape ", shape_of(*sinks));
        p.sinks = {static_cast<char*>(sinks->data_ptr()), *dtype, 0, sinks->stride(0), 0, 0};
    }
    if (page_table) {
        p.page_table = page_entries.data();
        p.page_table_row = page_table->size(1);
        p.page_size = std::max(1, static_cast<int>(k.size(2)));
    }
    p.segments = segments.data();
}

// --- parallel loops -----------------------------------------------------------------------------

const Kernels& kernels_for(Dtype dtype) {
    static const IsaKernels* const table[] = {avx512_bf16_kernels, avx512_kernels, avx2_kernels,
                                              portable_kernels, portable_bf16_kernels};
    const IsaKernels& isa = *table[select_isa()];
    return dtype == Dtype::F64 ? isa.f64 : isa.f32;
}

constexpr double SERIAL_FLOPS = 4e5;  // about 10 us of one core: less than waking the others

// Items are handed out one by one, in order, to whichever thread is free.
template <class F> void for_each_item(int count, double flops, const F& run) {
    int threads = std::min<int>(count, flops < SERIAL_FLOPS ? 1 : torch::stable::get_num_threads());
    if (threads <= 1) {
        for (int i = 0; i < count; i++) run(i);
        return;
    }
    std::atomic<int> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int i = next++; i < count; i = next++) run(i);
    });
}

double forward_flops(const Call& call) {
    double pairs = 0;
    for (const Segment& s : call.segments) pairs += static_cast<double>(s.band.q_len) * s.band.kv_len;
    return 2 * pairs * call.params.heads * (call.params.head_dim + call.params.v_dim);
}

void run_forward(Call& call, int num_splits) {
    const Params& p = call.params;
    const Kernels& kernels = kernels_for(p.dtype);
    if (p.heads == 0) return;
    ForwardPlan plan = plan_forward(call.segments, p.heads, p.group(), kernels.block_q, num_splits);
    Partials partials{};
    std::unique_ptr<char[]> memory;
    if (plan.partial_rows > 0) {
        int64_t size = p.dtype == Dtype::F64 ? 8 : 4;
        memory.reset(new char[plan.partial_rows * (p.v_dim + 2) * size]);
        partials.row_max = memory.get();
        partials.row_sum = memory.get() + plan.partial_rows * size;
        partials.acc = memory.get() + 2 * plan.partial_rows * size;
    }
    double flops = forward_flops(call);
    for_each_item(static_cast<int>(plan.items.size()), flops,
                  [&](int i) { kernels.forward(p, plan.items[i], partials); });
    for_each_item(static_cast<int>(plan.merges.size()), flops, [&](int i) {
        kernels.combine(p, plan.items[plan.merges[i].first], plan.merges[i].splits, partials);
    });
}

void run_backward(Call& call, BiasSharing sharing) {
    const Params& p = call.params;
    const Kernels& kernels = kernels_for(p.dtype);
    if (p.heads == 0) return;
    BackwardPlan plan = plan_backward(call.segments, p.kv_heads, kernels.block_q, sharing);
    int64_t size = p.dtype == Dtype::F64 ? 8 : 4;
    std::vector<std::unique_ptr<char[]>> memory;
    for (const BackwardPlan::Merge& merge : plan.merges)
        for (int i = merge.first; i < merge.first + merge.parts; i++) {
            BackwardItem& item = plan.items[i];
            int64_t keys = call.segments[item.segment].band.kv_len;
            for (auto [sum, dim] : {std::pair{&item.dk_sum, p.head_dim}, std::pair{&item.dv_sum, p.v_dim}}) {
                memory.emplace_back(new char[keys * kernels.padded(dim) * size + 1]);
                *sum = memory.back().get();
            }
        }
    double flops = 2.5 * forward_flops(call);
    for_each_item(static_cast<int>(plan.task_begin.size()) - 1, flops, [&](int task) {
        for (int i = plan.task_begin[task]; i < plan.task_begin[task + 1]; i++)
            kernels.backward(p, plan.items[plan.tasks[i]]);
    });
    for_each_item(static_cast<int>(plan.merges.size()), flops, [&](int i) {
        kernels.reduce(p, &plan.items[plan.merges[i].first], plan.merges[i].parts);
    });
}

// --- the operators ------------------------------------------------------------------------------

void fill(Tensor t, double value) { torch::stable::fill_(t, value); }

std::tuple<Tensor, Tensor> forward_into_new(Call& call, Tensor lse, int64_t num_splits) {
    CHECK(num_splits >= 0 && num_splits <= 1 << 20, "num_splits must be in [0, 2^20], got ", num_splits);
    const Tensor& q = call.q;
    call.prepare();
    Tensor out = call.params.head_dim == call.params.v_dim && is_dense(q)
                     ? torch::stable::empty_like(q)
                     : new_tensor(q, {q.size(0), q.size(1), q.size(2), call.v.size(3)}, q.scalar_type());
    if (!call.covers_rows) {
        fill(out, 0);
        fill(lse, -INFINITY);
    }
    call.params.out = rows4(out);
    call.params.lse = lse4(lse);
    run_forward(call, static_cast<int>(num_splits));
    return {out, lse};
}

Tensor new_lse(const Tensor& q) {
    CHECK(q.dim() == 4, "q must have 4 dimensions, got shape ", shape_of(q));
    return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, accumulate_type(q));
}

std::tuple<Tensor, Tensor> flash_attn_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor kv_lens, OptionalTensor kv_starts,
    OptionalTensor document_ids, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, OptionalTensor dropout_seed, double scale, double softcap, int64_t left,
    int64_t right, bool align_end, double dropout_p, int64_t num_splits) {
    Call call{q,         k,           v,            mask,         bias,         alibi_slopes, sinks,
              kv_lens,   kv_starts,   document_ids, cu_seqlens_q, cu_seqlens_k, page_table,   dropout_seed,
              scale,     softcap,     left,         right,        align_end,    dropout_p};
    return forward_into_new(call, new_lse(q), num_splits);
}

struct Gradients {
    Tensor dq, dk, dv, dbias, dsinks;
};

// dbias in the shape the kernel adds to: the bias's own, or one row of sums per entry and head where
// rows or keys are broadcast (small, and free of sharing between entries and heads).
Tensor bias_sums(const Call& call, const Tensor& bias, BiasSharing& sharing) {
    bool small = bias.size(2) == 1 || bias.size(3) == 1;
    sharing.any = true;
    sharing.rows = bias.size(2) == 1;
    sharing.entries = !small && bias.size(0) == 1;
    sharing.heads = !small && bias.size(1) == 1;
    std::vector<int64_t> sizes = {small ? call.entries : bias.size(0), small ? call.q.size(1) : bias.size(1),
                                  bias.size(2), bias.size(3)};
    Tensor sums = new_tensor(call.q, sizes, accumulate_type(call.q));
    fill(sums, 0);
    return sums;
}

template <class A> void reduce_bias(const Tensor& from, const Tensor& to) {
    const A* x = static_cast<const A*>(from.data_ptr());
    A* y = static_cast<A*>(to.data_ptr());
    int64_t inner = from.size(2) * from.size(3);
    for (int64_t b = 0; b < from.size(0); b++)
        for (int64_t h = 0; h < from.size(1); h++) {
            int64_t row = (to.size(0) == 1 ? 0 : b) * to.size(1) + (to.size(1) == 1 ? 0 : h);
            for (int64_t i = 0; i < inner; i++) y[row * inner + i] += x[(b * from.size(1) + h) * inner + i];
        }
}

// d loss / d sink[h] = -sum over rows of exp(sink - lse) * delta: the sink's weight times what all
// other weights' gradients have in common.
template <class A> void sink_gradient(const Call& call, const Tensor& lse, const Tensor& delta, Tensor& dsinks) {
    const Params& p = call.params;
    Tensor4 l = lse4(lse), d = lse4(delta);
    for (int h = 0; h < p.heads; h++) {
        double sink = 0, sum = 0;
        const char* at = p.sinks.bytes_at(0, h, 0);
        switch (p.sinks.dtype) {
            case Dtype::F64: sink = *reinterpret_cast<const double*>(at); break;
            case Dtype::F32: sink = *reinterpret_cast<const float*>(at); break;
            case Dtype::BF16: sink = *reinterpret_cast<const torch::headeronly::BFloat16*>(at); break;
            default: sink = *reinterpret_cast<const torch::headeronly::Half*>(at);
        }
        for (const Segment& s : call.segments)
            for (int i = s.q_begin; i < s.q_begin + s.band.q_len; i++) {
                A row_lse = *l.at<A>(s.batch, h, i);
                if (row_lse != -INFINITY) sum -= std::exp(sink - row_lse) * *d.at<A>(s.batch, h, i);
            }
        static_cast<A*>(dsinks.data_ptr())[h] = static_cast<A>(sum);
    }
}

Gradients backward_into_new(Call& call, Tensor dout, OptionalTensor dlse, Tensor out, const Tensor& lse,
                            bool need_dbias, bool need_dsinks) {
    CHECK(!call.page_table, "pages have no gradient");
    call.prepare();
    const Tensor& q = call.q;
    ScalarType accumulate = accumulate_type(q);
    auto check_like_out = [&](const Tensor& t, const char* name) {
        check_cpu(t, name);
        CHECK(t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(0) == q.size(0) &&
                  t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.size(3) == call.v.size(3),
              name, " has shape ", shape_of(t), ", expected the output's [", q.size(0), ", ", q.size(1), ", ",
              q.size(2), ", ", call.v.size(3), "] in q's dtype");
    };
    auto check_like_lse = [&](const Tensor& t, const char* name) {
        check_cpu(t, name);
        CHECK(t.scalar_type() == accumulate && t.dim() == 3 && t.size(0) == q.size(0) &&
                  t.size(1) == q.size(1) && t.size(2) == q.size(2),
              name, " has shape ", shape_of(t), ", expected [", q.size(0), ", ", q.size(1), ", ", q.size(2),
              "] in ", accumulate == ScalarType::Double ? "float64" : "float32");
    };
    check_like_out(dout, "dout");
    check_like_out(out, "out");
    check_like_lse(lse, "lse");
    if (dlse) check_like_lse(*dlse, "dlse");
    CHECK(!need_dbias || call.bias, "need_dbias without a bias");
    CHECK(!need_dsinks || call.sinks, "need_dsinks without sinks");
    dout = unit_stride(dout);
    out = unit_stride(out);

    Gradients g{torch::stable::empty_like(q), torch::stable::empty_like(call.k),
                torch::stable::empty_like(call.v), new_tensor(q, {0}, accumulate),
                new_tensor(q, {0}, accumulate)};
    if (!call.covers_rows) fill(g.dq, 0);
    if (!call.covers_keys) {
        fill(g.dk, 0);
        fill(g.dv, 0);
    }
    BiasSharing sharing;
    Tensor sums = g.dbias, delta = g.dsinks;
    Params& p = call.params;
    p.out = rows4(out);
    p.lse = lse4(lse);
    p.dout = rows4(dout);
    if (dlse) p.dlse = lse4(*dlse);
    p.dq = rows4(g.dq);
    p.dk = rows4(g.dk);
    p.dv = rows4(g.dv);
    if (need_dbias) {
        sums = bias_sums(call, *call.bias, sharing);
        p.dbias = operand4(sums);
    }
    if (need_dsinks) {
        delta = new_lse(q);
        p.delta = lse4(delta);
        g.dsinks = new_tensor(q, {q.size(1)}, accumulate);
    }
    run_backward(call, sharing);
    bool wide = accumulate == ScalarType::Double;
    if (need_dsinks)
        wide ? sink_gradient<double>(call, lse, delta, g.dsinks) : sink_gradient<float>(call, lse, delta, g.dsinks);
    if (need_dbias) {
        const Tensor& bias = *call.bias;
        g.dbias = sums;
        if (sums.size(0) != bias.size(0) || sums.size(1) != bias.size(1)) {
            g.dbias = new_tensor(q, {bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, accumulate);
            fill(g.dbias, 0);
            wide ? reduce_bias<double>(sums, g.dbias) : reduce_bias<float>(sums, g.dbias);
        }
    }
    return g;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(
    const Tensor& dout, OptionalTensor dlse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor bias, OptionalTensor alibi_slopes,
    OptionalTensor sinks, OptionalTensor kv_lens, OptionalTensor kv_starts, OptionalTensor document_ids,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor page_table,
    OptionalTensor dropout_seed, double scale, double softcap, int64_t left, int64_t right, bool align_end,
    double dropout_p, bool need_dbias, bool need_dsinks) {
    Call call{q,         k,           v,            mask,         bias,         alibi_slopes, sinks,
              kv_lens,   kv_starts,   document_ids, cu_seqlens_q, cu_seqlens_k, page_table,   dropout_seed,
              scale,     softcap,     left,         right,        align_end,    dropout_p};
    Gradients g = backward_into_new(call, dout, dlse, out, lse, need_dbias, need_dsinks);
    return {g.dq, g.dk, g.dv, g.dbias, g.dsinks};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("flash_attn_fwd", TORCH_BOX(&flash_attn_fwd));
    m.impl("flash_attn_bwd", TORCH_BOX(&flash_attn_bwd));
}

// --- aten's own CPU flash operator, served by the same kernels ------------------------------------
// aten gives a float mask that is added, or a bool one; causal is aligned to the start.

Call aten_call(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p, bool is_causal,
               OptionalTensor attn_mask, std::optional<double> scale) {
    CHECK(dropout_p == 0, "aten's CPU flash operator has no dropout");
    Call call{};
    call.q = q;
    call.k = k;
    call.v = v;
    if (attn_mask && attn_mask->defined()) {  // autograd passes an undefined one for none
        Tensor mask = *attn_mask;
        if (mask.dim() == 2) mask = torch::stable::unsqueeze(torch::stable::unsqueeze(mask, 0), 0);
        (mask.scalar_type() == ScalarType::Bool ? call.mask : call.bias) = mask;
    }
    call.scale = scale ? *scale : 1 / std::sqrt(static_cast<double>(q.size(q.dim() - 1)));
    call.left = -1;
    call.right = is_causal ? 0 : -1;
    return call;
}

std::tuple<Tensor, Tensor> aten_forward(const Tensor& q, const Tensor& k, const Tensor& v, double dropout_p,
                                        bool is_causal, OptionalTensor attn_mask, std::optional<double> scale) {
    Call call = aten_call(q, k, v, dropout_p, is_causal, attn_mask, scale);
    CHECK(q.dim() == 4, "q must have 4 dimensions, got shape ", shape_of(q));
    // [B, Sq, H] in memory, as aten's shape function says
    Tensor lse = torch::stable::transpose(
        new_tensor(q, {q.size(0), q.size(2), q.size(1)}, accumulate_type(q)), 1, 2);
    return forward_into_new(call, lse, 0);
}

std::tuple<Tensor, Tensor, Tensor> aten_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                 const Tensor& v, const Tensor& out, const Tensor& lse,
                                                 double dropout_p, bool is_causal, OptionalTensor attn_mask,
                                                 std::optional<double> scale) {
    Call call = aten_call(q, k, v, dropout_p, is_causal, attn_mask, scale);
    Gradients g = backward_into_new(call, dout, std::nullopt, out, lse, false, false);
    return {g.dq, g.dk, g.dv};
}

}  // namespace
}  // namespace fastattn::cpu

// Puts these kernels under aten's CPU flash operator (on = 1) or gives it back (on = 0). Called by
// fastattn/override.py, which serialises the calls. Returns whether the kernels are now in place.
extern "C" __attribute__((visibility("default"))) int fastattn_override_sdpa(int on) {
    using torch::stable::detail::StableLibrary;
    static std::unique_ptr<StableLibrary> library;
    if (on && !library) {
        library.reset(new StableLibrary(StableLibrary::Kind::IMPL, "aten", "CPU", "ops_cpu.cpp", 0));
        library->impl("_scaled_dot_product_flash_attention_for_cpu", TORCH_BOX(&fastattn::cpu::aten_forward));
        library->impl("_scaled_dot_product_flash_attention_for_cpu_backward",
                      TORCH_BOX(&fastattn::cpu::aten_backward));
    } else if (!on) {
        library.reset();
    }
    return library != nullptr;
}
