// What the CUDA kernels are told: pointers, shapes and the call's numbers (where), and tile sizes
// and schedules by head dimension (how). next: forward_sm90.cuh
#pragma once
#include "../spec.h"
#include "ptx.cuh"

namespace fastattn::cuda {

enum class SinkType { NONE, F32, BF16, F16 };

struct ForwardParams {
    TensorMap q, k, v, out;          // dimensions (D, rows, heads, batch), boxes of 64 columns
    float* lse;                      // [batch, heads, q_len]
    const int *kv_lens, *kv_starts;  // [batch] or null
    const void* sinks;               // [heads]
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

enum class Schedule {
    OVERLAP,  // the products of a step are issued before the softmax of the step before
    PINGPONG  // and warpgroups take turns at issuing
};

// Tiles of BLOCK_Q rows, 64 for each consumer warpgroup, and BLOCK_KV keys.
template <int D> struct ForwardConfig;

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

}  // namespace fastattn::cuda
