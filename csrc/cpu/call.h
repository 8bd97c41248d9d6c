// One call of a CPU operator: checks its tensors, once, and makes segments and Params of them.
// next: schedule.h
#pragma once
#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../operands.h"
#include "params.h"

namespace fastattn::cpu {

// --- tensors ------------------------------------------------------------------------------------

inline std::optional<Dtype> dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return Dtype::F32;
        case ScalarType::Double:
            return Dtype::F64;
        case ScalarType::BFloat16:
            return Dtype::BF16;
        case ScalarType::Half:
            return Dtype::F16;
        case ScalarType::Bool:
            return Dtype::BOOL;
        default:
            return std::nullopt;
    }
}

inline void check_cpu(const Tensor& t, const char* name) {
    CHECK(t.defined(), name, " is undefined, and a tensor is needed");
    CHECK(t.is_cpu(), name, " must be on the CPU, where q is");
    CHECK(t.numel() == 0 || t.data_ptr() != nullptr, name, " has no memory");
}

// A 4-D operand as Params have it: strides in elements, 0 along broadcast dimensions.
inline Tensor4 operand4(const Tensor& t) {
    Tensor4 x;
    x.data = static_cast<char*>(t.data_ptr());
    x.dtype = *dtype_of(t);
    x.batch = t.size(0) == 1 ? 0 : t.stride(0);
    x.head = t.size(1) == 1 ? 0 : t.stride(1);
    x.row = t.size(2) == 1 ? 0 : t.stride(2);
    x.col = t.size(3) == 1 ? 0 : t.stride(3);
    return x;
}

// q, k, v, out and their gradients, which have unit last stride.
inline Tensor4 rows4(const Tensor& t) {
    Tensor4 x = operand4(t);
    x.batch = t.stride(0);
    x.head = t.stride(1);
    x.row = t.stride(2);
    x.col = 1;
    return x;
}

// lse or delta, [B, Hq, Sq].
inline Tensor4 lse4(const Tensor& t) {
    Tensor4 x;
    x.data = static_cast<char*>(t.data_ptr());
    x.dtype = *dtype_of(t);
    x.batch = t.stride(0);
    x.head = t.stride(1);
    x.row = t.stride(2);
    return x;
}

// A number for each head.
inline Tensor4 heads4(const Tensor& t) {
    return {static_cast<char*>(t.data_ptr()), *dtype_of(t), 0, t.stride(0), 0, 0};
}

