// The forward pass on sm_80 and later: all warps load with cp.async and multiply with mma.sync. A
// CTA takes one tile of query rows and all keys that they see, or one split of them (combine.cuh
// combines the results). next: work.cuh, softmax.cuh, host_params80.h (its parameters)
#pragma once
#include <string>

#include "config.h"
#include "mma.cuh"
#include "params.h"
#include "softmax.cuh"
#include "work.cuh"

namespace fastattn::cuda {

template <class Element_, int D_, bool FEW_> struct Forward80 : ForwardConfig80<D_, FEW_> {
    using Element = Element_;
    using Config = ForwardConfig80<D_, FEW_>;
    static constexpr int D = D_;
    static constexpr bool FEW = FEW_;
    static constexpr int ROWS = 16 * Config::BLOCKS;  // of a warp
    static constexpr int BLOCK_Q = ROWS * Config::WARPS, BLOCK_KV = Config::BLOCK_KV;
    static constexpr int THREADS = 32 * Config::WARPS;

    using QTile = Tile<BLOCK_Q, D>;
    using KVTile = Tile<BLOCK_KV, D>;

    // Shared memory, in bytes from its start: q, then keys and values of each stage.
    static constexpr int Q_AT = 0, KV_AT = QTile::BYTES;
    static constexpr int SHARED_BYTES = KV_AT + 2 * Config::STAGES * KVTile::BYTES;
    static_assert(SHARED_BYTES + SHARED_ALIGNMENT <= 99 * 1024);
};

// --- where rows lie -----------------------------------------------------------------------------

// The rows of q or out that a tile has: row r is row r / pack_gqa of head r % pack_gqa.
struct HeadRows {
    static constexpr int TOGETHER = 16;

    uint16_t* data;
    int64_t head, row;  // strides
    int first, pack_gqa;

