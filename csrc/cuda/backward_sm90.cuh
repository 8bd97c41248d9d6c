// The backward pass on sm_90a. A CTA has one tile of keys, walks over the tiles of rows that see
// them, of every query head that shares them, and keeps dk and dv in registers. What each tile adds
// to dq goes to fp32 sums in memory. backward_prepost.cuh computes delta and lse before, and dq
// from the sums after. next: backward_tile.cuh, backward_prepost.cuh, host_params.h (its
// parameters)
//
//     scores^T = k q^T, probs^T = exp2(.. - lse), dprobs^T = v dout^T
//     dscores = probs (dprobs - delta)
//     dv += probs^T dout, dk += dscores^T q, dq += dscores k
//
// Scores are transposed, so that probs and dscores are A operands of dv and dk as they lie in
// registers. At D 256 the warpgroups exchange them first, through shared memory.
#pragma once
#include "backward_tile.cuh"
#include "config.h"
#include "pipeline.cuh"
#include "tile.cuh"

namespace fastattn::cuda {

template <class Element_, int D_> struct Backward {
    using Element = Element_;
    using Config = BackwardConfig<D_>;
    static constexpr int D = D_, BLOCK_Q = Config::BLOCK_Q, BLOCK_KV = Config::BLOCK_KV;
    static constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
    static constexpr int STAGES = 2, DOUT_STAGES = Config::DOUT_STAGES;

    using KVTile = Tile<BLOCK_KV, D>;
    using QTile = Tile<BLOCK_Q, D>;
    using ScoreTile = Tile<BLOCK_KV, BLOCK_Q>;  // of both warpgroups
    using QRing = Ring<STAGES>;
    using DoutRing = Ring<DOUT_STAGES>;
    using KVRing = Ring<1>;

    // Each warpgroup has 64 of the 128 keys, scores of all rows, and all columns of dk and dv. With
    // HALF_COLUMNS both have the same 64 keys, and each has scores of half of the rows and half of
    // the columns of dk and dv.
    static constexpr bool HALF_COLUMNS = Config::HALF_COLUMNS;
    static constexpr int KEYS_APART = HALF_COLUMNS ? 0 : 64;
    static constexpr int ROWS = HALF_COLUMNS ? BLOCK_Q / 2 : BLOCK_Q;
    static constexpr int ROWS_APART = HALF_COLUMNS ? ROWS : 0;
    static constexpr int COLUMNS = HALF_COLUMNS ? D / 2 : D;
    static constexpr int COLUMNS_APART = HALF_COLUMNS ? COLUMNS : 0;
    static_assert(BLOCK_KV == 64 + KEYS_APART);

    // Each warpgroup computes half of dq = dscores k: 64 of 128 rows and all columns, or all 64
    // rows and half of the columns.
    static constexpr bool HALF_ROWS = BLOCK_Q == 128;
    static constexpr int DQ_COLUMNS = HALF_ROWS ? D : D / 2;
    static_assert(HALF_ROWS || BLOCK_Q == 64);
    // The fp32 sums of dq: a tile of rows has two slices, one for each warpgroup, in the order of
    // dq_index(). A bulk reduction adds a piece of 64 columns.
    static constexpr int DQ_SLICES = CONSUMERS, DQ_SLICE = 64 * DQ_COLUMNS, DQ_PIECE = 64 * 64;
    static constexpr FASTATTN_HD int sum_index(int row, int column) {
        int slice = HALF_ROWS ? row / 64 : column / DQ_COLUMNS;
        return slice * DQ_SLICE + dq_index_of(row % 64, column % DQ_COLUMNS);
    }

    static constexpr int STATS = 4 * BLOCK_Q;  // bytes of lse or delta of a tile
    static constexpr int K_AT = 0, V_AT = KVTile::BYTES, Q_AT = 2 * KVTile::BYTES;
    static constexpr int DOUT_AT = Q_AT + STAGES * QTile::BYTES;
    static constexpr int SCORES_AT = DOUT_AT + DOUT_STAGES * QTile::BYTES;  // dscores^T
    static constexpr int PROBS_AT = SCORES_AT + STAGES * ScoreTile::BYTES;
    static constexpr int DQ_AT = PROBS_AT + (HALF_COLUMNS ? STAGES * ScoreTile::BYTES : 0);
    static constexpr int LSE_AT = DQ_AT + CONSUMERS * 4 * DQ_PIECE;
    static constexpr int DELTA_AT = LSE_AT + STAGES * STATS;
    static constexpr int BARRIERS_AT = DELTA_AT + DOUT_STAGES * STATS;
    static constexpr int SHARED_BYTES =
        BARRIERS_AT + KVRing::BYTES + QRing::BYTES + DoutRing::BYTES;
    static_assert(SHARED_BYTES + SHARED_ALIGNMENT <= 232448);
    static_assert(registers_fit(THREADS, Config::PRODUCER_REGISTERS, CONSUMERS,
                                Config::CONSUMER_REGISTERS));
    static constexpr int RELEASES = 4 * CONSUMERS;
    static constexpr int ALL_CONSUMERS = 1, OWN = 2;  // named barriers
};

// --- the producer -------------------------------------------------------------------------------

template <class F> struct BackwardProducer {
    const BackwardParams& p;
    SharedAddress shared;
    typename F::KVRing kv_ring;
    typename F::QRing q_ring;
    typename F::DoutRing dout_ring;

    template <class T> FASTATTN_DEVICE void load(SharedAddress at, const TensorMap* map,
                                                 SharedAddress bar, int row, int head, int batch) {
#pragma unroll
        for (int i = 0; i < T::PANELS; i++)
            tma_load(T{at}.panel(i), map, bar, PANEL * i, row, head, batch, EVICT_LAST);
    }
    template <class R> FASTATTN_DEVICE void load_rows(R& ring, int at, int stats_at,
                                                      const TensorMap* map, const float* stats,
                                                      const KeyWork& w, int head, int m) {
        using T = typename F::QTile;
        ring.acquire(T::BYTES + F::STATS);
        load<T>(shared + at + ring.stage * T::BYTES, map, ring.full(), w.row_in_q + m * F::BLOCK_Q,
                head, w.batch);
        bulk_load(shared + stats_at + ring.stage * F::STATS,
                  stats + w.row_tile(p, head, m) * F::BLOCK_Q, F::STATS, ring.full());
        ring.advance();
    }

    FASTATTN_DEVICE void run() {
        KeyWork w(p, block_index(), F::BLOCK_Q, F::BLOCK_KV);
        if (w.empty()) return;
        using T = typename F::KVTile;
        int key = w.key_in_k + w.key;
        kv_ring.acquire(2 * T::BYTES);
        load<T>(shared + F::K_AT, &p.k, kv_ring.full(), key, w.kv_head, w.batch);
        load<T>(shared + F::V_AT, &p.v, kv_ring.full(), key, w.kv_head, w.batch);
        int group = p.heads / p.kv_heads;
        for (int head = w.kv_head * group; head < (w.kv_head + 1) * group; head++)
            for (int m = w.begin; m < w.end; m++) {
                load_rows(q_ring, F::Q_AT, F::LSE_AT, &p.q, p.lse, w, head, m);
                load_rows(dout_ring, F::DOUT_AT, F::DELTA_AT, &p.dout, p.delta, w, head, m);
            }
    }
};

// --- a consumer warpgroup: 64 keys --------------------------------------------------------------

template <class F> struct BackwardConsumer {
    static constexpr int SCORES = F::ROWS / 2, OUTPUTS = F::COLUMNS / 2, DQ = F::DQ_COLUMNS / 2;
    using Element = typename F::Element;

    const BackwardParams& p;
    SharedAddress shared;
    int group;
    typename F::KVRing kv_ring;
    typename F::QRing q_ring;
    typename F::DoutRing dout_ring;
    int scores_stage = 0;

    FASTATTN_DEVICE bool leads() const { return thread_index() % 128 == 0; }
    template <class R> FASTATTN_DEVICE void release(R& ring) const {
        if (lane_index() == 0) ring.release();
        ring.advance();
    }
    // The warpgroup's first key, first row of scores, and first column of dk and dv in the tile.
    FASTATTN_DEVICE int first_key() const { return F::KEYS_APART * group; }
    FASTATTN_DEVICE int first_row() const { return F::ROWS_APART * group; }
    FASTATTN_DEVICE int first_column() const { return F::COLUMNS_APART * group; }
    FASTATTN_DEVICE int key_in_tile() const {
        return first_key() + thread_index() / 32 % 4 * 16 + lane_index() / 4;
    }
    FASTATTN_DEVICE typename F::KVTile keys() const { return {shared + F::K_AT}; }
    FASTATTN_DEVICE typename F::KVTile values() const { return {shared + F::V_AT}; }

    FASTATTN_DEVICE typename F::QTile rows() const {
        return {shared + F::Q_AT + q_ring.stage * F::QTile::BYTES};
    }
    FASTATTN_DEVICE typename F::QTile dout() const {
        return {shared + F::DOUT_AT + dout_ring.stage * F::QTile::BYTES};
    }

    // Zeroes the rows outside [low, high) of both tiles: another segment's, or memory with NaN.
    template <class T> FASTATTN_DEVICE void clear(T a, T b, int low, int high) const {
        constexpr int CONSUMING = 128 * F::CONSUMERS;
        clear_rows<CONSUMING>(a, low, high, thread_index() - 128);
        clear_rows<CONSUMING>(b, low, high, thread_index() - 128);
        fence_proxy_async();
        barrier_sync(F::ALL_CONSUMERS, CONSUMING);
    }
    // Zeroes keys that do not exist. Past the end of the tensor TMA has written zeros already.
    FASTATTN_DEVICE void clear_keys(const KeyWork& w) const {
        int low = w.first_key - w.key, high = w.keys - w.key;
        if (low > 0 || high < imin(F::BLOCK_KV, p.kv_len - w.key_in_k - w.key))
            clear(keys(), values(), low, high);
    }
    // Zeroes rows past the end of a sequence: their probs are 0, but 0 times NaN is NaN.
    FASTATTN_DEVICE void clear_rows_past(const KeyWork& w, int m) const {
        int high = w.band.q_len - m * F::BLOCK_Q;
        if (!p.cu_q || high >= F::BLOCK_Q) return;
        dout_ring.wait();
        clear(rows(), dout(), 0, high);
    }

    FASTATTN_DEVICE void issue_dq(float (&dq)[DQ], typename F::ScoreTile dscores) const {
        int row = F::HALF_ROWS ? 64 * group : 0, column = F::HALF_ROWS ? 0 : F::DQ_COLUMNS * group;
#pragma unroll
        for (int k = 0; k < F::BLOCK_KV; k += 16)
            wgmma_ss<F::DQ_COLUMNS, Element, true, true>(dq, dscores.mn_major(k, row),
                                                         keys().mn_major(k, column), k > 0);
        wgmma_commit();
    }

    // Adds this warpgroup's slice to the sums, with semaphores after the CTAs of earlier keys.
    FASTATTN_DEVICE void add_dq(const float (&dq)[DQ], const KeyWork& w, int head, int m) const {
        SharedAddress at = shared + F::DQ_AT + group * 4 * F::DQ_PIECE;
        int64_t slice = w.row_tile(p, head, m) * F::DQ_SLICES + group;
#pragma unroll
        for (int piece = 0; piece < F::DQ_SLICE; piece += F::DQ_PIECE) {
            // The memory of the last piece must have been read. With semaphores it has, before the
            // first piece of a tile: the leader waited for it then, and a barrier of all followed.
            if (!p.semaphores || piece > 0) {
                if (leads()) bulk_wait_read<0>();
                barrier_sync(F::OWN + group, 128);
            }
#pragma unroll
            for (int i = 0; i < F::DQ_PIECE / 128; i += 4) {
                const float* x = dq + piece / 128 + i;
                uint4 four = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
                st_shared4(at + 4 * dq_index(thread_index() % 128, i), four);
            }
            fence_proxy_async();
            barrier_sync(F::OWN + group, 128);
            if (!leads()) continue;
            if (p.semaphores && piece == 0) {
                int before = w.semaphore_value(m, F::BLOCK_Q, F::BLOCK_KV);
                while (ld_global_acquire(p.semaphores + slice) != before) pause();
            }
            bulk_reduce_add(p.dq_sums + slice * F::DQ_SLICE + piece, at, 4 * F::DQ_PIECE);
            bulk_commit();
        }
        if (!p.semaphores || !leads()) return;
        bulk_wait<0>();  // written, not only read
        add_global_release(p.semaphores + slice, 1);
    }

    using Fragments = uint32_t[F::ROWS / 16][4];

    // acc += a^T b. `own` is the part of a^T in this warpgroup's registers, `all` what both
    // warpgroups have stored.
    FASTATTN_DEVICE void issue_output(float (&acc)[OUTPUTS], const Fragments& own,
                                      typename F::ScoreTile all, typename F::QTile b) const {
        if constexpr (F::HALF_COLUMNS)
            multiply_add<Element, F::COLUMNS>(acc, all, b, first_column());
        else
            multiply_add<Element, F::COLUMNS>(acc, own, b);
        wgmma_commit();
    }

    // A float which depends on all probs and, as these are not negative, is never negative: what
    // finish_first() takes.
    FASTATTN_DEVICE static float no_sign(const Fragments& probs) {
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < F::ROWS / 4; i++) all |= probs[i / 4][i % 4];
        return float_of(all);
    }

