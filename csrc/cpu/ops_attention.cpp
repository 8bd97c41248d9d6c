// The CPU operators: the parallel loops over work items, and what is registered with torch.
// next: call.h (checks), schedule.h (items), forward.inl, backward.inl
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "arena.h"
#include "attention.h"
#include "run.h"
#include "schedule.h"

namespace fastattn::cpu {

// --- running the items --------------------------------------------------------------------------

// Tiles are counted in int, and each takes 40 bytes; without this, strides of 0 could ask for
// billions of empty ones.
void check_tiles(const Call& call, int heads, int block_q) {
    constexpr int64_t MOST = int64_t(1) << 28;
    int64_t tiles =
        static_cast<int64_t>(call.segments.size()) * std::max(heads, call.params.kv_heads);
    for (const Segment& s : call.segments)
        tiles += static_cast<int64_t>(heads) * (2 * int64_t(s.band.q_len) / block_q);
    CHECK(tiles <= MOST, "a call of ", call.entries, " batch entries or sequences and ", heads,
          " heads makes ", tiles, " tiles, the limit is 2^28: attend to fewer at a time");
}

namespace {

std::atomic<uint64_t> calls{0};  // so far, in this process

void run_forward(Call& call, int num_splits) {
    call.params.call = ++calls;
    const Params& p = call.params;
    const Kernels& kernels = kernels_for(p.dtype);
    if (p.heads == 0) return;
    check_tiles(call, p.heads, kernels.block_q);
    const int64_t size = p.dtype == Dtype::F64 ? 8 : 4;
    const int64_t row_bytes = (p.v_dim + 2) * size;
    ForwardPlan plan = plan_forward(call.segments, p, kernels.block_q, num_splits, row_bytes);
    SplitResults results{};
    Bytes memory, more;
    const bool statistics = p.entropy.data || p.argmax.data;
    if (plan.split_rows > 0 && statistics) {
        more = new_bytes(plan.split_rows * (sizeof(int64_t) + size));
        results.argmax = reinterpret_cast<int64_t*>(more.get());
        results.weighted = more.get() + plan.split_rows * sizeof(int64_t);
    }
    if (plan.split_rows > 0) {
        memory = new_bytes(plan.split_rows * row_bytes);
        results.row_max = memory.get();
        results.row_sum = memory.get() + plan.split_rows * size;
        results.acc = memory.get() + 2 * plan.split_rows * size;
    }
    double flops = 2 * plan.pairs * (p.head_dim + p.v_dim);
    auto kernel = statistics ? kernels.forward_statistics : kernels.forward;
    for_each_item(plan.items.size(), flops, [&](int64_t i) {
        if (p.tout.data)
            kernels.jvp(p, plan.items[i]);
        else
            kernel(p, plan.items[i], results);
    });
    for_each_item(plan.merges.size(), flops, [&](int64_t i) {
        kernels.combine(p, plan.items[plan.merges[i].first], plan.merges[i].splits, results);
    });
}

void run_backward(Call& call, BiasSharing sharing) {
    call.params.call = ++calls;
    const Params& p = call.params;
    const Kernels& kernels = kernels_for(p.dtype);
    if (p.heads == 0) return;
    check_tiles(call, p.heads, kernels.block_q);
    const int64_t size = p.dtype == Dtype::F64 ? 8 : 4;
    const int64_t padded = kernels.padded(p.head_dim) + kernels.padded(p.v_dim);
    KeyBytes bytes{(p.head_dim + p.v_dim) * size_of(p.dtype), padded * size};
    BackwardPlan plan =
        plan_backward(call.segments, p, kernels.block_q, kernels.block_kv, bytes, sharing);
    std::vector<Bytes> memory;
    for (const BackwardPlan::Merge& merge : plan.merges)
        for (int i = merge.first; i < merge.first + merge.count; i++) {
            BackwardItem& item = plan.items[i];
            int64_t keys = item.key_end - item.key_begin;
            for (auto [sum, dim] :
                 {std::pair{&item.dk_sum, p.head_dim}, std::pair{&item.dv_sum, p.v_dim}}) {
                memory.push_back(new_bytes(keys * kernels.padded(dim) * size + 1));
                *sum = memory.back().get();
            }
        }
    double flops = 5 * plan.pairs * (p.head_dim + p.v_dim);  // twice as many for jvp_bwd
    auto kernel = p.tout.data ? kernels.jvp_bwd : kernels.backward;
    for_each_item(static_cast<int64_t>(plan.task_begin.size()) - 1, flops, [&](int64_t task) {
        for (int i = plan.task_begin[task]; i < plan.task_begin[task + 1]; i++)
            kernel(p, plan.items[plan.tasks[i]]);
    });
    for_each_item(plan.merges.size(), flops, [&](int64_t i) {
        kernels.reduce(p, &plan.items[plan.merges[i].first], plan.merges[i].count);
    });
}

// --- the operators ------------------------------------------------------------------------------

// Sets all elements of a dense tensor. Torch's fill_ would hang in a forked child.
template <class T> void fill_values(const Tensor& t, T value) {
    constexpr int64_t STEP = 1 << 18;
    T* to = static_cast<T*>(t.data_ptr());
    int64_t n = t.numel();
    for_each_item((n + STEP - 1) / STEP, static_cast<double>(n), [&](int64_t i) {
        std::fill(to + i * STEP, to + std::min(n, (i + 1) * STEP), value);
    });
}

}  // namespace

void fill(const Tensor& t, double value) {
    switch (t.scalar_type()) {
        case ScalarType::Long:
            return fill_values(t, static_cast<int64_t>(value));
        case ScalarType::Double:
            return fill_values(t, value);
        case ScalarType::Float:
            return fill_values(t, static_cast<float>(value));
        case ScalarType::BFloat16:
            return fill_values(t, static_cast<torch::headeronly::BFloat16>(value));
        default:
            return fill_values(t, static_cast<torch::headeronly::Half>(value));
    }
}

namespace {

constexpr char NO_MEMORY[] =
    "not enough memory for the list of this call's tiles: attend to fewer rows, heads or batch "
    "entries at a time";

Tensor new_lse(const Tensor& q) {
    return new_tensor(q, {q.size(0), q.size(1), q.size(2)}, accumulate_type(q));
}

}  // namespace

// Tensors for the statistics that are asked for, of rows that see no key where none writes them.
static void set_rows(Call& call, RowResults& rows) {
    const Tensor& q = call.q;
    auto set = [&](bool need, ScalarType dtype, double nothing, Tensor4& to) {
        if (!need) return new_tensor(q, {0}, dtype);
        Tensor t = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, dtype);
        if (!call.covers_rows) fill(t, nothing);
        to = {static_cast<char*>(t.data_ptr()), Dtype::F32, t.stride(0), t.stride(1), t.stride(2)};
        return t;
    };
    Params& p = call.params;
    rows.max_logit = set(true, accumulate_type(q), -INFINITY, p.max_logit);
    rows.entropy = set(rows.need_entropy, accumulate_type(q), 0, p.entropy);
    rows.argmax = set(rows.need_argmax, ScalarType::Long, -1, p.argmax);
}