inline ScalarType accumulate_type(const Tensor& q) {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// --- the call -----------------------------------------------------------------------------------

// Checks a tensor of a number for each row.
inline void check_like_lse(const Tensor& q, const Tensor& t, const char* name) {
    check_cpu(t, name);
    ScalarType dtype = accumulate_type(q);
    CHECK(t.scalar_type() == dtype && t.dim() == 3 && t.size(0) == q.size(0) &&
              t.size(1) == q.size(1) && t.size(2) == q.size(2),
          name, " has shape ", shape_of(t), ", expected [", q.size(0), ", ", q.size(1), ", ",
          q.size(2), "] in ", dtype == ScalarType::Double ? "float64" : "float32");
}

// An operator's arguments; prepare() checks them and fills in what the kernels read.
struct Call : Inputs {
    Tangents tangents{};            // of forward mode
    OptionalTensor tout{}, tlse{};  // results of forward mode, given to its backward
    OptionalTensor dentropy{};      // the gradient of the rows' entropy, given to a backward

    // filled by prepare()
    std::vector<int> page_entries{};  // page_table as far as lengths reach, contiguous
    int64_t page_columns = 0;
    std::vector<float> slopes{};
    std::vector<Segment> segments{};
    int64_t entries = 0, max_q = 0, max_kv = 0;
    bool covers_rows = true, covers_keys = true;  // false: some rows or keys belong to no segment
    Params params{};

    void prepare();

  private:
    void check_operands();
    void make_segments();
    void set_dropout();
    void set_tangents();
    void copy_pages(int64_t page_size);
    RowNumbers key_range(const Tensor& t, const char* name) const;
    std::vector<int> int_vector(const OptionalTensor& t, const char* name, int64_t size) const;
    void check_broadcast(const Tensor& t, const char* name) const;
};

inline std::vector<int> Call::int_vector(const OptionalTensor& t, const char* name,
                                         int64_t size) const {
    if (!t) return {};
    check_cpu(*t, name);
    CHECK(t->scalar_type() == ScalarType::Int, name, " must be int32");
    CHECK(t->dim() == 1 && (size < 0 || t->size(0) == size), name, " has shape ", shape_of(*t),
          ", expected [", size < 0 ? "sequences + 1" : std::to_string(size), "]");
    CHECK(t->size(0) <= MAX_ENTRIES + 1, name, " has ", t->size(0),
          " elements, the limit is 2^24 sequences: attend to fewer at a time");
    std::vector<int> out(t->size(0));
    const int* from = static_cast<const int*>(t->data_ptr());
    for (size_t i = 0; i < out.size(); i++) out[i] = from[static_cast<int64_t>(i) * t->stride(0)];
    return out;
}

inline void Call::check_broadcast(const Tensor& t, const char* name) const {
    check_cpu(t, name);
    int64_t full[4] = {entries, q.size(1), max_q, max_kv};
    bool ok = t.dim() == 4;
    for (int i = 0; ok && i < 4; i++)
        ok = t.size(i) == 1 || t.size(i) == full[i] ||
             (operands.cu_seqlens_q && i >= 2 &&
              t.size(i) > full[i]);  // varlen: at least the longest
    CHECK(ok, name, " has shape ", shape_of(t), ", which does not broadcast to [", full[0], ", ",
          full[1], ", ", full[2], ", ", full[3], "]");
}

inline void Call::check_operands() {
    const OptionalTensor& cu_seqlens_q = operands.cu_seqlens_q;
    const OptionalTensor& cu_seqlens_k = operands.cu_seqlens_k;
    const OptionalTensor& dropout_seed = operands.dropout_seed;
    const Tensor* all[3] = {&q, &k, &v};
    const char* names[3] = {"q", "k", "v"};
    for (int i = 0; i < 3; i++) {
        check_cpu(*all[i], names[i]);
        CHECK(all[i]->dim() == 4, names[i], " must have 4 dimensions, got shape ",
              shape_of(*all[i]));
        CHECK(all[i]->scalar_type() == q.scalar_type(), names[i], " must have q's dtype");
        for (int d = 0; d < 4; d++)
            CHECK(all[i]->size(d) < MAX_LENGTH, names[i], " has a dimension of ", all[i]->size(d),
                  ", the limit is 2^30");
    }
    CHECK(q.size(0) <= MAX_ENTRIES, "q has batch size ", q.size(0),
          ", the limit is 2^24: attend to fewer entries at a time");
    auto dtype = dtype_of(q);
    CHECK(dtype && *dtype != Dtype::BOOL, "q must be float32, float64, bfloat16 or float16");
    CHECK(q.size(3) == k.size(3) && q.size(3) >= 1,
          "q and k must have one head dimension >= 1, got ", q.size(3), " and ", k.size(3));
    CHECK(v.size(3) >= 1, "v must have a head dimension >= 1");
    CHECK(q.size(3) <= 65536 && v.size(3) <= 65536,
          "head dimensions above 65536 are not supported");
    CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2),
          "k has shape ", shape_of(k), " and v ", shape_of(v),
          ": all but the last dimension must agree");
    CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "q has ", q.size(1),
          " heads, which is not a multiple of the ", k.size(1), " heads of k");
    check_score_numbers(spec.scale, spec.softcap);
    CHECK(spec.left >= -1 && spec.right >= -1, "left and right must be >= -1");
    CHECK(spec.dropout_p >= 0 && spec.dropout_p < 1, "dropout_p must be in [0, 1), got ",
          spec.dropout_p);
    CHECK(!operands.key_begin == !operands.key_end, "key_begin and key_end come together");
    CHECK(!cu_seqlens_q == !cu_seqlens_k, "cu_seqlens_q and cu_seqlens_k come together");
    if (!cu_seqlens_q && !operands.page_table)
        CHECK(q.size(0) == k.size(0), "q has batch size ", q.size(0), " and k ", k.size(0));
    if (spec.dropout_p > 0) {
        CHECK(dropout_seed.has_value(), "dropout needs dropout_seed");
        check_cpu(*dropout_seed, "dropout_seed");
        CHECK(dropout_seed->scalar_type() == ScalarType::Long && dropout_seed->dim() == 1 &&
                  (dropout_seed->size(0) == FIRST_HEAD || dropout_seed->size(0) == DROPOUT_NUMBERS),
              "dropout_seed must be int64 [2], seed and offset, or [4], and then the first head "
              "and the number of all heads");
    }
}