    struct Sums {
        float dk[OUTPUTS], dv[OUTPUTS];
    };

    template <bool MASKED> FASTATTN_DEVICE void step(Sums& sums, const Transform& transform,
                                                     const KeyWork& w, int head, int m) {
        float s[SCORES], d[SCORES], dq[DQ];
        Fragments probs, dscores;
        q_ring.wait();
        if constexpr (MASKED) clear_rows_past(w, m);
        wgmma_fence();
        multiply_transposed<Element, F::ROWS>(s, keys(), first_key(), rows(), first_row());
        wgmma_commit();
        dout_ring.wait();
        wgmma_fence();
        multiply_transposed<Element, F::ROWS>(d, values(), first_key(), dout(), first_row());
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        SharedAddress lse = shared + F::LSE_AT + q_ring.stage * F::STATS + 4 * first_row();
        SharedAddress delta = shared + F::DELTA_AT + dout_ring.stage * F::STATS + 4 * first_row();
        int key = w.key + key_in_tile(), row = m * F::BLOCK_Q + first_row();
        recompute_probs<MASKED>(s, transform, p.multiplier, w, key, row, lse);
        if constexpr (F::Config::ROUND_PROBS_EARLY) {
            to_fragments<Element, F::ROWS>(probs, s);
            finish_first(no_sign(probs), shared);
        }
        wgmma_wait<0>();
        pin(d);
        differentiate(d, s, transform, lse, delta);
        if constexpr (!F::Config::ROUND_PROBS_EARLY) to_fragments<Element, F::ROWS>(probs, s);
        to_fragments<Element, F::ROWS>(dscores, d);

        // Two buffers: a warpgroup that is a step ahead must not overwrite what the other
        // multiplies.
        int buffer = scores_stage * F::ScoreTile::BYTES;
        typename F::ScoreTile all_probs{shared + F::PROBS_AT + buffer};
        typename F::ScoreTile all_dscores{shared + F::SCORES_AT + buffer};
        scores_stage ^= 1;
        if constexpr (F::HALF_COLUMNS) {
            store_fragments<F::ROWS>(all_probs, first_key(), first_row(), probs);
        } else {
            wgmma_fence();
            issue_output(sums.dv, probs, all_probs, dout());
        }
        store_fragments<F::ROWS>(all_dscores, first_key(), first_row(), dscores);
        fence_proxy_async();
        barrier_sync(F::ALL_CONSUMERS, 128 * F::CONSUMERS);
        wgmma_fence();
        if constexpr (F::HALF_COLUMNS) issue_output(sums.dv, probs, all_probs, dout());
        issue_dq(dq, all_dscores);
        issue_output(sums.dk, dscores, all_dscores, rows());
        wgmma_wait<2>();
        pin(sums.dv);
        release(dout_ring);
        wgmma_wait<1>();
        pin(dq);
        add_dq(dq, w, head, m);
        wgmma_wait<0>();
        pin(sums.dk);
        release(q_ring);
    }