// out and lse, or their tangents. Rows of no sequence have an lse of `no_keys`.
static Result new_result(const Call& call, double no_keys) {
    const Tensor& q = call.q;
    Tensor lse = new_lse(q);
    Tensor out =
        call.params.head_dim == call.params.v_dim && is_dense(q)
            ? new_like(q)
            : new_tensor(q, {q.size(0), q.size(1), q.size(2), call.v.size(3)}, q.scalar_type());
    if (!call.covers_rows) {
        fill(out, 0);
        fill(lse, no_keys);
    }
    return {out, lse};
}

Result attend(Call& call, int64_t num_splits, RowResults* rows) try {
    CHECK(num_splits >= 0 && num_splits <= 1 << 20, "num_splits must be in [0, 2^20], got ",
          num_splits);
    call.prepare();
    Result result = new_result(call, -INFINITY);
    call.params.out = rows4(result.out);
    call.params.lse = lse4(result.lse);
    if (rows != nullptr) set_rows(call, *rows);
    run_forward(call, static_cast<int>(num_splits));
    return result;
} catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
}

JvpResult attend_jvp(Call& call) try {
    call.prepare();
    JvpResult result{new_result(call, -INFINITY), new_result(call, 0)};
    Params& p = call.params;
    p.out = rows4(result.primal.out);
    p.lse = lse4(result.primal.lse);
    p.tout = rows4(result.tangent.out);
    p.tlse = lse4(result.tangent.lse);
    run_forward(call, 1);
    return result;
} catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
}

