// What the CUDA kernels are told: pointers, shapes and the call's numbers (where), and tile sizes
// and schedules by head dimension (how). next: forward_sm90.cuh
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
    int entry;

    FASTATTN_DEVICE float of(int batch, int head) const {
        return data ? ld_global(data + static_cast<int64_t>(batch) * entry + head) : 1;
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
    const int *cu_q, *cu_k;          // [batch, sequences + 1] or null, see packed.cuh
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
    static constexpr int pack = 1;
    static constexpr const int* page_table = nullptr;
};

// On sm_80: also heads that share tiles (work.cuh), keys in pages, and keys in parts.
struct ForwardParams80 : ForwardShape {
    Rows q, k, v, out;
    int pack;
    const int* page_table;  // [batch or sequences, page_row]; null: k and v are not in pages
    int64_t page_row;       // else their batch is pages, their rows a page's
    int page_size;
    int splits;                  // parts of each tile's keys
    float *part_out, *part_lse;  // [splits, batch, heads, q_len, D or 1], where there are parts
};

// Parts, each normalised by itself, become out and lse.
struct CombineParams {
    const float *part_out, *part_lse;
    int splits;
    Rows out;
    float* lse;
    int batch, heads, q_len;
    const void* sinks;  // [heads]
    SinkType sink_type;
};

// From here on (in base 2) the rounding of lse is 2^-9 of a weight, and grows with it:
// exp2(score - lse) is clamped to 1. Below, a weight above 1 by that little harms nothing, and the
// full tiles are spared the test.
constexpr float LARGE_LSE = 16384;

// A larger scale (in base 2) is applied to scores before the softmax, not within its exponent: that
// is one fused operation, score * multiplier - largest, of which the first product is not rounded
// and the second has been. The largest weight is 2^(that rounding), infinite for scores past 2^31.
constexpr float MAX_MULTIPLIER = 1024;

// Of the kernels' tanh, 1 - 2 / (e^2x + 1), the rounding is that of 1, and the cap multiplies it.
// The backward divides a logarithm's rounding by the cap.
constexpr double MIN_CUDA_SOFTCAP = 0.01, MAX_CUDA_SOFTCAP = 1000;