// Makes segments of lengths, documents, varlen sequences and pages.
inline void Call::make_segments() {
    const OptionalTensor& cu_seqlens_q = operands.cu_seqlens_q;
    const OptionalTensor& document_ids = operands.document_ids;
    const OptionalTensor& page_table = operands.page_table;
    int batch = static_cast<int>(q.size(0)), q_rows = static_cast<int>(q.size(2));
    int kv_rows = static_cast<int>(k.size(2));
    std::vector<int> q_begins, k_begins;
    if (cu_seqlens_q) {
        CHECK(q.size(0) == 1, "with cu_seqlens_q, q must have batch size 1");
        q_begins = int_vector(cu_seqlens_q, "cu_seqlens_q", -1);
        CHECK(!q_begins.empty(), "cu_seqlens_q must have at least one element");
        k_begins = int_vector(operands.cu_seqlens_k, "cu_seqlens_k",
                              static_cast<int64_t>(q_begins.size()));
        auto check_cu = [](const std::vector<int>& cu, const char* name, int64_t limit) {
            CHECK(cu[0] == 0, name, " must start with 0, got ", cu[0]);
            for (size_t i = 1; i < cu.size(); i++)
                CHECK(cu[i] >= cu[i - 1], name, " decreases at ", i, ": ", cu[i - 1], " to ",
                      cu[i]);
            CHECK(cu.back() <= limit, name, " ends with ", cu.back(), ", beyond the ", limit,
                  " rows");
        };
        check_cu(q_begins, "cu_seqlens_q", q_rows);
        check_cu(k_begins, "cu_seqlens_k", page_table ? MAX_LENGTH - 1 : kv_rows);
        if (!page_table) CHECK(k.size(0) == 1, "with cu_seqlens_k, k must have batch size 1");
        CHECK(!document_ids, "document_ids cannot be combined with cu_seqlens_q");
    }
    bool packed = !q_begins.empty();
    entries = packed ? static_cast<int64_t>(q_begins.size()) - 1 : batch;
    std::vector<int> lens = int_vector(operands.kv_lens, "kv_lens", entries);
    std::vector<int> starts = int_vector(operands.kv_starts, "kv_starts", entries);
    int64_t pages = 0, page_size = 1;
    if (page_table) {
        check_cpu(*page_table, "page_table");
        CHECK(page_table->scalar_type() == ScalarType::Int && page_table->dim() == 2 &&
                  page_table->size(0) == entries,
              "page_table must be int32 [", entries, ", pages], got shape ", shape_of(*page_table));
        CHECK(packed || operands.kv_lens, "page_table needs kv_lens");
        CHECK(!document_ids, "document_ids cannot be combined with page_table");
        CHECK(kv_rows > 0 || page_table->size(1) == 0, "pages must hold at least one key");
        pages = page_table->size(1);
        CHECK(pages < MAX_LENGTH, "page_table has ", pages, " columns, the limit is 2^30");
        page_size = std::max(1, kv_rows);
    }
    const int* documents = nullptr;
    if (document_ids) {
        check_cpu(*document_ids, "document_ids");
        CHECK(document_ids->scalar_type() == ScalarType::Int && document_ids->dim() == 2 &&
                  document_ids->size(0) == batch && document_ids->size(1) == q_rows &&
                  q_rows == kv_rows,
              "document_ids must be int32 [batch, S] with S = ", q_rows,
              " rows of q and of k, got shape ", shape_of(*document_ids));
        CHECK(document_ids->numel() < MAX_LENGTH, "document_ids has ", document_ids->numel(),
              " elements, the limit is 2^30: attend to fewer entries at a time");
        documents = static_cast<const int*>(document_ids->data_ptr());
    }

    int window_left = static_cast<int>(std::min<int64_t>(spec.left, MAX_LENGTH));
    int window_right = static_cast<int>(std::min<int64_t>(spec.right, MAX_LENGTH));
    for (int e = 0; e < entries; e++) {
        int q_len = packed ? q_begins[e + 1] - q_begins[e] : q_rows;
        int64_t capacity = packed       ? k_begins[e + 1] - k_begins[e]
                           : page_table ? pages * page_size
                                        : kv_rows;
        capacity = std::min(capacity, MAX_LENGTH - 1);
        int kv_len = static_cast<int>(capacity);
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
        if (page_table)
            CHECK(pages * page_size >= kv_len, "page_table has ", pages, " pages of ", page_size,
                  " keys, too few for the ", kv_len, " keys of entry ", e);
        Segment s{};
        s.batch = packed ? 0 : e;
        s.entry = e;
        int offset = spec.align_end ? kv_len - q_len : 0;
        auto add = [&](int row, int rows, int key, int key_end) {
            s.q_begin = (packed ? q_begins[e] : 0) + row;
            s.kv_begin = (packed && !page_table ? k_begins[e] : 0) + key;
            s.row0 = row;
            s.key0 = key;
            s.band = {window_left, window_right, offset + row - key, rows,
                      std::max(0, key_end - key)};
            segments.push_back(s);
        };
        if (documents == nullptr) {
            add(0, q_len, first, kv_len);
        } else {
            const int* ids = documents + e * document_ids->stride(0);
            int64_t step = document_ids->stride(1);
            for (int begin = 0, end; begin < q_len; begin = end) {
                for (end = begin + 1; end < q_len && ids[end * step] == ids[begin * step]; end++) {
                }
                CHECK(end == q_len || ids[end * step] > ids[begin * step],
                      "document_ids decreases at row ", end, " of batch entry ", e);
                add(begin, end - begin, std::max(begin, first), std::min(end, kv_len));
            }
        }
        max_q = std::max<int64_t>(max_q, q_len);
        max_kv = std::max<int64_t>(max_kv, kv_len);
    }
    if (!packed) {  // also where there are none
        max_q = q_rows;
        max_kv = page_table ? pages * page_size : kv_rows;
    }
    covers_rows = !packed || q_begins.back() == q_rows;
    covers_keys = !packed && lens.empty() && starts.empty();
    if (page_table) copy_pages(page_size);
}

