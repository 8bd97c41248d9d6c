// The backward pass on sm_90a. A CTA has one tile of keys: it walks over the tiles of rows that see
// them, of every head that shares them, and keeps dk and dv in registers; what each tile adds to dq
// goes to an fp32 sum in memory. delta and lse come from backward_rows.cuh, which also makes dq of
// the sums. next: launch.h (hosts), backward_tile.cuh, backward_rows.cuh
//
//     scores^T = k q^T, weights^T = exp2(.. - lse), dweights^T = v dout^T
//     dscores = weights (dweights - delta)
//     dv += weights^T dout, dk += dscores^T q, dq += dscores k
//
// Scores are transposed, so that weights and dscores are the A operands of dv and dk as they stand.
#pragma once
#include "backward_tile.cuh"
#include "pipeline.cuh"
#include "tile.cuh"

namespace fastattn::cuda {

template <class Element_, int D_> struct Backward {
    using Element = Element_;
    using Config = BackwardConfig<D_>;
    static constexpr int D = D_, BLOCK_Q = Config::BLOCK_Q, BLOCK_KV = 128, CONSUMERS = 2;
    static constexpr int THREADS = 128 * (1 + CONSUMERS), STAGES = 2;

    using KVTile = Tile<BLOCK_KV, D>;
    using QTile = Tile<BLOCK_Q, D>;
    using ScoreTile = Tile<BLOCK_KV, BLOCK_Q>;  // dscores^T, of both warpgroups
    using QRing = Ring<STAGES>;
    using KVRing = Ring<1>;

    // Each warpgroup multiplies half of dscores k: 64 rows and all columns, or all 64 rows and half
    // of the columns.
    static constexpr bool HALF_ROWS = BLOCK_Q == 128;
    static constexpr int DQ_COLUMNS = HALF_ROWS ? D : D / 2;
    static_assert(HALF_ROWS || BLOCK_Q == 64);
    // dq's sums: two parts a tile of rows, of fp32 numbers in the order of dq_index().
    static constexpr int PARTS = CONSUMERS, PART = 64 * DQ_COLUMNS;
    static constexpr FASTATTN_HD int sum_index(int row, int column) {
        int part = HALF_ROWS ? row / 64 : column / DQ_COLUMNS;
        return part * PART + dq_index_of(row % 64, column % DQ_COLUMNS);
    }

    static constexpr int STATS = 4 * BLOCK_Q;  // bytes of lse or delta of a tile
    static constexpr int K_AT = 0, V_AT = KVTile::BYTES, Q_AT = 2 * KVTile::BYTES;
    static constexpr int DOUT_AT = Q_AT + STAGES * QTile::BYTES;
    static constexpr int SCORES_AT = DOUT_AT + STAGES * QTile::BYTES;
    static constexpr int DQ_AT = SCORES_AT + STAGES * ScoreTile::BYTES;
    static constexpr int LSE_AT = DQ_AT + CONSUMERS * 4 * PART;
    static constexpr int DELTA_AT = LSE_AT + STAGES * STATS;
    static constexpr int BARRIERS_AT = DELTA_AT + STAGES * STATS;
    static constexpr int SHARED_BYTES = BARRIERS_AT + KVRing::BYTES + 2 * QRing::BYTES;
    static_assert(SHARED_BYTES + SHARED_ALIGNMENT <= 232448);
    static constexpr int RELEASES = 4 * CONSUMERS;
    static constexpr int ALL_CONSUMERS = 1, OWN = 2;  // named barriers
};

// --- the producer -------------------------------------------------------------------------------

template <class F> struct BackwardProducer {
    const BackwardParams& p;
    SharedAddress shared;
    typename F::KVRing kv_ring;
    typename F::QRing q_ring, dout_ring;

    template <class T> FASTATTN_DEVICE void load(SharedAddress at, const TensorMap* map,
                                                 SharedAddress bar, int row, int head, int batch) {
#pragma unroll
        for (int i = 0; i < T::PANELS; i++)
            tma_load(T{at}.panel(i), map, bar, PANEL * i, row, head, batch, EVICT_LAST);
    }
    FASTATTN_DEVICE void load_rows(typename F::QRing& ring, int at, int stats_at,
                                   const TensorMap* map, const float* stats, const KeyWork& w,
                                   int head, int m) {
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
    static constexpr int SCORES = F::BLOCK_Q / 2, OUTPUTS = F::D / 2, DQ = F::DQ_COLUMNS / 2;
    using Element = typename F::Element;

    const BackwardParams& p;
    SharedAddress shared;
    int group;
    typename F::KVRing kv_ring;
    typename F::QRing q_ring, dout_ring;
    int scores_stage = 0;

    FASTATTN_DEVICE bool leads() const { return thread_index() % 128 == 0; }
    template <class R> FASTATTN_DEVICE void release(R& ring) const {
        if (lane_index() == 0) ring.release();
        ring.advance();
    }
    FASTATTN_DEVICE int key_in_tile() const {
        return 64 * group + thread_index() / 32 % 4 * 16 + lane_index() / 4;
    }
    FASTATTN_DEVICE typename F::KVTile keys() const { return {shared + F::K_AT}; }
    FASTATTN_DEVICE typename F::KVTile values() const { return {shared + F::V_AT}; }

    FASTATTN_DEVICE typename F::QTile rows() const {
        return {shared + F::Q_AT + q_ring.stage * F::QTile::BYTES};
    }
    FASTATTN_DEVICE typename F::QTile dout() const {
        return {shared + F::DOUT_AT + dout_ring.stage * F::QTile::BYTES};
    }

    // Rows outside [low, high) of both tiles become zeros: theirs are other entries', or NaN.
    template <class T> FASTATTN_DEVICE void clear(T a, T b, int low, int high) const {
        constexpr int CONSUMING = 128 * F::CONSUMERS;
        clear_rows<CONSUMING>(a, low, high, thread_index() - 128);
        clear_rows<CONSUMING>(b, low, high, thread_index() - 128);
        fence_proxy_async();
        barrier_sync(F::ALL_CONSUMERS, CONSUMING);
    }
    // Keys that do not exist; past the tensor's TMA gives zeros.
    FASTATTN_DEVICE void clear_keys(const KeyWork& w) const {
        int low = w.first_key - w.key, high = w.keys - w.key;
        if (low > 0 || high < imin(F::BLOCK_KV, p.kv_len - w.key_in_k - w.key))
            clear(keys(), values(), low, high);
    }
    // Rows past a sequence's end: their weights are 0, but what is there may be NaN.
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

    // Adds this warpgroup's part to the sums; in deterministic mode after those of earlier keys.
    FASTATTN_DEVICE void add_dq(const float (&dq)[DQ], const KeyWork& w, int head, int m) const {
        SharedAddress at = shared + F::DQ_AT + group * 4 * F::PART;
        if (!p.turns) {  // in turns the last reduction is over, and a barrier of all since
            if (leads()) bulk_wait_read<0>();
            barrier_sync(F::OWN + group, 128);
        }
#pragma unroll
        for (int i = 0; i < DQ; i += 4) {
            uint4 four = {bits_of(dq[i]), bits_of(dq[i + 1]), bits_of(dq[i + 2]),
                          bits_of(dq[i + 3])};
            st_shared4(at + 4 * dq_index(thread_index() % 128, i), four);
        }
        fence_proxy_async();
        barrier_sync(F::OWN + group, 128);
        if (!leads()) return;
        int64_t part = w.row_tile(p, head, m) * F::PARTS + group;
        int before = p.turns ? w.turn(m, F::BLOCK_Q, F::BLOCK_KV) : 0;
        if (p.turns)
            while (ld_global_acquire(p.turns + part) != before) pause();
        bulk_reduce_add(p.dq_sums + part * F::PART, at, 4 * F::PART);
        bulk_commit();
        if (p.turns) {
            bulk_wait<0>();  // written, not only read
            add_global_release(p.turns + part, 1);
        }
    }

    // 0 or positive, and depends on all weights, which are not negative.
    FASTATTN_DEVICE static float no_sign(const uint32_t (&weights)[F::BLOCK_Q / 16][4]) {
        uint32_t all = 0;
#pragma unroll
        for (int i = 0; i < F::BLOCK_Q / 4; i++) all |= weights[i / 4][i % 4];
        return float_of(all);
    }

    struct Sums {
        float dk[OUTPUTS], dv[OUTPUTS];
    };

    template <bool MASKED> FASTATTN_DEVICE void step(Sums& sums, const Transform& transform,
                                                     const KeyWork& w, int head, int m) {
        float s[SCORES], d[SCORES], dq[DQ];
        uint32_t weights[F::BLOCK_Q / 16][4], dscores[F::BLOCK_Q / 16][4];
        q_ring.wait();
        if constexpr (MASKED) clear_rows_past(w, m);
        wgmma_fence();
        multiply_transposed<Element, F::BLOCK_Q>(s, keys(), 64 * group, rows());
        wgmma_commit();
        dout_ring.wait();
        wgmma_fence();
        multiply_transposed<Element, F::BLOCK_Q>(d, values(), 64 * group, dout());
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        SharedAddress lse = shared + F::LSE_AT + q_ring.stage * F::STATS;
        weigh<MASKED>(s, transform, p.multiplier, w, w.key + key_in_tile(), m * F::BLOCK_Q, lse);
        if constexpr (F::Config::PACK_EARLY) {
            to_fragments<Element, F::BLOCK_Q>(weights, s);
            finish_first(no_sign(weights), shared);
        }
        wgmma_wait<0>();
        pin(d);
        differentiate(d, s, transform, lse, shared + F::DELTA_AT + dout_ring.stage * F::STATS);
        if constexpr (!F::Config::PACK_EARLY) to_fragments<Element, F::BLOCK_Q>(weights, s);
        to_fragments<Element, F::BLOCK_Q>(dscores, d);

        wgmma_fence();
        multiply_add<Element, F::D>(sums.dv, weights, dout());
        wgmma_commit();
        // Two buffers: whoever is a step ahead does not write what the other still multiplies.
        typename F::ScoreTile tile{shared + F::SCORES_AT + scores_stage * F::ScoreTile::BYTES};
        scores_stage ^= 1;
        store_fragments<F::BLOCK_Q>(tile, 64 * group, dscores);
        fence_proxy_async();
        barrier_sync(F::ALL_CONSUMERS, 128 * F::CONSUMERS);
        wgmma_fence();
        issue_dq(dq, tile);
        multiply_add<Element, F::D>(sums.dk, dscores, rows());
        wgmma_commit();
        wgmma_wait<1>();
        pin(dq);
        pin(sums.dv);
        release(dout_ring);
        add_dq(dq, w, head, m);
        wgmma_wait<0>();
        pin(sums.dk);
        release(q_ring);
    }

    FASTATTN_DEVICE void store_tile(const Sums& sums, const KeyWork& w, int row) const {
        store_accumulator<Element, F::D>(keys(), 64 * group, sums.dk);
        store_accumulator<Element, F::D>(values(), 64 * group, sums.dv);
        fence_proxy_async();
        barrier_sync(F::OWN + group, 128);
        if (!leads()) return;
#pragma unroll
        for (int i = 0; i < F::KVTile::PANELS; i++) {
            int offset = 64 * group * ROW_BYTES;
            tma_store(&p.dk, keys().panel(i) + offset, PANEL * i, row, w.kv_head, w.batch);
            tma_store(&p.dv, values().panel(i) + offset, PANEL * i, row, w.kv_head, w.batch);
        }
        bulk_commit();
    }
    FASTATTN_DEVICE void store_rows(const Rows& to, const float (&acc)[OUTPUTS], const KeyWork& w,
                                    int row, int rows) const {
        store_accumulator_rows<Element, F::D>(to.at(w.batch, w.kv_head, row), to.row, rows, acc);
    }
    FASTATTN_DEVICE void store(Sums& sums, const KeyWork& w) const {
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) sums.dk[i] *= p.scale;
        barrier_sync(F::ALL_CONSUMERS, 128 * F::CONSUMERS);  // the other still multiplies with k
        int row = w.key_in_k + w.key + 64 * group, rows = w.all_keys - w.key - 64 * group;
        if (!p.cu_k || rows >= 64) {
            store_tile(sums, w, row);
        } else {  // keys past the sequence's last are its neighbour's
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
    typename F::QRing dout_ring{q_ring.barriers + F::QRing::BYTES};
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
        registers_decrease<24>();
        if (thread_index() == 0) BackwardProducer<F>{p, shared, kv_ring, q_ring, dout_ring}.run();
    } else {
        registers_increase<240>();
        BackwardConsumer<F>{p, shared, warpgroup - 1, kv_ring, q_ring, dout_ring}.run();
    }
}

}  // namespace fastattn::cuda
