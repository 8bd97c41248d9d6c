// Where the data of a call lies: the structs that kernels take as parameters, with their pointers,
// strides, shapes and numbers. How the kernels work on it is in config.h. next: config.h
#pragma once
#include "../spec.h"
#include "ptx.cuh"

namespace fastattn::cuda {

enum class SinkType { NONE, F32, BF16, F16 };

// The logit of a head's sink; -inf where the call has no sinks.
FASTATTN_DEVICE float sink_of(const void* sinks, SinkType type, int head) {
    switch (type) {
        case SinkType::F32:
            return ld_global(static_cast<const float*>(sinks) + head);
        case SinkType::BF16:
            return widen<Bf16>(ld_global(static_cast<const uint16_t*>(sinks) + head));
        case SinkType::F16:
            return widen<Fp16>(ld_global(static_cast<const uint16_t*>(sinks) + head));
        default:
            return -__builtin_huge_valf();
    }
}

// The scales of an FP8 tensor: a value is what is stored times the scale of its kv head. float32,
// [kv_heads] for all sequences, or [batch or sequences, kv_heads]; null stands for 1.
struct Descale {
    const float* data;
    int stride;  // from one sequence's scales to the next: kv_heads, or 0 for one row of scales

    FASTATTN_DEVICE float of(int lengths_index, int head) const {
        return data ? ld_global(data + static_cast<int64_t>(lengths_index) * stride + head) : 1;
    }
};

// A tensor [batch, heads, rows, D] of 16-bit elements; strides in elements, that of D is 1.
struct Rows {
    uint16_t* data;
    int64_t batch, head, row;

    FASTATTN_DEVICE uint16_t* at(int b, int h, int r) const {
        return data + b * batch + h * head + r * row;
    }
};

// What every kernel of both passes is told: which keys a row sees, shapes, and how q k becomes a
// score.
struct Shape {
    const int *kv_lens, *kv_starts;  // [batch], of varlen [sequences]; or null
    const int *cu_q, *cu_k;  // [sequences + 1], of documents [batch, sequences + 1]; or null
    int sequences;           // in one row of cu_q (varlen.cuh)
    bool documents;          // cu_q has a row for each batch entry; otherwise batch is 1
    int batch, heads, kv_heads, q_len, kv_len;
    int left, right;  // of Band
    bool align_end;
    bool transform, softcap;          // a score in base 2 is transform(q k) * multiplier,
    float multiplier, before, after;  // see Transform in softmax.cuh
    int q_tiles;                      // of one head; with cu_q, slots (varlen.cuh)
};

// What all forward kernels are told.
struct ForwardShape : Shape {
    float* lse;         // [batch, heads, q_len]
    const void* sinks;  // [heads]
    SinkType sink_type;
    int tiles;              // of the whole call
    int heads_per_section;  // heads that run side by side, so that L2 holds their keys and values
};

struct ForwardParams : ForwardShape {
    TensorMap q, k, v, out;  // dimensions (D, rows, heads, batch), boxes of 128 bytes a row
    Rows out_rows;  // for a tile that ends inside the next sequence: TMA would overwrite it
    Descale q_descale, k_descale, v_descale;  // read where q, k and v are FP8
    static constexpr int pack_gqa = 1;
    static constexpr const int* page_table = nullptr;
};

// The sm_80 kernels can also pack the query heads of a group into one tile (work.cuh), read keys
// from pages, and split the keys of a tile among CTAs.
struct ForwardParams80 : ForwardShape {
    Rows q, k, v, out;
    int pack_gqa;           // query heads that share a tile
    const int* page_table;  // [batch or sequences, pages]; null: k and v are not in pages.
    int64_t page_row;       // The stride of its rows. With pages, the batch of k and v is pages,
    int page_size;          // and their rows are the keys of one page.
    int splits;
    float *split_out, *split_lse;  // [splits, batch, heads, q_len, D or 1], where splits > 1
};

// The results of the splits, each normalised by itself, become out and lse.
struct CombineParams {
    const float *split_out, *split_lse;
    int splits;
    Rows out;
    float* lse;
    int batch, heads, q_len;
    const void* sinks;  // [heads]
    SinkType sink_type;
};

// What all backward kernels are told.
struct BackwardShape : Shape {
    const float *lse, *delta;  // [batch, heads, q_tiles * BLOCK_Q], of backward_prepost.cuh
    float* dq_sums;            // [batch, heads, q_tiles, BLOCK_Q * D], zeros at first
    int* semaphores;   // [batch, heads, q_tiles, DQ_SLICES], zeros at first; null: add in any order
    const int* large;  // [batch, kv_heads]: 1 where some |lse| is at least LARGE_LSE
    float scale;
    int kv_tiles;  // of one head; with cu_k, slots (varlen.cuh)
};

struct BackwardParams : BackwardShape {
    TensorMap q, k, v, dout, dk, dv;
    Rows dk_rows, dv_rows;  // for a tile that ends inside the next sequence
};

struct BackwardParams80 : BackwardShape {
    Rows q, k, v, dout, dk, dv;
};

// What the kernels before and after the backward are told (backward_prepost.cuh).
struct PrePostParams {
    Rows out, dout, dq;
    const float *lse, *dlse;  // [batch, heads, q_len]; dlse may be null
    float *lse2, *delta;      // [batch, heads, rows]: padded, so that each tile can be read whole
    int* large;               // as BackwardShape's
    const float* dq_sums;
    const int* cu_q;
    int sequences, batch, heads, kv_heads, q_len, rows;
    float scale;
    const void* sinks;  // [heads]
    SinkType sink_type;
    float* dsinks;  // [heads], or null
};

// ---- limits of the numbers ---------------------------------------------------------------------

// The backward computes probs as exp2(score - lse). In base 2, an lse of this size is rounded by up
// to 2^-9, and a larger one by more, so that a prob could exceed 1: then it is clamped to 1. Below
// this size the excess is harmless, and tiles without a mask are spared the clamp.
constexpr float LARGE_LSE = 16384;

// A scale above this (in base 2) is applied to the scores before the softmax, not within its
// exponent. The exponent is one fused multiply-add, score * multiplier - row_max: its product is
// not rounded, but row_max has been. So the largest prob is 2^(that rounding), which would be
// infinite for scores past 2^31.
constexpr float MAX_MULTIPLIER = 1024;

// The kernels compute tanh as 1 - 2 / (e^2x + 1), whose rounding is that of 1, and the cap
// multiplies it. The backward divides the rounding of a logarithm by the cap.
constexpr double MIN_CUDA_SOFTCAP = 0.01, MAX_CUDA_SOFTCAP = 1000;

}  // namespace fastattn::cuda
