// The backward pass on sm_80 and later. As on sm_90 a CTA has one tile of keys, walks over the
// tiles of rows that see them, of every query head that shares them, and keeps dk and dv in
// registers. Here all warps do the same work, and add dq from registers to fp32 sums in memory.
// next: mma.cuh, backward_tile.cuh, backward_prepost.cuh
//
// Probs and dscores go through shared memory, both before one barrier, so that each warp multiplies
// 32 rows in every product. With probs in registers it would multiply 16, and a step at D 128 would
// read 704 KB of shared memory in 5632 clocks, instead of 576 KB in 4608; its products take 5120.
#pragma once
#include "backward_tile.cuh"
#include "config.h"
#include "mma.cuh"

namespace fastattn::cuda {

// How eight warps share a product [ROWS x COLUMNS]: each has N columns of 32 rows, in two blocks of
// 16 rows.
template <int ROWS, int COLUMNS> struct WarpGrid {
    static constexpr int DOWN = ROWS / 32, ACROSS = 8 / DOWN, N = COLUMNS / ACROSS;
    static_assert(DOWN * 32 == ROWS && DOWN * ACROSS == 8 && N % 16 == 0);
    using Sums = float[2][N / 2];

    static constexpr FASTATTN_HD int row(int warp) { return warp % DOWN * 32; }
    static constexpr FASTATTN_HD int column(int warp) { return warp / DOWN * N; }

    // Which thread holds an element of the product, and in which of its registers.
    static constexpr FASTATTN_HD int thread_of(int row, int column) {
        return (column / N * DOWN + row / 32) * 32 + row % 8 * 4 + column % 8 / 2;
    }
    static constexpr FASTATTN_HD int register_of(int row, int column) {
        return row / 16 % 2 * (N / 2) + column % N / 8 * 4 + row / 8 % 2 * 2 + column % 2;
    }
};

template <class Element_, int D_, Memory MEMORY> struct Backward80 {
    using Element = Element_;
    using Config = BackwardConfig80<D_, MEMORY>;
    static constexpr int D = D_, BLOCK_Q = Config::BLOCK_Q, BLOCK_KV = Config::BLOCK_KV;
    static constexpr int STAGES = Config::STAGES, THREADS = 256;

    using KVTile = Tile<BLOCK_KV, D>;
    using QTile = Tile<BLOCK_Q, D>;
    using ScoreTile = Tile<BLOCK_KV, BLOCK_Q>;  // probs^T or dscores^T
    using Scores = WarpGrid<BLOCK_KV, BLOCK_Q>;
    using OfKeys = WarpGrid<BLOCK_KV, D>;  // dk, dv
    using OfRows = WarpGrid<BLOCK_Q, D>;   // dq

    // The fp32 sums of dq: one slice a tile of rows. The same register of all threads lies side by
    // side, so that a warp adds to 128 contiguous bytes.
    static constexpr int DQ_SLICES = 1;
    static constexpr FASTATTN_HD int sum_index(int row, int column) {
        return OfRows::register_of(row, column) * THREADS + OfRows::thread_of(row, column);
    }

    static constexpr int STATS = 4 * BLOCK_Q;  // bytes of lse or delta of a tile
    static constexpr int K_AT = 0, V_AT = KVTile::BYTES, Q_AT = 2 * KVTile::BYTES;
    static constexpr int DOUT_AT = Q_AT + STAGES * QTile::BYTES;
    static constexpr int PROBS_AT = DOUT_AT + STAGES * QTile::BYTES;
    static constexpr int DSCORES_AT = PROBS_AT + ScoreTile::BYTES;
    static constexpr int LSE_AT = DSCORES_AT + ScoreTile::BYTES;
    static constexpr int DELTA_AT = LSE_AT + STAGES * STATS;
    static constexpr int SHARED_BYTES = DELTA_AT + STAGES * STATS;
    static_assert(SHARED_BYTES + SHARED_ALIGNMENT <= shared_memory(MEMORY));
};

template <class F> struct BackwardCta {
    using Element = typename F::Element;
    using Scores = typename F::Scores;
    using OfKeys = typename F::OfKeys;
    using OfRows = typename F::OfRows;

    const BackwardParams80& p;
    SharedAddress shared;
    KeyWork w;
    Transform transform;
    int warp;

    FASTATTN_DEVICE typename F::KVTile keys() const { return {shared + F::K_AT}; }
    FASTATTN_DEVICE typename F::KVTile values() const { return {shared + F::V_AT}; }
    FASTATTN_DEVICE typename F::ScoreTile probs() const { return {shared + F::PROBS_AT}; }
    FASTATTN_DEVICE typename F::ScoreTile dscores() const { return {shared + F::DSCORES_AT}; }

    // A step: the query head, the tile of its rows, and the stage where they are in shared memory.
    struct Step {
        int head, tile, stage;
    };
    FASTATTN_DEVICE typename F::QTile q(Step at) const {
        return {shared + F::Q_AT + at.stage * F::QTile::BYTES};
    }
    FASTATTN_DEVICE typename F::QTile dout(Step at) const {
        return {shared + F::DOUT_AT + at.stage * F::QTile::BYTES};
    }
    FASTATTN_DEVICE SharedAddress lse(Step at) const {
        return shared + F::LSE_AT + at.stage * F::STATS;
    }
    FASTATTN_DEVICE SharedAddress delta(Step at) const {
        return shared + F::DELTA_AT + at.stage * F::STATS;
    }
    FASTATTN_DEVICE Step after(Step at) const {
        bool last = at.tile + 1 == w.end;
        return {at.head + last, last ? w.begin : at.tile + 1, (at.stage + 1) % F::STAGES};
    }

    // Copies row `row` + r of a head to row r of a tile, where r is in [first, last); zeros
    // elsewhere.
    template <class T> FASTATTN_DEVICE void copy(T tile, const Rows& from, int head, int row,
                                                 int first, int last) const {
        EvenRows rows{from.at(w.batch, head, row), from.row};
        copy_rows<F::THREADS>(tile, rows, first, last);
    }
    FASTATTN_DEVICE void load_keys(typename F::KVTile tile, const Rows& from) const {
        copy(tile, from, w.kv_head, w.key_in_k + w.key, w.first_key - w.key, w.keys - w.key);
    }
    FASTATTN_DEVICE void load_rows(Step at) const {
        int row = at.tile * F::BLOCK_Q, last = w.band.q_len - row;
        copy(q(at), p.q, at.head, w.row_in_q + row, 0, last);
        copy(dout(at), p.dout, at.head, w.row_in_q + row, 0, last);
        constexpr int CHUNKS = F::BLOCK_Q / 4;
        int chunk = thread_index() % CHUNKS;
        int64_t from = w.row_tile(p, at.head, at.tile) * F::BLOCK_Q + 4 * chunk;
        if (thread_index() < CHUNKS)
            copy_async(lse(at) + 16 * chunk, p.lse + from, true);
        else if (thread_index() < 2 * CHUNKS)
            copy_async(delta(at) + 16 * chunk, p.delta + from, true);
    }

    // Adds to the sums, with semaphores after the CTAs of earlier keys.
    FASTATTN_DEVICE void add_dq(const typename OfRows::Sums& dq, Step at) const {
        int64_t tile = w.row_tile(p, at.head, at.tile);
        float* sums = p.dq_sums + tile * F::BLOCK_Q * F::D + thread_index();
        if (p.semaphores) {
            int before = w.semaphore_value(at.tile, F::BLOCK_Q, F::BLOCK_KV);
            if (thread_index() == 0)
                while (ld_global_acquire(p.semaphores + tile) != before) pause();
            sync_block();
        }
#pragma unroll
        for (int i = 0; i < OfRows::N; i++)
            add_global(sums + i * F::THREADS, dq[i / (OfRows::N / 2)][i % (OfRows::N / 2)]);
        if (!p.semaphores) return;
        sync_block();
        if (thread_index() == 0) add_global_release(p.semaphores + tile, 1);
    }

    struct Sums {
        typename OfKeys::Sums dk, dv;
    };

    template <bool MASKED> FASTATTN_DEVICE void recompute_blocks(typename Scores::Sums& s, int row,
                                                                 int column, Step at) const {
        int key = w.key + row + lane_index() / 4;
#pragma unroll
        for (int i = 0; i < 2; i++)
            recompute_probs<MASKED>(s[i], transform, p.multiplier, w, key + 16 * i,
                                    at.tile * F::BLOCK_Q + column, lse(at) + 4 * column);
    }

    // Writes probs^T and dscores^T of a tile of rows to shared memory.
    FASTATTN_DEVICE void score(Step at) const {
        constexpr int FRAGMENTS = Scores::N / 16;
        int row = Scores::row(warp), column = Scores::column(warp);
        typename Scores::Sums s = {}, d = {};
        multiply_shared<Element, Major::K, Major::K>(s, keys(), row, q(at), column);
        if (at.tile >= w.full_begin && at.tile < w.full_end)
            recompute_blocks<false>(s, row, column, at);
        else
            recompute_blocks<true>(s, row, column, at);
        multiply_shared<Element, Major::K, Major::K>(d, values(), row, dout(at), column);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[FRAGMENTS][4];
            differentiate(d[i], s[i], transform, lse(at) + 4 * column, delta(at) + 4 * column);
            to_fragments<Element, Scores::N>(a, s[i]);
            write_fragments(probs(), row + 16 * i, column, a);
            to_fragments<Element, Scores::N>(a, d[i]);
            write_fragments(dscores(), row + 16 * i, column, a);
        }
    }

