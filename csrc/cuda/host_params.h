// From a call's tensors, as the host has them, to the parameters of kernels: shapes, numbers and,
// for sm_90, tensor maps. Shared by the launches on a GPU and by the emulator.
// next: params.h, host_params80.h
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "params.h"

namespace fastattn::cuda {

// How many tiles a head's rows are cut into; with cu_seqlens, how many slots (varlen.cuh).
inline int tiles_of(int64_t rows, int block, const int* cu, int sequences) {
    return static_cast<int>(cu ? rows / block + sequences + 1 : (rows + block - 1) / block);
}

// A tensor [batch, heads, rows, D]; strides in elements, that of D is 1.
struct TensorView {
    void* data;
    int64_t batch, heads, rows, head_dim;
    int64_t batch_stride, head_stride, row_stride;
    int64_t bytes;  // of an element: 2, or 1 for FP8
};

inline Rows rows_of(const TensorView& x) {
    return {static_cast<uint16_t*>(x.data), x.batch_stride, x.head_stride, x.row_stride};
}

// A call as the host has it: what both passes need.
struct Call {
    TensorView q, k, v, out;
    const int *kv_lens, *kv_starts;
    const int *cu_q, *cu_k;  // [sequences + 1], of documents [batch, sequences + 1]; or null
    int sequences;           // in one row of cu_q
    bool documents;          // cu_q has a row for each batch entry
    const void* sinks;       // [heads] or null
    SinkType sink_type;
    double scale, softcap;
    int64_t left, right;
    bool align_end;
};

struct ForwardCall : Call {
    float* lse;  // [batch, heads, q_len], contiguous
    // On sm_80: the page table, int32 [batch or sequences, pages], and the stride of its rows; or
    // null.
    const int* page_table;
    int64_t pages, page_row;
    // On sm_80: how many splits of the keys are asked for (0: as many as fill the GPU), and their
    // results, of split_sizes().
    int splits;
    float *split_out, *split_lse;
    Descale q_descale, k_descale, v_descale;  // of FP8

    int64_t keys() const { return page_table ? pages * k.rows : k.rows; }
};

struct BackwardCall : Call {
    TensorView dout, dq, dk, dv;
    const float *lse, *dlse;  // [batch, heads, q_len], contiguous; dlse may be null
    // Working memory of BackwardSizes; dq_sums, semaphores and large are zeros at first.
    float *lse2, *delta, *dq_sums;
    int *semaphores, *large;
    float* dsinks;  // [heads], or null. sinks are read for it alone: lse has them already
};

// How many elements each part of a BackwardCall's working memory has. rows is lse2's and delta's.
struct BackwardSizes {
    int64_t rows, dq_sums, semaphores, large;