// What all backward kernels are told.
struct BackwardShape {
    const float *lse, *delta;        // [batch, heads, q_tiles * BLOCK_Q], see backward_rows.cuh
    float* dq_sums;                  // [batch, heads, q_tiles, BLOCK_Q * D], zeros at first
    int* turns;                      // [batch, heads, q_tiles, PARTS], zeros; null: any order
    const int* large;                // [batch, kv_heads]: 1 where some |lse| is at least LARGE_LSE
    const int *kv_lens, *kv_starts;  // [batch], or [sequences], or null
    const int *cu_q, *cu_k;          // [batch, sequences + 1] or null, see packed.cuh
    int sequences;
    bool documents;  // or else batch is 1
    int batch, heads, kv_heads, q_len, kv_len;
    int left, right;
    bool align_end;
    bool transform, softcap;
    float multiplier, before, after, scale;
    int q_tiles, kv_tiles;  // of a head; of sequences, slots (packed.cuh)
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

// What a warpgroup gets of what others give up comes out of what the CTA was launched with: as many
// registers as its threads leave for each, in eights.
constexpr bool registers_fit(int threads, int producer, int consumers, int consumer) {
    return producer + consumers * consumer <= threads / 128 * imin(255, 65536 / threads / 8 * 8);
}

enum class Schedule {
    OVERLAP,   // the products of a step are issued before the softmax of the step before
    PINGPONG,  // and warpgroups take turns at issuing
    SEQUENCE   // one after the other: a softmax runs beside the products of other warpgroups
};

// Tiles of BLOCK_Q rows, 64 for each consumer warpgroup, and BLOCK_KV keys. BYTES: of an element.
template <int D, int BYTES = 2> struct ForwardConfig;

template <> struct ForwardConfig<64> {
    static constexpr int CONSUMERS = 3, BLOCK_KV = 128, STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;
    static constexpr bool OUT_IN_Q = false;  // the output is staged in q's memory
    static constexpr Schedule SCHEDULE = Schedule::PINGPONG;
};
template <> struct ForwardConfig<128> {
    static constexpr int CONSUMERS = 2, BLOCK_KV = 128, STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool OUT_IN_Q = false;
    static constexpr Schedule SCHEDULE = Schedule::PINGPONG;
};
template <> struct ForwardConfig<256> {
    static constexpr int CONSUMERS = 2, BLOCK_KV = 80, STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool OUT_IN_Q = true;  // 224 of 227 KB are q, k and v
    static constexpr Schedule SCHEDULE = Schedule::OVERLAP;
};

// Of 8 bits. The producer's warpgroup turns values too (turn.cuh), in tiles of 128 keys.
template <> struct ForwardConfig<64, 1> {
    static constexpr int CONSUMERS = 3, BLOCK_KV = 128, STAGES = 4;
    static constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;
    static constexpr bool OUT_IN_Q = false;
    static constexpr Schedule SCHEDULE = Schedule::PINGPONG;
};
template <> struct ForwardConfig<128, 1> {
    static constexpr int CONSUMERS = 2, BLOCK_KV = 128, STAGES = 4;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static constexpr bool OUT_IN_Q = false;
    static constexpr Schedule SCHEDULE = Schedule::PINGPONG;
};
template <> struct ForwardConfig<256, 1> {
    static constexpr int CONSUMERS = 2, BLOCK_KV = 128, STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static constexpr bool OUT_IN_Q = false;                   // 224 of 227 KB are used
    static constexpr Schedule SCHEDULE = Schedule::SEQUENCE;  // registers are for no more
};

// On sm_80: WARPS warps of BLOCKS times 16 rows, tiles of BLOCK_KV keys, STAGES tiles of keys and
// of values in shared memory. All fit the 99 KB of sm_86 and sm_89; with 32 rows a warp, a fragment
// of keys or values that is read serves two products. FEW: for few rows, where all is waiting for
// memory: the next tiles are on their way while one is in use.
template <int D, bool FEW> struct ForwardConfig80;

template <> struct ForwardConfig80<64, false> {
    static constexpr int WARPS = 4, BLOCKS = 2, BLOCK_KV = 64, STAGES = 1;
};
template <> struct ForwardConfig80<128, false> {
    static constexpr int WARPS = 4, BLOCKS = 2, BLOCK_KV = 64, STAGES = 1;
};
template <> struct ForwardConfig80<256, false> {
    static constexpr int WARPS = 8, BLOCKS = 1, BLOCK_KV = 32, STAGES = 1;
};
template <int D> struct ForwardConfig80<D, true> {
    static constexpr int WARPS = 4, BLOCKS = 1, BLOCK_KV = D == 256 ? 32 : 64, STAGES = 2;
};

template <int D> struct BackwardConfig;

// 128 keys, 64 for each of two warpgroups. With 64 rows at D 128: 32 + 32 registers of scores,
// 64 + 64 of dk and dv, 32 of dq.
template <> struct BackwardConfig<64> {
    static constexpr int BLOCK_Q = 128, BLOCK_KV = 128, DOUT_STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool HALF_COLUMNS = false;
    static constexpr bool PACK_EARLY = false;  // would spill
};
template <> struct BackwardConfig<128> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 128, DOUT_STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool HALF_COLUMNS = false;
    static constexpr bool PACK_EARLY = true;  // exponentials beside the product of dweights
};
// dk and dv of 64 keys would be 256 registers: a warpgroup has half of their columns, for all of 64
// keys. 16 + 16 registers of scores, of half of the rows; 64 + 64 of dk and dv, 64 of dq.
template <> struct BackwardConfig<256> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 64, DOUT_STAGES = 1;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static constexpr bool HALF_COLUMNS = true;
    static constexpr bool PACK_EARLY = true;
};

// Shared memory that a CTA can have: on sm_80, 90 and 100; on all others from sm_80 on.
enum class Memory { LARGE, SMALL };
constexpr FASTATTN_HD int shared_memory(Memory memory) {
    return memory == Memory::LARGE ? 166912 : 101376;
}

// STAGES: tiles of rows in shared memory. With 192 registers of scores, dk and dv, or of dq, dk and
// dv, 8 warps fill a multiprocessor. D 256 needs large memory.
template <int D, Memory MEMORY> struct BackwardConfig80;

template <> struct BackwardConfig80<64, Memory::LARGE> {
    static constexpr int BLOCK_Q = 128, BLOCK_KV = 128, STAGES = 2;
};
template <> struct BackwardConfig80<64, Memory::SMALL> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 128, STAGES = 2;
};
template <> struct BackwardConfig80<128, Memory::LARGE> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 128, STAGES = 2;
};
template <> struct BackwardConfig80<128, Memory::SMALL> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 64, STAGES = 1;
};
template <> struct BackwardConfig80<256, Memory::LARGE> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 64, STAGES = 1;
};

}  // namespace fastattn::cuda
