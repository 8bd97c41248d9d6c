// What all backward kernels share: which query rows see a tile of keys, the arithmetic between the
// products, and in which order CTAs add to dq. Scores are transposed: in an accumulator as
// softmax.cuh describes it, a thread's two rows, 8 apart, are keys, and the columns are query rows.
// next: backward_sm90.cuh
#pragma once
#include "varlen.cuh"
#include "params.h"
#include "softmax.cuh"

namespace fastattn::cuda {

// Where register i of thread t (of 128) of a slice [64 x N] of dq lies in memory. Four registers of
// all threads lie side by side, so that each store is of 16 bytes and without bank conflicts.
constexpr FASTATTN_HD int dq_index(int t, int i) { return i / 4 * 512 + t * 4 + i % 4; }

// The same for a row and a column of the slice.
constexpr FASTATTN_HD int dq_index_of(int row, int column) {
    return dq_index(row / 16 * 32 + row % 8 * 4 + column % 8 / 2,
                    column / 8 * 4 + row % 16 / 8 * 2 + column % 2);
}

// A tile of keys, and which query rows see it. Keys and rows are counted within the segment
// (varlen.cuh).
struct KeyWork {
    int batch, kv_head, key;   // key: the tile's first
    int all_keys;              // that the segment has a place for
    int first_key, keys;       // only keys in [first_key, keys) exist
    int row_in_q, key_in_k;    // where the segment begins in q and in k
    int first_slot;            // the segment's first tile of rows, among those of a head
    Band band;                 // which counts keys from first_key
    int begin, end;            // the tiles of rows that see a key of this tile
    int full_begin, full_end;  // of these, the ones that need no mask

    // Under a causal mask the last keys come first: they are seen by the fewest rows and are done
    // soonest, and CTAs add to dq in this order, so that nobody waits. Otherwise the first keys do.
    template <class Params>
    FASTATTN_DEVICE KeyWork(const Params& p, int index, int block_q, int block_kv) {
        int slot = index % p.kv_tiles, which = index / p.kv_tiles;
        if (p.right >= 0) slot = p.kv_tiles - 1 - slot;
        kv_head = which % p.kv_heads;
        batch = which / p.kv_heads;
        int sequence = first_slot = 0;
        if (p.cu_k) {
            SequenceRows own = SequenceRows::of_slot(cu_of(p.cu_k, p, batch), p.sequences, p.kv_len,
                                                     slot, block_kv);
            sequence = own.number;
            slot -= own.first_slot;
            SequenceRows theirs(cu_of(p.cu_q, p, batch), p.sequences, p.q_len, sequence, block_q);
            first_slot = theirs.first_slot;
        }
        Segment segment(p, batch, sequence);
        row_in_q = segment.first_row;
        key_in_k = segment.first_key;
        all_keys = segment.places;
        first_key = segment.begin;
        keys = segment.end;
        key = slot * block_kv;
        band = {p.left, p.right, segment.offset - first_key, segment.rows, keys - first_key};
        int low = imax(key, first_key), high = imin(key + block_kv, keys);
        begin = end = full_begin = full_end = 0;
        if (low >= high) return;
        Range range = band.q_range(low - first_key, high - first_key);
        if (range.begin >= range.end) return;
        begin = range.begin / block_q;
        end = imax(begin, (range.end + block_q - 1) / block_q);
        bool whole = low == key && high == key + block_kv;
        if (ld_global(p.large + batch * p.kv_heads + kv_head)) whole = false;
        full_begin = whole ? imin(end, (range.full_begin + block_q - 1) / block_q) : end;
        full_end = whole ? imax(full_begin, range.full_end / block_q) : end;
    }
    FASTATTN_DEVICE bool empty() const { return key >= all_keys; }

    // The number of the segment's tile m of rows among all tiles of all heads.
    template <class Params>
    FASTATTN_DEVICE int64_t row_tile(const Params& p, int head, int m) const {
        return (static_cast<int64_t>(batch) * p.heads + head) * p.q_tiles + first_slot + m;
    }

    // How many tiles of keys add to tile m of rows before this one: those between it and the first
    // (under a causal mask the last) that the rows see. This CTA adds when the semaphore has this
    // value.
    FASTATTN_DEVICE int semaphore_value(int m, int block_q, int block_kv) const {
        int tile = key / block_kv;
        if (band.right < 0) return tile - (first_key + band.lo(m * block_q)) / block_kv;
        int last_row = imin((m + 1) * block_q, band.q_len) - 1;
        return (first_key + band.hi(last_row) - 1) / block_kv - tile;
    }
};

// Products k q^T become probs^T, computed again from lse. key: the first of the thread's two; row:
// the first of the tile's columns; lse: of the tile's rows, in base 2.
template <bool MASKED, int SIZE>
FASTATTN_DEVICE void recompute_probs(float (&s)[SIZE], const Transform& transform, float multiplier,
                                     const KeyWork& w, int key, int row, SharedAddress lse) {
    int column = 2 * (lane_index() % 4);
    transform(s);
    if constexpr (MASKED) {
        int low[2], high[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int of = key + 8 * r;
            bool exists = of >= w.first_key && of < w.keys;
            low[r] = w.band.first_row(of - w.first_key) - row - column;
            high[r] = exists ? w.band.last_row(of - w.first_key) - row - column : -column;
        }
        mask_scores(s, low, high);
    }
    // Only where MASKED are probs clamped to 1. Heads with an |lse| of LARGE_LSE or more take this
    // path for all tiles.
    auto prob = [&](float score, float of) {
        float exponent = score * multiplier - of;
        return exp2_approx(MASKED && exponent > 0 ? 0 : exponent);  // a NaN stays NaN
    };
#pragma unroll
    for (int i = 0; i < SIZE; i += 4) {
        float2 of = ld_shared2(lse + 4 * (column_of(i) + column));
        s[i] = prob(s[i], of.x);
        s[i + 1] = prob(s[i + 1], of.y);
        s[i + 2] = prob(s[i + 2], of.x);
        s[i + 3] = prob(s[i + 3], of.y);
    }
}

// dprobs^T become dscores^T. The derivative of a softcap is 1 - tanh^2, and the tanh is recovered
// from the prob: log2(prob) + lse = after * tanh.
template <int SIZE> FASTATTN_DEVICE void differentiate(float (&d)[SIZE], const float (&probs)[SIZE],
                                                       const Transform& transform,
                                                       SharedAddress lse, SharedAddress delta) {
    int column = 2 * (lane_index() % 4);
#pragma unroll
    for (int i = 0; i < SIZE; i += 4) {
        float2 of = ld_shared2(delta + 4 * (column_of(i) + column));
        d[i] = probs[i] * (d[i] - of.x);
        d[i + 1] = probs[i + 1] * (d[i + 1] - of.y);
        d[i + 2] = probs[i + 2] * (d[i + 2] - of.x);
        d[i + 3] = probs[i + 3] * (d[i + 3] - of.y);
    }
    if (!transform.softcap) return;
    float inverse = 1 / transform.after;
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
        float tanh = log2_approx(probs[i]) + ld_shared(lse + 4 * (column_of(i) + column));
        tanh *= inverse;
        d[i] = probs[i] > 0 ? d[i] * (1 - tanh * tanh) : 0;
    }
}

}  // namespace fastattn::cuda
