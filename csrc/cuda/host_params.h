// From a call's tensors to ForwardParams: tensor maps, schedule. Shared by ops.cu, which
// launches on a GPU, and the emulator's host. next: forward_sm90.cuh
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "params.h"

namespace fastattn::cuda {

// Tiles of a head; of packed sequences, slots (varlen.cuh).
inline int tiles_of(int64_t rows, int block, const int* cu, int sequences) {
    return static_cast<int>(cu ? rows / block + sequences + 1 : (rows + block - 1) / block);
}

// A tensor [batch, heads, rows, D]; strides in elements, that of D is 1.
struct Operand {
    void* data;
    int64_t batch, heads, rows, head_dim;
    int64_t batch_stride, head_stride, row_stride;
    int64_t bytes;  // of an element: 2, or 1 for e4m3
};

inline Rows rows_of(const Operand& x) {
    return {static_cast<uint16_t*>(x.data), x.batch_stride, x.head_stride, x.row_stride};
}

struct ForwardCall {
    Operand q, k, v, out;
    float* lse;  // [batch, heads, q_len], contiguous
    const int *kv_lens, *kv_starts;
    const int *cu_q, *cu_k;  // [batch, sequences + 1] or null
    int sequences;           // or, of each entry, documents
    bool documents;
    const void* sinks;
    SinkType sink_type;
    double scale, softcap;
    int64_t left, right;
    bool align_end;
    // On sm_80: int32 [batch or sequences, pages] and its stride, or null; parts of the keys, 0: as
    // many as fill the GPU; and what they need, see forward_plan.
    const int* page_table;
    int64_t pages, page_row;
    int splits;
    float *split_out, *split_lse;
    Descale q_descale, k_descale, v_descale;  // of e4m3

    int64_t keys() const { return page_table ? pages * k.rows : k.rows; }
};

struct BackwardCall {
    Operand q, k, v, out, dout, dq, dk, dv;
    const float *lse, *dlse;  // [batch, heads, q_len], contiguous; dlse may be null
    const int *kv_lens, *kv_starts;
    const int *cu_q, *cu_k;  // [batch, sequences + 1] or null
    int sequences;           // or, of each entry, documents
    bool documents;
    double scale, softcap;
    int64_t left, right;
    bool align_end;
    // Working memory, see BackwardSizes; sums, semaphores and large are zeros.
    float *lse2, *delta, *dq_sums;
    int *semaphores, *large;
    const void* sinks;  // [heads]; lse has them, and they are read for dsinks alone
    SinkType sink_type;
    float* dsinks;  // [heads] or null
};

// Numbers of elements of a BackwardCall's working memory.
struct BackwardSizes {
    int64_t rows, sums, semaphores, large;

