// The forward pass on sm_90a: one warpgroup loads with TMA, the others multiply with wgmma. CTAs
// are persistent: each takes tiles of query rows until none is left.
// next: work.cuh, softmax.cuh, host_params.h (its parameters)
#pragma once
#include <type_traits>

#include "config.h"
#include "params.h"
#include "pipeline.cuh"
#include "softmax.cuh"
#include "tile.cuh"
#include "transpose_fp8.cuh"
#include "work.cuh"

namespace fastattn::cuda {

template <class Element_, int D_> struct Forward {
    using Element = Element_;
    static constexpr int D = D_, BYTES = BYTES_OF<Element>;
    using Config = ForwardConfig<D, BYTES>;
    static constexpr int BLOCK_Q = 64 * Config::CONSUMERS, BLOCK_KV = Config::BLOCK_KV;
    static constexpr int THREADS = 128 * (1 + Config::CONSUMERS);

    // FP8 values are transposed by the three warps beside the one that loads. Probs are rounded to
    // FP8 too, times 2^8, so that the largest is 256 where e4m3 reaches to 448. The result is BF16.
    static constexpr bool TRANSPOSE_V = BYTES == 1;
    static constexpr int TRANSPOSE_WARPS = 3, PROBS_LOG2 = TRANSPOSE_V ? 8 : 0;
    static_assert(!TRANSPOSE_V || BLOCK_KV == TRANSPOSE_SIDE);
    using Out = std::conditional_t<TRANSPOSE_V, Bf16, Element>;

    using QTile = Tile<BLOCK_Q, D, BYTES>;
    using OutTile = Tile<BLOCK_Q, D>;
    using KVTile = Tile<BLOCK_KV, D, BYTES>;
    using VTile = std::conditional_t<TRANSPOSE_V, Tile<D, BLOCK_KV, BYTES>, KVTile>;  // the operand
    using KRing = Ring<Config::STAGES>;
    using VRing = std::conditional_t<TRANSPOSE_V, TransposedRing<Config::STAGES>, KRing>;
    using QRing = Ring<1>;

    // Shared memory, in bytes from its start.
    static constexpr int Q_AT = 0, K_AT = QTile::BYTES;
    static constexpr int V_AT = K_AT + Config::STAGES * KVTile::BYTES;
    static constexpr int END_AT = V_AT + Config::STAGES * KVTile::BYTES;
    static constexpr int OUT_AT = Config::OUT_IN_Q ? Q_AT : END_AT;
    static constexpr int BARRIERS_AT = Config::OUT_IN_Q ? END_AT : END_AT + OutTile::BYTES;
    static constexpr int SHARED_BYTES = BARRIERS_AT + KRing::BYTES + VRing::BYTES + QRing::BYTES;
    static_assert(SHARED_BYTES + SHARED_ALIGNMENT <= 232448 && QTile::BYTES % GROUP_BYTES == 0);
    static_assert(registers_fit(THREADS, Config::PRODUCER_REGISTERS, Config::CONSUMERS,
                                Config::CONSUMER_REGISTERS));

    // How many threads release a stage: one lane of each consumer warp. Of q, where the output is
    // staged in its memory, one thread of each warpgroup, after TMA has read the output.
    static constexpr int RELEASES = 4 * Config::CONSUMERS;
    static constexpr int Q_RELEASES = Config::OUT_IN_Q ? Config::CONSUMERS : RELEASES;

    // Named barriers; 0 is sync_block's.
    static constexpr int ALL_CONSUMERS = 1, OWN = 2, PINGPONG = 2 + Config::CONSUMERS;
};

// --- the producer -------------------------------------------------------------------------------

template <class F> struct Producer {
    const ForwardParams& p;
    SharedAddress shared;
    typename F::KRing k_ring;
    typename F::VRing v_ring;
    typename F::QRing q_ring;

    template <class T> FASTATTN_DEVICE void load(SharedAddress at, const TensorMap* map,
                                                 SharedAddress bar, int row, int head, int batch,
                                                 uint64_t hint) {
#pragma unroll
        for (int i = 0; i < T::PANELS; i++)
            tma_load(T{at}.panel(i), map, bar, T::WIDTH * i, row, head, batch, hint);
    }

    template <class R> FASTATTN_DEVICE void load_keys(R& ring, SharedAddress at,
                                                      const TensorMap* map, const Work& w,
                                                      int tile) {
        using T = typename F::KVTile;
        ring.acquire(T::BYTES);
        load<T>(at + ring.stage * T::BYTES, map, ring.full(), w.first_key + tile * F::BLOCK_KV,
                w.head / (p.heads / p.kv_heads), w.batch, EVICT_LAST);
        ring.advance();
    }

    // Values are loaded one tile after keys, in the order in which they are used.
    FASTATTN_DEVICE void run() {
        for (int index = block_index(); index < p.tiles; index += grid_size()) {
            Work w(p, index, F::BLOCK_Q);
            if (w.empty()) continue;
            KeyTiles tiles(w.band, w.row, w.row + F::BLOCK_Q, F::BLOCK_KV);
            int n = tiles.end - 1;
            if (n >= tiles.begin) load_keys(k_ring, shared + F::K_AT, &p.k, w, n);
            q_ring.acquire(F::QTile::BYTES);
            load<typename F::QTile>(shared + F::Q_AT, &p.q, q_ring.full(), w.first_row + w.row,
                                    w.head, w.batch, EVICT_FIRST);
            q_ring.advance();
            for (; n >= tiles.begin; n--) {
                if (n > tiles.begin) load_keys(k_ring, shared + F::K_AT, &p.k, w, n - 1);
                load_keys(v_ring, shared + F::V_AT, &p.v, w, n);
            }
        }
    }
};

// --- a warp that transposes FP8 values -----------------------------------------------------------

template <class F> struct TransposeWarp {
    const ForwardParams& p;
    SharedAddress shared;
    int warp;  // of F::TRANSPOSE_WARPS
    typename F::VRing ring;

    FASTATTN_DEVICE void run() {
        for (int index = block_index(); index < p.tiles; index += grid_size()) {
            Work w(p, index, F::BLOCK_Q);
            if (w.empty()) continue;
            KeyTiles tiles(w.band, w.row, w.row + F::BLOCK_Q, F::BLOCK_KV);
            for (int n = tiles.end - 1; n >= tiles.begin; n--) {
                ring.wait_loaded();
                transpose_tile<F::D>(shared + F::V_AT + ring.stage * F::KVTile::BYTES,
                                     w.band.kv_len - n * F::BLOCK_KV, warp, F::TRANSPOSE_WARPS);
                fence_proxy_async();
                sync_warp();
                if (lane_index() == 0) ring.signal_transposed();
                ring.advance();
            }
        }
    }
};

// --- a consumer warpgroup: 64 rows --------------------------------------------------------------

template <class F> struct Consumer {
    static constexpr int SCORES = F::BLOCK_KV / 2, OUTPUTS = F::D / 2;  // registers a thread
    using Element = typename F::Element;
    using Out = typename F::Out;
    using Config = typename F::Config;
    using Softmax = OnlineSoftmax<F::PROBS_LOG2>;
    using Probs = uint32_t[F::BLOCK_KV / K_STEP<Element>][4];

    const ForwardParams& p;
    SharedAddress shared;
    int group;  // number of this consumer warpgroup
    typename F::KRing k_ring;
    typename F::VRing v_ring;
    typename F::QRing q_ring;

    FASTATTN_DEVICE float descale(const Descale& x, const Work& w) const {
        return x.of(imin(w.lengths_index, imax(p.batch, p.sequences) - 1),
                    w.head / (p.heads / p.kv_heads));
    }
    FASTATTN_DEVICE bool leads_warp() const { return lane_index() == 0; }
    FASTATTN_DEVICE int row_in_tile() const {
        return 64 * group + thread_index() / 32 % 4 * 16 + lane_index() / 4;
    }

    FASTATTN_DEVICE void wait_pingpong() const {
        if constexpr (Config::SCHEDULE == Schedule::PINGPONG)
            barrier_sync(F::PINGPONG + group, 256);
    }
    FASTATTN_DEVICE void pass_pingpong() const {
        if constexpr (Config::SCHEDULE == Schedule::PINGPONG)
            barrier_arrive(F::PINGPONG + (group + 1) % Config::CONSUMERS, 256);
    }

    FASTATTN_DEVICE void issue_scores(float (&s)[SCORES]) const {
        typename F::QTile q{shared + F::Q_AT};
        typename F::KVTile k{shared + F::K_AT + k_ring.stage * F::KVTile::BYTES};
        multiply_transposed<Element, F::BLOCK_KV>(s, q, 64 * group, k);
        wgmma_commit();
    }
    FASTATTN_DEVICE void issue_output(float (&acc)[OUTPUTS], const Probs& probs) const {
        typename F::VTile v{shared + F::V_AT + v_ring.stage * F::KVTile::BYTES};
        multiply_add<Element, F::D>(acc, probs, v);
        wgmma_commit();
    }
    template <class R> FASTATTN_DEVICE void release(R& ring) const {
        if (leads_warp()) ring.release();
        ring.advance();
    }

    // Zeroes the rows of v past the last key, from `row` on: their probs are 0, but 0 times NaN is
    // NaN.
    FASTATTN_DEVICE void clear_values(int row) const {
        v_ring.wait();
        typename F::KVTile v{shared + F::V_AT + v_ring.stage * F::KVTile::BYTES};
        constexpr int CHUNKS = F::D / 8, CONSUMING = 128 * Config::CONSUMERS;
        for (int i = row * CHUNKS + thread_index() - 128; i < F::BLOCK_KV * CHUNKS; i += CONSUMING)
            st_shared4(v.chunk(i / CHUNKS, i % CHUNKS), uint4{0, 0, 0, 0});
        fence_proxy_async();
        barrier_sync(F::ALL_CONSUMERS, CONSUMING);
    }

    template <bool MASKED>
    FASTATTN_DEVICE void softmax_step(float (&s)[SCORES], float (&rescale)[2], Softmax& softmax,
                                      const Transform& transform, const Work& w, int tile) const {
        int row = w.row + row_in_tile();
        scores_to_probs<MASKED>(s, rescale, softmax, transform, w.band, {row, row + 8},
                                tile * F::BLOCK_KV);
    }

    FASTATTN_DEVICE void store_tile(const float (&acc)[OUTPUTS], const Work& w, bool leads) const {
        typename F::OutTile out{shared + F::OUT_AT};
        if constexpr (!Config::OUT_IN_Q) {
            if (leads) bulk_wait_read<0>();  // the store of the last tile has read this memory
            barrier_sync(F::OWN + group, 128);
        }
        store_accumulator<Out, F::D>(out, 64 * group, 0, acc);
        fence_proxy_async();
        barrier_sync(F::OWN + group, 128);
        if (!leads) return;
#pragma unroll
        for (int i = 0; i < F::OutTile::PANELS; i++)
            tma_store(&p.out, out.panel(i) + 64 * group * ROW_BYTES, PANEL * i,
                      w.first_row + w.row + 64 * group, w.head, w.batch);
        bulk_commit();
    }
    FASTATTN_DEVICE void store_rows(const float (&acc)[OUTPUTS], const Work& w) const {
        int row = w.row + 64 * group;
        uint16_t* to = p.out_rows.at(w.batch, w.head, w.first_row + row);
        store_accumulator_rows<Out, F::D>(to, p.out_rows.row, w.band.q_len - row, acc);
    }

    // Normalises the 64 rows and stores them and their lse.
    FASTATTN_DEVICE void store(float (&acc)[OUTPUTS], Softmax& softmax, const Work& w) {
        float scale[2], lse[2];
        float sink = sink_of(p.sinks, p.sink_type, w.head);
        softmax.finish({sink, sink}, scale, lse);
        if constexpr (F::BYTES == 1) {
            float by = descale(p.v_descale, w);
            for (float& x : scale) x *= by;
        }
        scale_rows(acc, scale);
        bool leads = thread_index() % 128 == 0;
        // Rows past the last one belong to the next sequence, which TMA would overwrite.
        bool whole = !p.cu_q || w.row + 64 * group + 64 <= w.band.q_len;
        if (whole)
            store_tile(acc, w, leads);
        else
            store_rows(acc, w);
        if constexpr (Config::OUT_IN_Q) {
            if (!whole) barrier_sync(F::OWN + group, 128);
            if (leads) {
                bulk_wait_read<0>();
                q_ring.release();
            }
        }
        if constexpr (Config::OUT_IN_Q) q_ring.advance();
        if (lane_index() % 4 == 0) {
            int64_t head = static_cast<int64_t>(w.batch) * p.heads + w.head;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = w.row + row_in_tile() + 8 * r;
                if (row < w.band.q_len)
                    st_global(p.lse + head * p.q_len + w.first_row + row, lse[r]);
            }
        }
    }

