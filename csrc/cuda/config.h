// How the CUDA kernels work: tile sizes, stages, registers and schedules, in one table an
// architecture, by head dimension. next: forward_sm90.cuh
#pragma once
#include "../spec.h"

namespace fastattn::cuda {

// Whether the registers that warpgroups ask for by setmaxnreg are there. A CTA is launched with the
// same number for each thread: its share of 65536, rounded down to a multiple of 8, at most 255.
constexpr bool registers_fit(int threads, int producer, int consumers, int consumer) {
    return producer + consumers * consumer <= threads / 128 * imin(255, 65536 / threads / 8 * 8);
}

enum class Schedule {
    OVERLAP,   // scores of tile n and the output of tile n + 1 are in flight beside the softmax
    PINGPONG,  // the same, and warpgroups issue in ping-pong order
    SEQUENCE   // nothing overlaps within a warpgroup, only with the products of the others
};

// The forward on sm_90. A tile has 64 query rows for each consumer warpgroup. BYTES: of an element.
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

// FP8. The producer's warpgroup also transposes values (transpose_fp8.cuh), in tiles of 128 keys.
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
    static constexpr Schedule SCHEDULE = Schedule::SEQUENCE;  // an overlap would spill registers
};

// The forward on sm_80: WARPS warps of BLOCKS blocks of 16 rows, and STAGES tiles of keys and of
// values in shared memory. All fit the 99 KB of sm_86 and sm_89. With two blocks a warp, each
// fragment of keys or values that is read serves two products. FEW: tiles for few rows, where the
// time goes into waiting for memory: with two stages, the next tiles are loaded while one is in
// use.
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

// The backward on sm_90. A tile has 128 keys, 64 for each of two warpgroups. At D 128 a thread has
// 32 registers of scores and 32 of dprobs, 64 of dk, 64 of dv and 32 of dq. ROUND_PROBS_EARLY:
// probs are rounded to fragments before the product that makes dprobs has ended, so that the
// exponentials run beside it.
template <> struct BackwardConfig<64> {
    static constexpr int BLOCK_Q = 128, BLOCK_KV = 128, DOUT_STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool HALF_COLUMNS = false;
    static constexpr bool ROUND_PROBS_EARLY = false;  // it would spill
};
template <> struct BackwardConfig<128> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 128, DOUT_STAGES = 2;
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr bool HALF_COLUMNS = false;
    static constexpr bool ROUND_PROBS_EARLY = true;
};
// dk and dv of 64 keys would take 256 registers a thread, so each warpgroup has half of their
// columns for all of the tile's 64 keys: 64 + 64 registers of dk and dv, 64 of dq, and 16 + 16 of
// scores and dprobs, which are of half of the rows.
template <> struct BackwardConfig<256> {
    static constexpr int BLOCK_Q = 64, BLOCK_KV = 64, DOUT_STAGES = 1;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    static constexpr bool HALF_COLUMNS = true;
    static constexpr bool ROUND_PROBS_EARLY = true;
};

// The shared memory that a CTA can have, in bytes: LARGE on sm_80, sm_90 and sm_100, SMALL on all
// others from sm_80 on.
enum class Memory { LARGE, SMALL };
constexpr FASTATTN_HD int shared_memory(Memory memory) {
    return memory == Memory::LARGE ? 166912 : 101376;
}

// The backward on sm_80: STAGES tiles of query rows are in shared memory. Scores, dk and dv take
// 192 registers a thread, and so do dq, dk and dv: 8 warps fill a multiprocessor. D 256 fits LARGE
// only.
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