    template <class F>
    static BackwardSizes of(const TensorView& q, const int* cu_q, int sequences) {
        int64_t tiles = q.batch * q.heads * tiles_of(q.rows, F::BLOCK_Q, cu_q, sequences);
        return {tiles * F::BLOCK_Q, tiles * F::BLOCK_Q * F::D, tiles * F::DQ_SLICES,
                q.batch * q.heads};
    }
};

// Why neither TMA nor cp.async can read this tensor, in a sentence; "" if they can.
inline std::string why_not_tma(const TensorView& x, const char* name) {
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

// Whether elements of x share memory, as after expand(). A tensor map with a stride of 0 has never
// been tried on a driver, so none is made: join_expanded_heads() or a copy removes the stride.
inline bool is_expanded(const TensorView& x) {
    return (x.rows > 1 && x.row_stride == 0) || (x.heads > 1 && x.head_stride == 0) ||
           (x.batch > 1 && x.batch_stride == 0);
}

// Makes one kv head of a head that was expanded to several: all query heads then share it, and no
// copy is needed. Not where there are descales, which may differ from head to head.
inline void join_expanded_heads(ForwardCall& c) {
    TensorView k = c.k, v = c.v;
    if (k.heads <= 1 || k.head_stride || v.head_stride) return;
    if (c.q_descale.data || c.k_descale.data || c.v_descale.data) return;
    k.heads = v.heads = 1;
    if (is_expanded(k) || is_expanded(v)) return;
    c.k = k;
    c.v = v;
}

// Makes the map of x for boxes of box_rows rows and 128 bytes. Encode is the driver's
// cuTensorMapEncodeTiled or the emulator's. Returns "" or what went wrong, as all below do.
template <class Encode>
std::string tensor_map(TensorMap& map, const TensorView& x, int box_rows, Encode encode) {
    if (is_expanded(x)) return "a tensor map is asked for of an expanded tensor";
    uint64_t sizes[4], strides[3];
    uint32_t box[4] = {static_cast<uint32_t>(128 / x.bytes), static_cast<uint32_t>(box_rows), 1, 1};
    const int64_t shape[4] = {x.head_dim, x.rows, x.heads, x.batch};
    const int64_t steps[3] = {x.row_stride, x.head_stride, x.batch_stride};
    for (int i = 0; i < 4; i++) sizes[i] = static_cast<uint64_t>(shape[i]);
    // torch may leave any stride in a dimension of size 1, where it has no meaning.
    for (int i = 0; i < 3; i++)
        strides[i] = static_cast<uint64_t>((shape[i + 1] == 1 ? x.head_dim : steps[i]) * x.bytes);
    return encode(map, x.data, static_cast<int>(x.bytes), sizes, strides, box);
}

// The numbers that make base-2 scores of q k: multiplier * (q k), or multiplier * transform(q k).
inline void set_scale(Shape& p, double scale, double softcap) {
    double base2 = scale * LOG2E, steepest = 0x1p127;  // 0 times infinity would be NaN
    p.softcap = softcap > 0;
    p.transform = p.softcap || scale <= 0 || base2 > MAX_MULTIPLIER;
    p.multiplier = static_cast<float>(p.transform ? 1 : base2);
    p.before = static_cast<float>(
        p.softcap ? std::max(-steepest, std::min(steepest, 2 * base2 / softcap)) : 0);
    p.after = static_cast<float>(p.softcap ? softcap * LOG2E : base2);
}

inline void set_shape(Shape& p, const Call& c) {
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

// Query heads whose keys and values fit into L2 together: of kv heads the largest power of two that
// takes at most 32 MB, of the 50 MB that an H100 has.
inline int heads_per_section(const ForwardCall& c) {
    int64_t all = c.q.batch * c.q.heads, group = c.q.heads / c.k.heads;
    int64_t bytes = 2 * c.k.bytes * c.keys() * c.k.head_dim;  // of one head of k and of v
    int64_t kv_heads = 1;
    while (2 * kv_heads * bytes <= int64_t(32) << 20 && kv_heads * group < all) kv_heads *= 2;
    return static_cast<int>(std::min(all, kv_heads * group));
}

// All that forward kernels share. p.pack_gqa is set already; tiles have block_q rows.
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

// All that backward kernels share.
template <class F> void set_backward(BackwardShape& p, const BackwardCall& c) {
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

template <class F> PrePostParams pre_post_params(const BackwardCall& c) {
    PrePostParams p{};
    p.out = rows_of(c.out);
    p.dout = rows_of(c.dout);
    p.dq = rows_of(c.dq);
    p.lse = c.lse;
    p.dlse = c.dlse;
    p.lse2 = c.lse2;
    p.delta = c.delta;
    p.large = c.large;
    p.dq_sums = c.dq_sums;
    p.cu_q = c.cu_q;
    p.sequences = c.sequences;
    p.batch = static_cast<int>(c.q.batch);
    p.heads = static_cast<int>(c.q.heads);
    p.kv_heads = static_cast<int>(c.k.heads);
    p.q_len = static_cast<int>(c.q.rows);
    p.rows = tiles_of(c.q.rows, F::BLOCK_Q, c.cu_q, c.sequences) * F::BLOCK_Q;
    p.scale = static_cast<float>(c.scale);
    p.sinks = c.sinks;
    p.sink_type = c.sink_type;
    p.dsinks = c.dsinks;
    return p;
}

}  // namespace fastattn::cuda