    FASTATTN_DEVICE void store_tile(const Sums& sums, const KeyWork& w, int row) const {
        store_accumulator<Element, F::COLUMNS>(keys(), first_key(), first_column(), sums.dk);
        store_accumulator<Element, F::COLUMNS>(values(), first_key(), first_column(), sums.dv);
        fence_proxy_async();
        barrier_sync(F::OWN + group, 128);
        if (!leads()) return;
#pragma unroll
        for (int i = 0; i < F::COLUMNS; i += PANEL) {
            int column = first_column() + i;
            SharedAddress dk = keys().chunk(first_key(), column / 8);
            SharedAddress dv = values().chunk(first_key(), column / 8);
            tma_store(&p.dk, dk, column, row, w.kv_head, w.batch);
            tma_store(&p.dv, dv, column, row, w.kv_head, w.batch);
        }
        bulk_commit();
    }
    FASTATTN_DEVICE void store_rows(const Rows& to, const float (&acc)[OUTPUTS], const KeyWork& w,
                                    int row, int rows) const {
        store_accumulator_rows<Element, F::COLUMNS>(to.at(w.batch, w.kv_head, row) + first_column(),
                                                    to.row, rows, acc);
    }
    FASTATTN_DEVICE void store(Sums& sums, const KeyWork& w) const {
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) sums.dk[i] *= p.scale;
        // The results go through the memory of k and v, which the other warpgroup may still read.
        barrier_sync(F::ALL_CONSUMERS, 128 * F::CONSUMERS);
        int key = w.key + first_key(), row = w.key_in_k + key, rows = w.all_keys - key;
        if (!p.cu_k || rows >= 64) {
            store_tile(sums, w, row);
        } else {  // the keys that follow belong to the next sequence
            store_rows(p.dk_rows, sums.dk, w, row, rows);
            store_rows(p.dv_rows, sums.dv, w, row, rows);
        }
        if (leads()) bulk_wait<0>();
    }

    FASTATTN_DEVICE void run() {
        KeyWork w(p, block_index(), F::BLOCK_Q, F::BLOCK_KV);
        if (w.empty()) return;
        Transform transform{p.softcap, p.transform, p.before, p.after};
        Sums sums;
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) sums.dk[i] = sums.dv[i] = 0;
        kv_ring.wait();
        clear_keys(w);
        int heads = p.heads / p.kv_heads;
        for (int head = w.kv_head * heads; head < (w.kv_head + 1) * heads; head++) {
            int m = w.begin;
            for (; m < imin(w.full_begin, w.end); m++) step<true>(sums, transform, w, head, m);
            for (; m < imin(w.full_end, w.end); m++) step<false>(sums, transform, w, head, m);
            for (; m < w.end; m++) step<true>(sums, transform, w, head, m);
        }
        store(sums, w);
    }
};

