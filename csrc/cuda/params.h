// Where the data of a call lies: the structs that the CUDA kernels take as parameters, with their
// pointers, strides, shapes and numbers. How they work on it is in config.h. next: config.h
#pragma once
#include "../spec.h"
#include "ptx.cuh"

namespace fastattn::cuda {

enum class SinkType { NONE, F32, BF16, F16 };

// A head's sink, -inf where there is none.
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

// Scales of an 8-bit tensor, [kv_heads] for each entry, or (`entry` 0) for all; null: 1.
struct Descale {
    const float* data;
    int stride;

    FASTATTN_DEVICE float of(int lengths_index, int head) const {
        return data ? ld_global(data + static_cast<int64_t>(lengths_index) * stride + head) : 1;
    }
};

// Rows of a 16-bit tensor [batch, heads, rows, D]; strides in elements.
struct Rows {
    uint16_t* data;
    int64_t batch, head, row;

    FASTATTN_DEVICE uint16_t* at(int b, int h, int r) const {
        return data + b * batch + h * head + r * row;
    }
};

// What all forward kernels are told.
struct ForwardShape {
    float* lse;                      // [batch, heads, q_len]
    const int *kv_lens, *kv_starts;  // [batch], or [sequences], or null
    const int *cu_q, *cu_k;          // [batch, sequences + 1] or null, see varlen.cuh
    int sequences;
    bool documents;     // or else batch is 1
    const void* sinks;  // [heads]
    SinkType sink_type;
    int batch, heads, kv_heads, q_len, kv_len;
    int left, right;
    bool align_end;
    // Base-2 scores are transform(q k) * multiplier, see Transform.
    bool transform, softcap;
    float multiplier, before, after;
    int q_tiles, tiles;     // of a head; of the call
    int heads_per_section;  // heads that run side by side, so that L2 holds their keys and values
};

struct ForwardParams : ForwardShape {
    TensorMap q, k, v, out;  // dimensions (D, rows, heads, batch), boxes of 128 bytes a row
    Rows out_rows;           // where a tile ends inside a sequence's neighbour, TMA cannot store it
    Descale q_descale, k_descale, v_descale;  // read where q, k and v are of 8 bits
    static constexpr int pack_gqa = 1;
    static constexpr const int* page_table = nullptr;
};

// On sm_80: also heads that share tiles (work.cuh), keys in pages, and keys in parts.
struct ForwardParams80 : ForwardShape {
    Rows q, k, v, out;
    int pack_gqa;
    const int* page_table;  // [batch or sequences, page_row]; null: k and v are not in pages
    int64_t page_row;       // else their batch is pages, their rows a page's
    int page_size;
    int splits;                    // parts of each tile's keys
    float *split_out, *split_lse;  // [splits, batch, heads, q_len, D or 1], where there are parts
};

// Parts, each normalised by itself, become out and lse.
struct CombineParams {
    const float *split_out, *split_lse;
    int splits;
    Rows out;
    float* lse;
    int batch, heads, q_len;
    const void* sinks;  // [heads]
    SinkType sink_type;
};

// From here on (in base 2) the rounding of lse is 2^-9 of a prob, and grows with it:
// exp2(score - lse) is clamped to 1. Below, a prob above 1 by that little harms nothing, and the
// full tiles are spared the test.
constexpr float LARGE_LSE = 16384;

// A larger scale (in base 2) is applied to scores before the softmax, not within its exponent: that
// is one fused operation, score * multiplier - largest, of which the first product is not rounded
// and the second has been. The largest prob is 2^(that rounding), infinite for scores past 2^31.
constexpr float MAX_MULTIPLIER = 1024;

// Of the kernels' tanh, 1 - 2 / (e^2x + 1), the rounding is that of 1, and the cap multiplies it.
// The backward divides a logarithm's rounding by the cap.
constexpr double MIN_CUDA_SOFTCAP = 0.01, MAX_CUDA_SOFTCAP = 1000;

// What all backward kernels are told.
struct BackwardShape {
    const float *lse, *delta;        // [batch, heads, q_tiles * BLOCK_Q], see backward_prepost.cuh
    float* dq_sums;                  // [batch, heads, q_tiles, BLOCK_Q * D], zeros at first
    int* semaphores;                 // [batch, heads, q_tiles, DQ_SLICES], zeros; null: any order
    const int* large;                // [batch, kv_heads]: 1 where some |lse| is at least LARGE_LSE
    const int *kv_lens, *kv_starts;  // [batch], or [sequences], or null
    const int *cu_q, *cu_k;          // [batch, sequences + 1] or null, see varlen.cuh
    int sequences;
    bool documents;  // or else batch is 1
    int batch, heads, kv_heads, q_len, kv_len;
    int left, right;
    bool align_end;
    bool transform, softcap;
    float multiplier, before, after, scale;
    int q_tiles, kv_tiles;  // of a head; of sequences, slots (varlen.cuh)
};

struct BackwardParams : BackwardShape {
    TensorMap q, k, v, dout, dk, dv;
    Rows dk_rows, dv_rows;  // where a tile ends inside a sequence's neighbour
};

struct BackwardParams80 : BackwardShape {
    Rows q, k, v, dout, dk, dv;
};

// Before: lse in base 2, and delta; of them dsinks. After: dq of its sums.
struct BackwardRowsParams {
    Rows out, dout, dq;
    const float *lse, *dlse;  // [batch, heads, q_len]; dlse may be null
    float *lse2, *delta;      // [batch, heads, rows], rows beyond an entry's are written too
    int* large;               // as BackwardShape's
    int kv_heads;
    const float* dq_sums;
    const int* cu_q;  // [batch, sequences + 1] or null
    int sequences, batch, heads, q_len, rows;
    float scale;
    const void* sinks;  // [heads]
    SinkType sink_type;
    float* dsinks;  // [heads] or null
};

}  // namespace fastattn::cuda