// Copies the part of the page table that lengths reach, and checks each page.
inline void Call::copy_pages(int64_t page_size) {
    const OptionalTensor& page_table = operands.page_table;
    auto pages_of = [&](const Segment& s) {
        return s.band.kv_len == 0 ? 0 : (s.key0 + s.band.kv_len + page_size - 1) / page_size;
    };
    for (const Segment& s : segments) page_columns = std::max(page_columns, pages_of(s));
    CHECK(entries * page_columns <= MAX_PAGES, "page_table holds ", entries, " x ", page_columns,
          " pages for these lengths, the limit is 2^28: attend to fewer entries at a time");
    page_entries.resize(entries * page_columns);
    const int* from = static_cast<const int*>(page_table->data_ptr());
    for (const Segment& s : segments)
        for (int64_t i = 0; i < pages_of(s); i++) {
            int page = from[s.entry * page_table->stride(0) + i * page_table->stride(1)];
            CHECK(page >= 0 && page < k.size(0), "page_table[", s.entry, ", ", i, "] is ", page,
                  ", outside the ", k.size(0), " pages");
            page_entries[s.entry * page_columns + i] = page;
        }
}

// One end of the rows' key ranges. Its values are read once, to check that none decreases, except
// those past the end of a varlen sequence.
inline RowNumbers Call::key_range(const Tensor& t, const char* name) const {
    check_cpu(t, name);
    CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 4 && t.size(3) == 1, name,
          " must be int32 [", entries, ", ", q.size(1), ", ", max_q,
          ", 1], or 1 where it is the same for all, got shape ", shape_of(t));
    check_broadcast(t, name);
    RowNumbers x{static_cast<const int*>(t.data_ptr()), t.size(0) == 1 ? 0 : t.stride(0),
                 t.size(1) == 1 ? 0 : t.stride(1), t.size(2) == 1 ? 0 : t.stride(2)};
    for (int64_t e = 0; e < (x.batch == 0 ? std::min<int64_t>(1, entries) : entries); e++) {
        int64_t rows = operands.cu_seqlens_q && x.batch != 0 ? segments[e].band.q_len : max_q;
        for (int64_t h = 0; h < (x.head == 0 ? std::min<int64_t>(1, q.size(1)) : q.size(1)); h++)
            for (int64_t i = 1; x.row != 0 && i < rows; i++)
                CHECK(x.at(e, h, i) >= x.at(e, h, i - 1), name,
                      " must not decrease along the rows, and does at row ", i, " of entry ", e,
                      ", head ", h, ": ", x.at(e, h, i - 1), " to ", x.at(e, h, i));
    }
    return x;
}

// Dropout's key, the first head and the number of all heads: dropout counts a head of a sequence as
// sequence * all heads + head.
inline void Call::set_dropout() {
    const OptionalTensor& dropout_seed = operands.dropout_seed;
    auto number = [&](DropoutNumber n) {
        return static_cast<const int64_t*>(dropout_seed->data_ptr())[n * dropout_seed->stride(0)];
    };
    params.dropout_key = DropoutKey::make(number(SEED), number(OFFSET), spec.dropout_p);
    int64_t first = 0, total = q.size(1);
    if (dropout_seed->size(0) == DROPOUT_NUMBERS) {
        first = number(FIRST_HEAD);
        total = number(TOTAL_HEADS);
        CHECK(first >= 0 && total < MAX_HEADS && first <= total - q.size(1) &&
                  entries * total < MAX_HEADS,
              "dropout_seed says that the first of q's ", q.size(1), " heads is head ", first,
              " of ", total, ": they must be among those, which over all ", entries,
              " entries must be below 2^31");
    }
    params.first_head = static_cast<uint32_t>(first);
    params.total_heads = static_cast<uint32_t>(total);
}