    FASTATTN_DEVICE HeadRows(const Rows& x, const Work& w, int pack_gqa_)
        : data(x.at(w.batch, w.head, w.first_row)),
          head(x.head),
          row(x.row),
          first(w.row),
          pack_gqa(pack_gqa_) {}
    FASTATTN_DEVICE uint16_t* operator()(int i) const {
        return data + (first + i) / pack_gqa * row + (first + i) % pack_gqa * head;
    }
};

// The rows of k or v from key `first` on, each in the page that the page table names. Keys after
// `last` take its address, as their pages may not exist; they are not read.
template <int TOGETHER_> struct PagedRows {
    static constexpr int TOGETHER = TOGETHER_;

    const uint16_t* data;
    int64_t page, row;  // strides
    const int* pages;   // the sequence's row of the page table
    int page_size, first, last;

    FASTATTN_DEVICE const uint16_t* operator()(int i) const {
        int key = imin(first + i, last), in_page = key % page_size;
        return data + ld_global(pages + key / page_size) * page + in_page * row;
    }
};

// --- loads --------------------------------------------------------------------------------------

// Loads the keys of the last tile, its values, the keys of the tile before it, and so on. Each load
// is one group of copies. Shared memory has places for STAGES tiles of keys and as many of values,
// and all but one are filled ahead. Whenever a tile is taken, the next load is started into the
// place that was in use until then: the barrier in take() says that all warps are done with it.
template <class F> struct Loads {
    using T = typename F::KVTile;
    static constexpr int STAGES = F::Config::STAGES;

    const ForwardParams80& p;
    SharedAddress shared;
    const Work& w;
    int begin;  // the first tile of keys, which is taken last

    FASTATTN_DEVICE T keys(int tile) const {
        return {shared + F::KV_AT + tile % STAGES * 2 * T::BYTES};
    }
    FASTATTN_DEVICE T values(int tile) const { return {keys(tile).base + T::BYTES}; }

    // Keys past the last become zeros: their probs are 0, but 0 times NaN is NaN, and what lies
    // there may be NaN, another sequence's, or no memory at all.
    FASTATTN_DEVICE void start(T to, const Rows& x, int tile) const {
        int first = w.first_key + tile * F::BLOCK_KV;
        int count = w.band.kv_len - tile * F::BLOCK_KV;
        int kv_head = w.head / (p.heads / p.kv_heads);
        if (tile >= begin && p.page_table) {
            const int* pages = p.page_table + w.lengths_index * p.page_row;
            PagedRows<F::FEW ? 8 : 2> rows{
                // with 8, D 128 would spill where tiles have many rows
                x.at(0, kv_head, 0), x.batch, x.row, pages, p.page_size, first, first + count - 1};
            copy_rows<F::THREADS>(to, rows, 0, count);
        } else if (tile >= begin) {
            EvenRows rows{x.at(opaque(w.batch), opaque(kv_head), first), x.row};
            copy_rows<F::THREADS>(to, rows, 0, count);
        }
        copy_commit();
    }

    // Starts the loads of the last tile and before. The first group has the caller's copies of q
    // too.
    FASTATTN_DEVICE void prologue(int tile) const {
        start(keys(tile), p.k, tile);
#pragma unroll
        for (int i = 1; i < STAGES; i++) {
            start(values(tile - i + 1), p.v, tile - i + 1);
            start(keys(tile - i), p.k, tile - i);
        }
    }
    FASTATTN_DEVICE T take_keys(int tile) const {
        take(values(tile - STAGES + 1), p.v, tile - STAGES + 1);
        return keys(tile);
    }
    FASTATTN_DEVICE T take_values(int tile) const {
        take(keys(tile - STAGES), p.k, tile - STAGES);
        return values(tile);
    }
    FASTATTN_DEVICE void take(T next, const Rows& x, int tile) const {
        copy_wait<2 * STAGES - 2>();
        sync_block();
        start(next, x, tile);
    }
};

// --- a warp: 16 or 32 rows ----------------------------------------------------------------------

template <class F> struct Warp80 {
    static constexpr int BLOCKS = F::Config::BLOCKS;
    static constexpr int SCORES = F::BLOCK_KV / 2, OUTPUTS = F::D / 2;  // registers a block of rows
    using Element = typename F::Element;

    const ForwardParams80& p;
    SharedAddress shared;
    Work w;

    FASTATTN_DEVICE int pack_gqa() const { return F::FEW ? p.pack_gqa : 1; }
    // opaque(): computed at each use, since it would be spilled if it were kept in a register.
    FASTATTN_DEVICE int first_row() const { return opaque(thread_index() / 32) * F::ROWS; }
    FASTATTN_DEVICE int row_in_tile(int block, int r) const {
        int thread = thread_index_reread();
        return thread / 32 * F::ROWS + 16 * block + thread % 32 / 4 + 8 * r;
    }

    // Whether this warp's rows see none, some or all keys of a tile. Computed for each tile, since
    // the bounds would be spilled if they were kept.
    enum class Use { NONE, SOME, ALL };
    FASTATTN_DEVICE Use use_of(int tile) const {
        int row = w.row + thread_index_reread() / 32 * F::ROWS, key = tile * F::BLOCK_KV;
        if (row >= w.rows) return Use::NONE;
        int first = row / pack_gqa(), last = (imin(row + F::ROWS, w.rows) - 1) / pack_gqa();
        if (key >= w.band.hi(last) || key + F::BLOCK_KV <= w.band.lo(first)) return Use::NONE;
        bool all = key >= w.band.lo(last) && key + F::BLOCK_KV <= w.band.hi(first);
        return all ? Use::ALL : Use::SOME;
    }

    // Probs are rounded to fragments block by block: both blocks at once take 32 registers more.
    template <bool MASKED>
    FASTATTN_DEVICE void softmax_step(uint32_t (&probs)[BLOCKS][F::BLOCK_KV / 16][4],
                                      float (&s)[BLOCKS][SCORES], float (&acc)[BLOCKS][OUTPUTS],
                                      OnlineSoftmax<> (&softmax)[BLOCKS],
                                      const Transform& transform, int tile) const {
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            float rescale[2];
            int row = w.row + row_in_tile(i, 0);
            scores_to_probs<MASKED>(s[i], rescale, softmax[i], transform, w.band,
                                    {row / pack_gqa(), (row + 8) / pack_gqa()}, tile * F::BLOCK_KV);
            scale_rows(acc[i], rescale);
            to_fragments<Element, F::BLOCK_KV>(probs[i], s[i]);
        }
    }