    // One long function: wgmma writes s and acc while the lines after it run, so that they must
    // stay in the registers of one frame.
    FASTATTN_DEVICE void tile(const Work& w) {
        KeyTiles all(w.band, w.row, w.row + F::BLOCK_Q, F::BLOCK_KV);
        KeyTiles own(w.band, w.row + 64 * group, w.row + 64 * group + 64, F::BLOCK_KV);
        Transform transform{p.softcap, p.transform, p.before, p.after};
        Softmax softmax;
        softmax.multiplier = p.multiplier;
        if constexpr (F::BYTES == 1) {
            float by = descale(p.q_descale, w) * descale(p.k_descale, w);
            softmax.multiplier = transform.descale(p.multiplier, by);
        }
        float acc[OUTPUTS], s[SCORES], rescale[2];
        Probs probs;
#pragma unroll
        for (int i = 0; i < OUTPUTS; i++) acc[i] = 0;
        // Keys past the segment's last may be another's, or nobody's. They need no zeroing past the
        // end of the tensor, where TMA has written zeros, nor in FP8: the transpose warps have
        // zeroed them.
        int clear = !F::TRANSPOSE_V && w.first_key + w.band.kv_len < p.kv_len
                        ? imin(F::BLOCK_KV, w.band.kv_len - (all.end - 1) * F::BLOCK_KV)
                        : F::BLOCK_KV;

        q_ring.wait();
        int n = all.end - 1;
        if (n >= all.begin) {
            k_ring.wait();
            wait_pingpong();
            wgmma_fence();
            issue_scores(s);
            pass_pingpong();
            wgmma_wait<0>();
            pin(s);
            release(k_ring);
            softmax_step<true>(s, rescale, softmax, transform, w, n);
            to_fragments<Element, F::BLOCK_KV>(probs, s);

            constexpr bool OVERLAPS = Config::SCHEDULE != Schedule::SEQUENCE;
            auto begin_output = [&] {
                v_ring.wait();
                wgmma_fence();
                issue_output(acc, probs);
            };
            auto finish_output = [&] {
                wgmma_wait<0>();
                pin(acc);
                release(v_ring);
            };
            // Scores of tile n and the output of tile n + 1 are in flight together.
            auto step = [&](auto masked) {
                if (clear < F::BLOCK_KV) {
                    // All consumers must come to the barrier in it, which none can reach while it
                    // waits for the ping-pong order.
                    clear_values(clear);
                    clear = F::BLOCK_KV;
                }
                if constexpr (!OVERLAPS) {
                    begin_output();
                    finish_output();
                }
                k_ring.wait();
                wait_pingpong();
                wgmma_fence();
                issue_scores(s);
                if constexpr (OVERLAPS) begin_output();
                pass_pingpong();
                wgmma_wait<OVERLAPS ? 1 : 0>();
                pin(s);
                release(k_ring);
                softmax_step<decltype(masked)::value>(s, rescale, softmax, transform, w, n);
                if constexpr (OVERLAPS) {
                    finish_first(softmax.row_sum[0] + softmax.row_sum[1], shared);
                    finish_output();
                }
                scale_rows(acc, rescale);
                to_fragments<Element, F::BLOCK_KV>(probs, s);
            };
            for (n--; n >= imax(own.full_end, all.begin); n--) step(Masked{});
            for (; n >= imax(own.full_begin, all.begin); n--) step(Unmasked{});
            for (; n >= all.begin; n--) step(Masked{});

            if (clear < F::BLOCK_KV) clear_values(clear);
            begin_output();
            finish_output();
        }
        if constexpr (!Config::OUT_IN_Q) {
            // Without keys, nothing else makes the lane that releases q wait for the others.
            sync_warp();
            release(q_ring);
        }
        store(acc, softmax, w);
    }

