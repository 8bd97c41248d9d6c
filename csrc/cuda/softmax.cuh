// The online softmax: scores arrive tile by tile, in accumulators [64 x N] of a warpgroup or [16 x
// N] of a warp. Each thread holds elements of two rows, 8 apart, and the columns of a row are
// spread over four neighbouring lanes. next: forward_sm90.cuh, forward_sm80.cuh
#pragma once
#include "../spec.h"
#include "params.h"
#include "ptx.cuh"

namespace fastattn::cuda {

constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();

// Logits in base 2 and back; spec.h explains the clamps.
FASTATTN_DEVICE float to_base2(float x) {
    float far = x * 0.5f, near = x * static_cast<float>(LOG2E);
    return fminf(fmaxf(near, far - FAR_LOGIT<float>), far + FAR_LOGIT<float>);
}
FASTATTN_DEVICE float from_base2(float y) {
    float low = 2 * (y - FAR_LOGIT<float>), high = 2 * (y + FAR_LOGIT<float>);
    return fminf(fmaxf(y * static_cast<float>(LN2), low), high);
}

// Element i of a thread's accumulator: which of its two rows it is in, and its column, if the lane
// is the first of the four.
constexpr FASTATTN_HD int row_of(int i) { return i / 2 % 2; }
constexpr FASTATTN_HD int column_of(int i) { return i / 4 * 8 + i % 2; }

// What is done to q k before the softmax, where a positive multiplier in the exponent is not
// enough: softcap(x) = cap * tanh(x / cap), in base 2 as all scores; or the scale, if it is not
// positive (the largest product is not the largest score then) or above MAX_MULTIPLIER.
struct Transform {
    bool softcap, on;
    float before, after;

    // Takes in the descale of FP8 operands, by which each product has to be multiplied, and returns
    // the new multiplier.
    FASTATTN_DEVICE float descale(float multiplier, float by) {
        if (softcap) {
            before *= by;
        } else if (on) {
            after *= by;
        } else if (by > 0 && multiplier * by <= MAX_MULTIPLIER) {
            multiplier *= by;
        } else {
            on = true;
            after = multiplier * by;
            multiplier = 1;
        }
        return multiplier;
    }
    template <int SIZE> FASTATTN_DEVICE void operator()(float (&s)[SIZE]) const {
        if (!on) return;
        if (softcap) {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                float e = exp2_approx(s[i] * before);  // before: 2 log2(e) scale / cap
                s[i] = after - 2 * after * reciprocal_approx(1 + e);
            }
        } else {
#pragma unroll
            for (int i = 0; i < SIZE; i++) s[i] *= after;
        }
    }
};

// The running maximum and sum of a thread's two rows. Probs and their sums are computed times
// 2^PROBS_LOG2: probs that are rounded to FP8 use its range so, the largest being 2^PROBS_LOG2.
template <int PROBS_LOG2 = 0> struct OnlineSoftmax {
    float row_max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};  // of scores before `multiplier`
    float row_sum[2] = {0, 0};                                  // of this thread's columns only
    float multiplier;  // score * multiplier is an exponent of base 2

    // Scores become probs. The caller's accumulator has to be multiplied by `rescale`, as the sums
    // are here. MASKED: rows may have seen no key yet, so that row_max may be -inf.
    template <bool MASKED, int SIZE>
    FASTATTN_DEVICE void update(float (&s)[SIZE], float (&rescale)[2]) {
        float shift[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = row_max[r];
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                if (row_of(i) == r) m = fmaxf(m, s[i]);
            m = fmaxf(m, shuffle_xor(m, 1));
            m = fmaxf(m, shuffle_xor(m, 2));
            float safe = MASKED && m == NEGATIVE_INFINITY ? 0 : m;
            float top = safe * multiplier;
            rescale[r] = exp2_approx(row_max[r] * multiplier - top);
            shift[r] = top - PROBS_LOG2;
            row_max[r] = m;
            row_sum[r] *= rescale[r];
        }
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            s[i] = exp2_approx(s[i] * multiplier - shift[row_of(i)]);
            row_sum[row_of(i)] += s[i];
        }
    }

    // After the last tile: out_scale is what the accumulator has to be multiplied by; lse is in
    // base e, and -inf for a row that sees no key. A row's sink is a logit that joins the
    // denominator only; it is -inf where there is none.
    FASTATTN_DEVICE void finish(const float (&sinks)[2], float (&out_scale)[2], float (&lse)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = row_sum[r];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (row_max[r] == NEGATIVE_INFINITY) {
                out_scale[r] = 0;
                lse[r] = NEGATIVE_INFINITY;
                continue;
            }
            float top = row_max[r] * multiplier, sink2 = to_base2(sinks[r]);
            float m = fmaxf(top, sink2);
            float rescale = exp2_approx(top - m);
            float base = m - PROBS_LOG2;
            sum = sum * rescale + exp2_approx(sink2 - base);
            out_scale[r] = rescale / sum;
            lse[r] = from_base2(base + log2_approx(sum));
        }
    }
};

// Scores of keys outside [low, high) become -inf. Both bounds, one for each of the thread's two
// rows, are counted from the first column that this thread has.
template <int SIZE>
FASTATTN_DEVICE void mask_scores(float (&s)[SIZE], const int (&low)[2], const int (&high)[2]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++)
        if (column_of(i) < low[row_of(i)] || column_of(i) >= high[row_of(i)])
            s[i] = NEGATIVE_INFINITY;
}

// A softmax step: products of rows and keys become probs, masked by the band. rows: the thread's
// two, as the band counts them; first: the tile's first key.
template <bool MASKED, int PROBS_LOG2, int SIZE>
FASTATTN_DEVICE void scores_to_probs(float (&s)[SIZE], float (&rescale)[2],
                                     OnlineSoftmax<PROBS_LOG2>& softmax, const Transform& transform,
                                     const Band& band, const int (&rows)[2], int first) {
    transform(s);
    if constexpr (MASKED) {
        first += 2 * (lane_index() % 4);
        int low[2], high[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            low[r] = band.lo(rows[r]) - first;
            high[r] = band.hi(rows[r]) - first;
        }
        mask_scores(s, low, high);
    }
    softmax.template update<MASKED>(s, rescale);
}

template <int SIZE> FASTATTN_DEVICE void scale_rows(float (&acc)[SIZE], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) acc[i] *= by[row_of(i)];
}

}  // namespace fastattn::cuda