// Each tangent has its primal's shape.
inline void Call::set_tangents() {
    auto check = [&](const Tensor& t, const char* name, const Tensor& x, const char* of) {
        check_cpu(t, name);
        bool same = t.dim() == x.dim();
        for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == x.size(i);
        CHECK(same, name, " has shape ", shape_of(t), ", and ", of, ", whose tangent it is, ",
              shape_of(x));
    };
    auto rows = [&](OptionalTensor& t, const char* name, const Tensor& x, const char* of) {
        if (!t) return Tensor4{};
        check(*t, name, x, of);
        CHECK(t->scalar_type() == q.scalar_type(), name, " must have q's dtype");
        t = unit_stride(*t);
        return rows4(*t);
    };
    auto operand = [&](const OptionalTensor& t, const char* name, const OptionalTensor& x,
                       const char* of) {
        if (!t) return false;
        CHECK(x, name, " is given, but not ", of, ", whose tangent it is");
        check(*t, name, *x, of);
        CHECK(t->scalar_type() == x->scalar_type() || t->scalar_type() == accumulate_type(q), name,
              " must have the dtype of ", of, " or ",
              accumulate_type(q) == ScalarType::Double ? "float64" : "float32");
        return true;
    };
    params.tq = rows(tangents.q, "tq", q, "q");
    params.tk = rows(tangents.k, "tk", k, "k");
    params.tv = rows(tangents.v, "tv", v, "v");
    if (operand(tangents.bias, "tbias", operands.bias, "bias"))
        params.tbias = operand4(*tangents.bias);
    if (operand(tangents.sinks, "tsinks", operands.sinks, "sinks"))
        params.tsinks = heads4(*tangents.sinks);
}

inline void Call::prepare() {
    const OptionalTensor& mask = operands.mask;
    const OptionalTensor& bias = operands.bias;
    const OptionalTensor& sinks = operands.sinks;
    check_operands();
    q = unit_stride(q);
    k = unit_stride(k);
    v = unit_stride(v);
    make_segments();
    Params& p = params;
    p.scale = spec.scale;
    p.softcap = spec.softcap;
    p.dropout = spec.dropout_p > 0;
    if (p.dropout) set_dropout();
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
    if (operands.key_begin) {
        p.key_ranges = {key_range(*operands.key_begin, "key_begin"),
                        key_range(*operands.key_end, "key_end")};
    }
    if (operands.alibi_slopes) {
        const Tensor& t = *operands.alibi_slopes;
        check_cpu(t, "alibi_slopes");
        CHECK(t.scalar_type() == ScalarType::Float &&
                  (t.dim() == 1 || (t.dim() == 2 && t.size(0) == entries)) &&
                  t.size(t.dim() - 1) == q.size(1),
              "alibi_slopes must be float32 [", q.size(1), "] or [", entries, ", ", q.size(1),
              "], got shape ", shape_of(t));
        const float* from = static_cast<const float*>(t.data_ptr());
        for (int64_t e = 0; e < (t.dim() == 2 ? entries : 1); e++)
            for (int64_t h = 0; h < q.size(1); h++)
                slopes.push_back(
                    from[(t.dim() == 2 ? e * t.stride(0) : 0) + h * t.stride(t.dim() - 1)]);
        p.slopes = slopes.data();
        p.slopes_batch = t.dim() == 2 ? q.size(1) : 0;
    }
    if (sinks) {
        auto dtype = dtype_of(*sinks);
        check_cpu(*sinks, "sinks");
        CHECK(dtype && *dtype != Dtype::BOOL && sinks->dim() == 1 && sinks->size(0) == q.size(1),
              "sinks must be a floating-point tensor [", q.size(1), "], got shape ",
              shape_of(*sinks));
        p.sinks = heads4(*sinks);
    }
    if (operands.page_table) {
        p.page_table = page_entries.data();
        p.page_table_row = page_columns;
        p.page_size = std::max(1, static_cast<int>(k.size(2)));
    }
    set_tangents();
    p.segments = segments.data();
}

}  // namespace fastattn::cpu
