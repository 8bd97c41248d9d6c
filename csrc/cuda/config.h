// How the CUDA kernels work: tile sizes, stages, registers and schedules, in one table an
// architecture, by head dimension. next: forward_sm90.cuh
#pragma once
#include "../spec.h"

namespace fastattn::cuda {

// What a warpgroup gets of what others give up comes out of what the CTA was launched with: as many
// registers as its threads leave for each, in eights.
constexpr bool registers_fit(int threads, int producer, int consumers, int consumer) {
    return producer + consumers * consumer <= threads / 128 * imin(255, 65536 / threads / 8 * 8);
}

enum class Schedule {
    OVERLAP,   // the products of a step are issued before the softmax of the step before
    PINGPONG,  // and warpgroups take semaphores at issuing
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

// Of 8 bits. The producer's warpgroup transposes values too (transpose_fp8.cuh), in tiles of 128 keys.
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
    static constexpr bool PACK_EARLY = true;  // exponentials beside the product of dprobs
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