// A large result in fresh memory costs a page fault every 4 KB, a sixth of the time of a call with
// a bias gradient at S 1024. This asks for huge pages where the system leaves them to the program.
void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096, LARGE = uintptr_t(4) << 20;
    uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
    uintptr_t end = begin + static_cast<uintptr_t>(t.numel()) * t.element_size();
    begin = (begin + PAGE - 1) / PAGE * PAGE;
    end = end / PAGE * PAGE;
    if (end > begin && end - begin >= LARGE)
        madvise(reinterpret_cast<void*>(begin), end - begin,
                MADV_HUGEPAGE);  // a hint, which the system may ignore
#endif
}

namespace {

// Whether the tiles of every sequence visit every element of the bias. Those of a varlen call may
// all be shorter than the bias or see fewer keys.
bool visits_all(const Call& call, const Tensor& bias) {
    if (call.operands.mask || call.operands.key_begin) return false;
    if (call.entries == 0 || call.params.heads == 0) return false;
    if (static_cast<int64_t>(call.segments.size()) != call.entries) return false;
    return std::all_of(call.segments.begin(), call.segments.end(), [&](const Segment& s) {
        Range keys = s.band.kv_range(0, s.band.q_len);
        return s.band.q_len == bias.size(2) && s.band.kv_len == bias.size(3) &&
               keys.full_begin == 0 && keys.full_end == s.band.kv_len;
    });
}

// dbias in the shape that the kernel adds to: the bias's own or, where rows or keys are broadcast,
// one row of sums for each sequence and head, which is small and never shared between these.
Tensor bias_sums(const Call& call, const Tensor& bias, BiasSharing& sharing, bool& unset) {
    bool small = bias.size(2) == 1 || bias.size(3) == 1;
    sharing.any = true;
    sharing.rows = bias.size(2) == 1;
    sharing.entries = !small && bias.size(0) == 1;
    sharing.heads = !small && bias.size(1) == 1;
    std::vector<int64_t> sizes = {small ? call.entries : bias.size(0),
                                  small ? call.q.size(1) : bias.size(1), bias.size(2),
                                  bias.size(3)};
    Tensor sums = new_tensor(call.q, sizes, accumulate_type(call.q));
    prefer_huge_pages(sums);
    unset = !small && visits_all(call, bias);
    if (!unset) fill(sums, 0);
    return sums;
}

template <class A> void reduce_bias(const Tensor& from, const Tensor& to) {
    const A* x = static_cast<const A*>(from.data_ptr());
    A* y = static_cast<A*>(to.data_ptr());
    int64_t inner = from.size(2) * from.size(3);
    for (int64_t b = 0; b < from.size(0); b++)
        for (int64_t h = 0; h < from.size(1); h++) {
            int64_t row = (to.size(0) == 1 ? 0 : b) * to.size(1) + (to.size(1) == 1 ? 0 : h);
            for (int64_t i = 0; i < inner; i++)
                y[row * inner + i] += x[(b * from.size(1) + h) * inner + i];
        }
}

// d loss / d sink[h] = -sum over rows of exp(sink - lse) * delta: the sink's probability times
// the term that all gradients of the scores share, to which the gradient of the entropy adds its
// own times the logarithm of the probability.
template <class A>
void sink_gradient(const Call& call, const Tensor& lse, const Tensor& delta, Tensor& dsinks) {
    const Params& p = call.params;
    Tensor4 l = lse4(lse), d = lse4(delta);
    for (int h = 0; h < p.heads; h++) {
        double sink = 0, sum = 0;
        const char* at = p.sinks.bytes_at(0, h, 0);
        switch (p.sinks.dtype) {
            case Dtype::F64:
                sink = *reinterpret_cast<const double*>(at);
                break;
            case Dtype::F32:
                sink = *reinterpret_cast<const float*>(at);
                break;
            case Dtype::BF16:
                sink = *reinterpret_cast<const torch::headeronly::BFloat16*>(at);
                break;
            default:
                sink = *reinterpret_cast<const torch::headeronly::Half*>(at);
        }
        for (const Segment& s : call.segments)
            for (int i = s.q_begin; i < s.q_begin + s.band.q_len; i++) {
                A row_lse = *l.at<A>(s.batch, h, i);
                if (row_lse == -INFINITY) continue;
                double log_prob = std::min(sink - row_lse, 0.0), prob = std::exp(log_prob);
                sum -= prob * *d.at<A>(s.batch, h, i);
                if (p.dentropy.data && prob != 0)
                    sum -= *p.dentropy.at<A>(s.batch, h, i) * prob * log_prob;
            }
        static_cast<A*>(dsinks.data_ptr())[h] = static_cast<A>(sum);
    }
}

}  // namespace