    FASTATTN_DEVICE void step(Sums& sums, Step at, bool more) {
        shared = opaque(shared);
        warp = opaque(warp);
        copy_wait<0>();
        sync_block();  // all copies have come, and the products of the last step are done
        if (F::STAGES > 1 && more) load_rows(after(at));
        copy_commit();
        score(at);
        sync_block();
        int row = OfKeys::row(warp), column = OfKeys::column(warp);
        multiply_shared<Element, Major::K, Major::MN>(sums.dv, probs(), row, dout(at), column);
        multiply_shared<Element, Major::K, Major::MN>(sums.dk, dscores(), row, q(at), column);
        if constexpr (F::STAGES == 1) {  // the next rows are loaded beside the product of dq only
            sync_block();
            if (more) load_rows(after(at));
            copy_commit();
        }
        typename OfRows::Sums dq = {};
        multiply_shared<Element, Major::MN, Major::MN>(dq, dscores(), OfRows::row(warp), keys(),
                                                       OfRows::column(warp));
        add_dq(dq, at);
    }

    // Stores through a tile in shared memory, so that neighbouring threads write neighbouring 16
    // bytes.
    FASTATTN_DEVICE void store(typename F::KVTile tile, const Rows& to,
                               const typename OfKeys::Sums& sums) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t a[OfKeys::N / 16][4];
            to_fragments<Element, OfKeys::N>(a, sums[i]);
            write_fragments(tile, OfKeys::row(warp) + 16 * i, OfKeys::column(warp), a);
        }
        sync_block();
        constexpr int CHUNKS = F::D / 8;
        uint16_t* start = to.at(w.batch, w.kv_head, w.key_in_k + w.key);
        int rows = imin(F::BLOCK_KV, w.all_keys - w.key), chunk = thread_index() % CHUNKS;
        for (int row = thread_index() / CHUNKS; row < rows; row += F::THREADS / CHUNKS)
            st_global(reinterpret_cast<uint4*>(start + row * to.row + 8 * chunk),
                      ld_shared4(tile.chunk(row, chunk)));
    }

    FASTATTN_DEVICE void run() {
        if (w.empty()) return;
        Sums sums = {};
        load_keys(keys(), p.k);
        load_keys(values(), p.v);
        int heads = p.heads / p.kv_heads, steps = heads * (w.end - w.begin);
        Step at{w.kv_head * heads, w.begin, 0};
        if (steps > 0) load_rows(at);
        copy_commit();
        for (; steps > 0; steps--, at = after(at)) step(sums, at, steps > 1);
        // Computed again: kept through the loop, it would be spilled.
        w = KeyWork(p, opaque(block_index()), F::BLOCK_Q, F::BLOCK_KV);
#pragma unroll
        for (int i = 0; i < OfKeys::N; i++)
            sums.dk[i / (OfKeys::N / 2)][i % (OfKeys::N / 2)] *= p.scale;
        copy_wait<0>();
        sync_block();  // k's memory, where dk goes, is neither read nor written any more
        store(keys(), p.dk, sums.dk);
        store(values(), p.dv, sums.dv);
    }
};

template <class F, int SHARED_BYTES = F::SHARED_BYTES>
__global__ void __launch_bounds__(F::THREADS, 1)
    backward_sm80(const __grid_constant__ BackwardParams80 p) {
    BackwardCta<F>{p, dynamic_shared(), KeyWork(p, block_index(), F::BLOCK_Q, F::BLOCK_KV),
                   Transform{p.softcap, p.transform, p.before, p.after}, warp_index()}
        .run();
}

// Calls use(F{}) with the kernel F of this head dimension and memory. 256 fits LARGE memory only.
template <class Element, class Use> auto with_backward80(int64_t dim, Memory memory, Use use) {
    bool large = memory == Memory::LARGE;
    switch (dim) {
        case 64:
            return large ? use(Backward80<Element, 64, Memory::LARGE>{})
                         : use(Backward80<Element, 64, Memory::SMALL>{});
        case 128:
            return large ? use(Backward80<Element, 128, Memory::LARGE>{})
                         : use(Backward80<Element, 128, Memory::SMALL>{});
        default:
            return use(Backward80<Element, 256, Memory::LARGE>{});
    }
}

}  // namespace fastattn::cuda