// --- the kernel ---------------------------------------------------------------------------------

template <class F, int SHARED_BYTES = F::SHARED_BYTES>
__global__ void __launch_bounds__(F::THREADS, 1)
    backward_sm90(const __grid_constant__ BackwardParams p) {
    SharedAddress shared = dynamic_shared();
    typename F::KVRing kv_ring{shared + F::BARRIERS_AT};
    typename F::QRing q_ring{kv_ring.barriers + F::KVRing::BYTES};
    typename F::DoutRing dout_ring{q_ring.barriers + F::QRing::BYTES};
    if (thread_index() == 0) {
        kv_ring.init(F::RELEASES);
        q_ring.init(F::RELEASES);
        dout_ring.init(F::RELEASES);
        fence_mbarrier_init();
        for (const TensorMap* map : {&p.q, &p.k, &p.v, &p.dout, &p.dk, &p.dv})
            prefetch_tensor_map(map);
    }
    sync_block();
    int warpgroup = warpgroup_index();
    if (warpgroup == 0) {
        registers_decrease<F::Config::PRODUCER_REGISTERS>();
        if (thread_index() == 0) BackwardProducer<F>{p, shared, kv_ring, q_ring, dout_ring}.run();
    } else {
        registers_increase<F::Config::CONSUMER_REGISTERS>();
        BackwardConsumer<F>{p, shared, warpgroup - 1, kv_ring, q_ring, dout_ring}.run();
    }
}

}  // namespace fastattn::cuda