    // Stores out through the memory of q: no other warp reads this warp's rows there.
    FASTATTN_DEVICE void store_rows(const float (&acc)[BLOCKS][OUTPUTS]) const {
        typename F::QTile out{shared + F::Q_AT};
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            uint32_t fragments[F::D / 16][4];
            to_fragments<Element, F::D>(fragments, acc[i]);
            write_fragments(out, first_row() + 16 * i, 0, fragments);
        }
        sync_warp();
        HeadRows to(p.out, w, pack_gqa());
        constexpr int CHUNKS = F::D / 8;
#pragma unroll 4
        for (int i = lane_index(); i < F::ROWS * CHUNKS; i += 32) {
            int row = first_row() + i / CHUNKS, chunk = i % CHUNKS;
            if (w.row + row < w.rows)
                st_global(reinterpret_cast<uint4*>(to(row) + 8 * chunk),
                          ld_shared4(out.chunk(row, chunk)));
        }
    }
    FASTATTN_DEVICE void store_split(const float (&acc)[OUTPUTS], int r, int64_t at) const {
        float* to = p.split_out + at * F::D + 2 * (lane_index() % 4);
#pragma unroll
        for (int i = 2 * r; i < OUTPUTS; i += 4)
            st_global(reinterpret_cast<float2*>(to + column_of(i)), float2{acc[i], acc[i + 1]});
    }

    // Normalises the rows and stores them with their lse: as the result, or as that of one split.
    FASTATTN_DEVICE void store(float (&acc)[BLOCKS][OUTPUTS], OnlineSoftmax<> (&softmax)[BLOCKS],
                               int split) const {
        bool is_split = F::FEW && p.splits > 1;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            float sinks[2], scale[2], lse[2];
            int head[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                head[r] = w.head + (w.row + row_in_tile(i, r)) % pack_gqa();
                sinks[r] = is_split ? NEGATIVE_INFINITY : sink_of(p.sinks, p.sink_type, head[r]);
            }
            softmax[i].finish(sinks, scale, lse);
            scale_rows(acc[i], scale);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = w.row + row_in_tile(i, r);
                if (row >= w.rows) continue;
                int64_t batch = is_split ? split * p.batch + w.batch : w.batch;
                int64_t at = (batch * p.heads + head[r]) * p.q_len + w.first_row + row / pack_gqa();
                if (lane_index() % 4 == 0) st_global((is_split ? p.split_lse : p.lse) + at, lse[r]);
                if (is_split) store_split(acc[i], r, at);
            }
        }
        if (!is_split) store_rows(acc);
    }

    FASTATTN_DEVICE void run(int split) {
        int last = imin(w.row + F::BLOCK_Q, w.rows) - 1;
        KeyTiles all(w.band, w.row / pack_gqa(), last / pack_gqa() + 1, F::BLOCK_KV);
        if (F::FEW && p.splits > 1) {
            int each = (all.end - all.begin + p.splits - 1) / p.splits;
            all.begin = imin(all.begin + split * each, all.end);
            all.end = imin(all.begin + each, all.end);
        }
        Transform transform{p.softcap, p.transform, p.before, p.after};
        OnlineSoftmax<> softmax[BLOCKS];
        float acc[BLOCKS][OUTPUTS];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            softmax[i].multiplier = p.multiplier;
#pragma unroll
            for (int j = 0; j < OUTPUTS; j++) acc[i][j] = 0;
        }
        typename F::QTile q{shared + F::Q_AT};
        Loads<F> loads{p, shared, w, all.begin};
        if (all.begin < all.end) {
            copy_rows<F::THREADS>(q, HeadRows(p.q, w, pack_gqa()), 0, w.rows - w.row);
            loads.prologue(all.end - 1);
        }
        for (int n = all.end - 1; n >= all.begin; n--) {
            Use use = use_of(n);
            float s[BLOCKS][SCORES] = {};
            typename F::KVTile keys = loads.take_keys(n);
            if (use != Use::NONE)
                multiply_shared<Element, Major::K, Major::K>(s, q, first_row(), keys, 0);
            typename F::KVTile values = loads.take_values(n);
            if (use == Use::NONE) continue;
            uint32_t probs[BLOCKS][F::BLOCK_KV / 16][4];
            if (use == Use::ALL)
                softmax_step<false>(probs, s, acc, softmax, transform, n);
            else
                softmax_step<true>(probs, s, acc, softmax, transform, n);
            multiply_registers<Element, Major::MN>(acc, probs, values, 0);
        }
        // Computed again for the stores: kept through the loop, it would be spilled at D 128.
        if constexpr (!F::FEW) w = Work(p, opaque(block_index()), F::BLOCK_Q);
        store(acc, softmax, split);
    }
};

// --- the kernel ---------------------------------------------------------------------------------

// SHARED_BYTES is in the kernel's name for benchmarks/compile/cuda.py, which sees no launch.
template <class F, int SHARED_BYTES = F::SHARED_BYTES> __global__ void __launch_bounds__(F::THREADS)
    forward_sm80(const __grid_constant__ ForwardParams80 p) {
    int splits = F::FEW ? p.splits : 1;
    Work w(p, block_index() / splits, F::BLOCK_Q);
    if (!w.empty()) Warp80<F>{p, dynamic_shared(), w}.run(block_index() % splits);
}

// Calls use(F{}) with the kernel F of a head dimension, with tiles for few rows or for many.
template <class Element, class Use> std::string with_forward80(int64_t dim, bool few, Use use) {
    switch (dim) {
        case 64:
            return few ? use(Forward80<Element, 64, true>{}) : use(Forward80<Element, 64, false>{});
        case 128:
            return few ? use(Forward80<Element, 128, true>{})
                       : use(Forward80<Element, 128, false>{});
        case 256:
            return few ? use(Forward80<Element, 256, true>{})
                       : use(Forward80<Element, 256, false>{});
        default:
            return "the kernels have head dimensions 64, 128 and 256";
    }
}

}  // namespace fastattn::cuda
