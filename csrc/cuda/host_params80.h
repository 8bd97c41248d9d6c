// From a call's tensors to the parameters of the sm_80 kernels: which query heads share a tile, and
// into how many splits the keys are cut. Shared by the launches on a GPU and by the emulator.
// next: forward_sm80.cuh, combine.cuh
#pragma once
#include "combine.cuh"
#include "host_params.h"

namespace fastattn::cuda {

constexpr int FEW_ROWS = 64, MANY_ROWS = 128;  // of a tile
constexpr int MIN_TILE_KEYS = 32;    // of the smallest tile: there are no more splits than tiles
constexpr int MIN_SPLIT_KEYS = 256;  // where the user names no number: smaller splits do not pay
constexpr int RESIDENT = 2;          // CTAs with tiles of FEW_ROWS that fit on a multiprocessor
// forward_plan's `idle`. On sm_90 the alternative to tiles of FEW_ROWS is wgmma, which is twice as
// fast, so that more multiprocessors may stay idle before it loses.
constexpr int IDLE_SM80 = 2, IDLE_SM90 = 4;

struct ForwardPlan {
    bool few;      // tiles have FEW_ROWS rows, else MANY_ROWS
    int pack_gqa;  // query heads that share a tile: 1, or all that share a kv head
    int splits;    // of each tile's keys
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles have few rows where a sequence has no more of them on average, or where large tiles would
// keep no more than one in `idle` multiprocessors busy. Only then are heads packed, where that
// makes fewer tiles, and keys split: as many times as is asked for, or until the GPU is full.
inline ForwardPlan forward_plan(const ForwardCall& c, int multiprocessors, int idle) {
    int64_t sequences = c.q.batch * std::max(c.sequences, 1);
    int64_t rows = ceil_div(c.q.rows, std::max(c.sequences, 1));
    auto tiles = [&](int block, int pack_gqa) {
        return sequences * (c.q.heads / pack_gqa) * ceil_div(rows * pack_gqa, block);
    };
    if (c.splits <= 1 && rows > FEW_ROWS && idle * tiles(MANY_ROWS, 1) > multiprocessors)
        return {false, 1, 1};
    int group = static_cast<int>(c.q.heads / c.k.heads);
    bool fits = c.q.rows * group < int64_t(1) << 30;
    int pack_gqa = fits && tiles(FEW_ROWS, group) < tiles(FEW_ROWS, 1) ? group : 1;
    int64_t keys = c.keys();
    if (c.left >= 0 && c.right >= 0)
        keys = std::min(keys, c.left + c.right + std::min<int64_t>(rows, FEW_ROWS));
    int64_t room = RESIDENT * multiprocessors / std::max<int64_t>(1, tiles(FEW_ROWS, pack_gqa));
    int64_t splits = c.splits > 0 ? std::min<int64_t>(c.splits, ceil_div(keys, MIN_TILE_KEYS))
                                  : std::min(room, keys / MIN_SPLIT_KEYS);
    return {true, pack_gqa, static_cast<int>(std::max<int64_t>(1, splits))};
}

// How many elements split_out and split_lse have.
inline std::pair<int64_t, int64_t> split_sizes(const ForwardCall& c, const ForwardPlan& plan) {
    int64_t rows = plan.splits > 1 ? plan.splits * c.q.batch * c.q.heads * c.q.rows : 0;
    return {rows * c.q.head_dim, rows};
}

template <class F> ForwardParams80 forward_params80(const ForwardCall& c, const ForwardPlan& plan) {
    static_assert(F::BLOCK_Q == (F::FEW ? FEW_ROWS : MANY_ROWS));
    ForwardParams80 p{};
    p.q = rows_of(c.q);
    p.k = rows_of(c.k);
    p.v = rows_of(c.v);
    p.out = rows_of(c.out);
    p.pack_gqa = plan.pack_gqa;
    p.page_table = c.page_table;
    p.page_row = c.page_row;
    p.page_size = static_cast<int>(c.k.rows);
    p.splits = plan.splits;
    p.split_out = c.split_out;
    p.split_lse = c.split_lse;
    set_forward(p, c, F::BLOCK_Q);
    return p;
}

inline int combine_grid(const ForwardCall& c) {
    return static_cast<int>(ceil_div(c.q.batch * c.q.heads * c.q.rows, COMBINE_ROWS));
}
inline CombineParams combine_params(const ForwardCall& c, const ForwardPlan& plan) {
    CombineParams p{};
    p.split_out = c.split_out;
    p.split_lse = c.split_lse;
    p.splits = plan.splits;
    p.out = rows_of(c.out);
    p.lse = c.lse;
    p.batch = static_cast<int>(c.q.batch);
    p.heads = static_cast<int>(c.q.heads);
    p.q_len = static_cast<int>(c.q.rows);
    p.sinks = c.sinks;
    p.sink_type = c.sink_type;
    return p;
}

template <class F> BackwardParams80 backward_params80(const BackwardCall& c) {
    BackwardParams80 p = {};
    p.q = rows_of(c.q);
    p.k = rows_of(c.k);
    p.v = rows_of(c.v);
    p.dout = rows_of(c.dout);
    p.dk = rows_of(c.dk);
    p.dv = rows_of(c.dv);
    set_backward<F>(p, c);
    return p;
}

}  // namespace fastattn::cuda