    struct Masked {
        static constexpr bool value = true;
    };
    struct Unmasked {
        static constexpr bool value = false;
    };

    FASTATTN_DEVICE void run() {
        if constexpr (Config::SCHEDULE == Schedule::PINGPONG)
            if (group == Config::CONSUMERS - 1)
                barrier_arrive(F::PINGPONG, 256);  // lets group 0 begin
        for (int index = block_index(); index < p.tiles; index += grid_size()) {
            Work w(p, index, F::BLOCK_Q);
            if (!w.empty()) tile(w);
        }
        if (thread_index() % 128 == 0) bulk_wait<0>();
    }
};

// --- the kernel ---------------------------------------------------------------------------------

// SHARED_BYTES is in the kernel's name for benchmarks/compile/cuda.py, which sees no launch.
template <class F, int SHARED_BYTES = F::SHARED_BYTES>
__global__ void __launch_bounds__(F::THREADS, 1)
    forward_sm90(const __grid_constant__ ForwardParams p) {
    SharedAddress shared = dynamic_shared();
    typename F::KRing k_ring{shared + F::BARRIERS_AT};
    typename F::VRing v_ring{{k_ring.barriers + F::KRing::BYTES}};
    typename F::QRing q_ring{v_ring.barriers + F::VRing::BYTES};
    if (thread_index() == 0) {
        k_ring.init(F::RELEASES);
        if constexpr (F::TRANSPOSE_V)
            v_ring.init(F::RELEASES, F::TRANSPOSE_WARPS);
        else
            v_ring.init(F::RELEASES);
        q_ring.init(F::Q_RELEASES);
        fence_mbarrier_init();
        for (const TensorMap* map : {&p.q, &p.k, &p.v, &p.out}) prefetch_tensor_map(map);
    }
    sync_block();
    int warpgroup = warpgroup_index();
    if (warpgroup == 0) {
        registers_decrease<F::Config::PRODUCER_REGISTERS>();
        if constexpr (F::TRANSPOSE_V)
            if (int warp = warp_index(); warp > 0)
                TransposeWarp<F>{p, shared, warp - 1, v_ring}.run();
        if (thread_index() == 0) Producer<F>{p, shared, k_ring, v_ring, q_ring}.run();
    } else {
        registers_increase<F::Config::CONSUMER_REGISTERS>();
        Consumer<F>{p, shared, warpgroup - 1, k_ring, v_ring, q_ring}.run();
    }
}

}  // namespace fastattn::cuda