    template <class F> static BackwardSizes of(const Operand& q, const int* cu_q, int sequences) {
        int64_t tiles = q.batch * q.heads * tiles_of(q.rows, F::BLOCK_Q, cu_q, sequences);
        return {tiles * F::BLOCK_Q, tiles * F::BLOCK_Q * F::D, tiles * F::DQ_SLICES,
                q.batch * q.heads};
    }
};

// "" or why neither TMA nor cp.async can read this tensor, in a sentence.
inline std::string why_not_tma(const Operand& x, const char* name) {
    std::string who = std::string(name);
    if (reinterpret_cast<uintptr_t>(x.data) % 16)
        return who + " does not start at a multiple of 16 bytes";
    for (auto [size, stride] : {std::pair{x.rows, x.row_stride}, std::pair{x.heads, x.head_stride},
                                std::pair{x.batch, x.batch_stride}}) {
        if (size > 1 && (stride < 0 || stride * x.bytes % 16))
            return who + " has a stride of " + std::to_string(stride) + " elements; multiples of " +
                   std::to_string(16 / x.bytes) + " are accepted";
        if (size > 1 && stride * x.bytes >= int64_t(1) << 40)
            return who + " has a stride of 2^40 bytes or more";
        if (size >= int64_t(1) << 31) return who + " has a dimension of 2^31 or more";
    }
    return "";
}

// Whether places of x share memory, as expand() leaves them. No driver has been asked what a tensor
// map makes of a stride of 0, so no map has one: such tensors are copied, or see below.
inline bool is_expanded(const Operand& x) {
    return (x.rows > 1 && x.row_stride == 0) || (x.heads > 1 && x.head_stride == 0) ||
           (x.batch > 1 && x.batch_stride == 0);
}

// One kv head that was expanded to several is one head again: all query heads then share it, and
// nothing need be copied. Scales of 8 bits belong to heads, and keep them apart.
inline void join_expanded_heads(ForwardCall& c) {
    Operand k = c.k, v = c.v;
    if (k.heads <= 1 || k.head_stride || v.head_stride) return;
    if (c.q_descale.data || c.k_descale.data || c.v_descale.data) return;
    k.heads = v.heads = 1;
    if (is_expanded(k) || is_expanded(v)) return;
    c.k = k;
    c.v = v;
}

// Encode is the driver's cuTensorMapEncodeTiled, or the emulator's: "" or what went wrong.
template <class Encode>
std::string tensor_map(TensorMap& map, const Operand& x, int box_rows, Encode encode) {
    if (is_expanded(x)) return "a tensor map is asked for of an expanded tensor";
    uint64_t sizes[4], strides[3];
    uint32_t box[4] = {static_cast<uint32_t>(128 / x.bytes), static_cast<uint32_t>(box_rows), 1, 1};
    const int64_t shape[4] = {x.head_dim, x.rows, x.heads, x.batch};
    const int64_t steps[3] = {x.row_stride, x.head_stride, x.batch_stride};
    for (int i = 0; i < 4; i++) sizes[i] = static_cast<uint64_t>(shape[i]);
    // The stride of a dimension of size 1 means nothing, and torch leaves anything there.
    for (int i = 0; i < 3; i++)
        strides[i] = static_cast<uint64_t>((shape[i + 1] == 1 ? x.head_dim : steps[i]) * x.bytes);
    return encode(map, x.data, static_cast<int>(x.bytes), sizes, strides, box);
}

// Scores are multiplier * (q k), or multiplier * transform(q k); exponents are base 2.
template <class Params> void set_scale(Params& p, double scale, double softcap) {
    double base2 = scale * LOG2E, steepest = 0x1p127;  // 0 times infinity would be NaN
    p.softcap = softcap > 0;
    p.transform = p.softcap || scale <= 0 || base2 > MAX_MULTIPLIER;
    p.multiplier = static_cast<float>(p.transform ? 1 : base2);
    p.before = static_cast<float>(
        p.softcap ? std::max(-steepest, std::min(steepest, 2 * base2 / softcap)) : 0);
    p.after = static_cast<float>(p.softcap ? softcap * LOG2E : base2);
}

template <class Params, class Call> void set_shape(Params& p, const Call& c) {
    constexpr int64_t FAR = int64_t(1) << 30;
    p.kv_lens = c.kv_lens;
    p.kv_starts = c.kv_starts;
    p.cu_q = c.cu_q;
    p.cu_k = c.cu_k;
    p.sequences = c.sequences;
    p.documents = c.documents;
    p.batch = static_cast<int>(c.q.batch);
    p.heads = static_cast<int>(c.q.heads);
    p.kv_heads = static_cast<int>(c.k.heads);
    p.q_len = static_cast<int>(c.q.rows);
    p.kv_len = static_cast<int>(c.k.rows);
    p.left = static_cast<int>(std::min(c.left, FAR));
    p.right = static_cast<int>(std::min(c.right, FAR));
    p.align_end = c.align_end;
    set_scale(p, c.scale, c.softcap);
}

// The largest power of two of heads whose keys and values fit in 32 of an H100's 50 MB of L2.
inline int heads_per_section(const ForwardCall& c) {
    int64_t all = c.q.batch * c.q.heads, group = c.q.heads / c.k.heads;
    int64_t bytes = 2 * c.k.bytes * c.keys() * c.k.head_dim;  // of one head of k and of v
    int64_t kv_heads = 1;
    while (2 * kv_heads * bytes <= int64_t(32) << 20 && kv_heads * group < all) kv_heads *= 2;
    return static_cast<int>(std::min(all, kv_heads * group));
}

// Tiles of block_q rows; of p, pack is known.
template <class Params> void set_forward(Params& p, const ForwardCall& c, int block_q) {
    p.lse = c.lse;
    p.sinks = c.sinks;
    p.sink_type = c.sink_type;
    set_shape(p, c);
    p.kv_len = static_cast<int>(c.keys());
    p.q_tiles = tiles_of(c.q.rows * p.pack_gqa, block_q, c.cu_q, c.sequences);
    p.tiles = p.q_tiles * (p.heads / p.pack_gqa) * p.batch;
    p.heads_per_section = heads_per_section(c) / p.pack_gqa;
}

template <class F, class Encode>
std::string forward_params(ForwardParams& p, const ForwardCall& c, Encode encode) {
    p = {};
    for (std::string error :
         {tensor_map(p.q, c.q, F::BLOCK_Q, encode), tensor_map(p.k, c.k, F::BLOCK_KV, encode),
          tensor_map(p.v, c.v, F::BLOCK_KV, encode), tensor_map(p.out, c.out, 64, encode)})
        if (!error.empty()) return error;
    p.out_rows = rows_of(c.out);
    p.q_descale = c.q_descale;
    p.k_descale = c.k_descale;
    p.v_descale = c.v_descale;
    set_forward(p, c, F::BLOCK_Q);
    return "";
}

// All but where the tensors are.
template <class F, class Params> void set_backward(Params& p, const BackwardCall& c) {
    p.lse = c.lse2;
    p.delta = c.delta;
    p.dq_sums = c.dq_sums;
    p.semaphores = c.semaphores;
    p.large = c.large;
    p.scale = static_cast<float>(c.scale);
    set_shape(p, c);
    p.q_tiles = tiles_of(p.q_len, F::BLOCK_Q, c.cu_q, c.sequences);
    p.kv_tiles = tiles_of(p.kv_len, F::BLOCK_KV, c.cu_k, c.sequences);
}

template <class F, class Encode>
std::string backward_params(BackwardParams& p, const BackwardCall& c, Encode encode) {
    p = {};
    for (std::string error :
         {tensor_map(p.q, c.q, F::BLOCK_Q, encode), tensor_map(p.dout, c.dout, F::BLOCK_Q, encode),
          tensor_map(p.k, c.k, F::BLOCK_KV, encode), tensor_map(p.v, c.v, F::BLOCK_KV, encode),
          tensor_map(p.dk, c.dk, 64, encode), tensor_map(p.dv, c.dv, 64, encode)})
        if (!error.empty()) return error;
    set_backward<F>(p, c);
    p.dk_rows = rows_of(c.dk);
    p.dv_rows = rows_of(c.dv);
    return "";
}

template <class F> BackwardRowsParams backward_rows_params(const BackwardCall& c) {
    int tiles = tiles_of(c.q.rows, F::BLOCK_Q, c.cu_q, c.sequences);
    return {rows_of(c.out),
            rows_of(c.dout),
            rows_of(c.dq),
            c.lse,
            c.dlse,
            c.lse2,
            c.delta,
            c.large,
            static_cast<int>(c.k.heads),
            c.dq_sums,
            c.cu_q,
            c.sequences,
            static_cast<int>(c.q.batch),
            static_cast<int>(c.q.heads),
            static_cast<int>(c.q.rows),
            tiles * F::BLOCK_Q,
            static_cast<float>(c.scale),
            c.sinks,
            c.sink_type,
            c.dsinks};
}

}  // namespace fastattn::cuda