Gradients differentiate(Call& call, Tensor dout, const OptionalTensor& dlse, Tensor out,
                        const Tensor& lse, bool need_dbias, bool need_dsinks) try {
    CHECK(!call.operands.page_table, "page_table is given, and paged keys have no gradient");
    call.prepare();
    const Tensor& q = call.q;
    const ScalarType accumulate = accumulate_type(q);
    auto check_like_out = [&](const Tensor& t, const char* name) {
        check_cpu(t, name);
        CHECK(t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(0) == q.size(0) &&
                  t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.size(3) == call.v.size(3),
              name, " has shape ", shape_of(t), ", expected the output's [", q.size(0), ", ",
              q.size(1), ", ", q.size(2), ", ", call.v.size(3), "] in q's dtype");
    };
    check_like_out(dout, call.tout ? "dtout" : "dout");
    check_like_out(out, "out");
    check_like_lse(q, lse, "lse");
    if (dlse) check_like_lse(q, *dlse, call.tout ? "dtlse" : "dlse");
    if (call.dentropy) {
        check_like_lse(q, *call.dentropy, "dentropy");
        call.params.dentropy = lse4(*call.dentropy);
    }
    if (call.tout) {
        check_like_out(*call.tout, "tout");
        check_like_lse(q, *call.tlse, "tlse");
        call.tout = unit_stride(*call.tout);
        call.params.tout = rows4(*call.tout);
        call.params.tlse = lse4(*call.tlse);
    }
    CHECK(!need_dbias || call.operands.bias, "need_dbias without a bias");
    CHECK(!need_dsinks || call.operands.sinks, "need_dsinks without sinks");
    dout = unit_stride(dout);
    out = unit_stride(out);

    Gradients g{new_like(q), new_like(call.k), new_like(call.v), new_tensor(q, {0}, accumulate),
                new_tensor(q, {0}, accumulate)};
    if (!call.covers_rows) fill(g.dq, 0);
    if (!call.covers_keys || call.params.heads == 0) {
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
        sums = bias_sums(call, *call.operands.bias, sharing, p.dbias_unset);
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
        wide ? sink_gradient<double>(call, lse, delta, g.dsinks)
             : sink_gradient<float>(call, lse, delta, g.dsinks);
    if (need_dbias) {
        const Tensor& bias = *call.operands.bias;
        g.dbias = sums;
        if (sums.size(0) != bias.size(0) || sums.size(1) != bias.size(1)) {
            g.dbias =
                new_tensor(q, {bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, accumulate);
            fill(g.dbias, 0);
            wide ? reduce_bias<double>(sums, g.dbias) : reduce_bias<float>(sums, g.dbias);
        }
    }
    return g;
} catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
}

// --- what is registered with torch -------------------------------------------------------------

namespace {

std::tuple<Tensor, Tensor> flash_attn_fwd(Inputs inputs, int64_t num_splits) {
    Call call{std::move(inputs)};
    auto [out, lse] = attend(call, num_splits);
    return {out, lse};
}

// A call without operands. Torch takes 1 to 2 thousand instructions to pass each argument.
std::tuple<Tensor, Tensor> flash_attn_fwd_simple(Tensor q, Tensor k, Tensor v, Spec spec) {
    return flash_attn_fwd({std::move(q), std::move(k), std::move(v), {}, spec}, 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(Tensor dout, OptionalTensor dlse,
                                                                  Tensor out, Tensor lse,
                                                                  Inputs inputs, bool need_dbias,
                                                                  bool need_dsinks,
                                                                  OptionalTensor dentropy) {
    Call call{std::move(inputs)};
    call.dentropy = std::move(dentropy);
    Gradients g = differentiate(call, dout, dlse, out, lse, need_dbias, need_dsinks);
    return {g.dq, g.dk, g.dv, g.dbias, g.dsinks};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("flash_attn_fwd", BOX(&flash_attn_fwd));
    m.impl("flash_attn_fwd_simple", BOX(&flash_attn_fwd_simple));
    m.impl("flash_attn_bwd", BOX(&flash_attn_bwd));
}

}  // namespace
}  // namespace fastattn::cpu

// The arguments that all attention operators share, as their schemas write them: a test holds these
// equal to the schemas, which Python makes.
extern "C" __attribute__((visibility("default"))) const char* fastattn_inputs_schema() {
    static const std::string schema = fastattn::schema_of_inputs();
    return schema.c_str();
}

// Whether new memory starts as NaN, for the test that holds the tests to it.
extern "C" __attribute__((visibility("default"))) int fastattn_poison_on() {
    return fastattn::poison_on();
}
