// What one attention call computes, in the form every kernel uses: a mask is an interval of keys
// per row. The Python twin is fastattn/core/spec.py; tests hold the two equal.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTATTN_HD __host__ __device__ __forceinline__
#else
#define FASTATTN_HD inline
#endif

namespace fastattn {

constexpr double LOG2E = 1.4426950408889634;  // kernels work in base 2: exp(x) = exp2(x * LOG2E)
constexpr double LN2 = 0.6931471805599453;

// A logit may be as large as the largest finite number (finfo.min is a usual padding mask). Times
// LOG2E it would be infinite, which means masked. So to_base2() has slope 1/2 past 9e37 in float32:
// clamp(x * LOG2E, x / 2 - FAR, x / 2 + FAR). It is strictly increasing, keeps infinities, leaves
// room for ALiBi and the product, and has an inverse. The smaller slope changes no result: numbers
// of that size are 1e31 apart, so the larger of two logits has probability 1 with any slope. FAR
// is an odd multiple of half an ulp of x there, so that the largest number is mapped exactly, and
// back.
template <class A> constexpr A FAR_LOGIT = A(0);
template <> inline constexpr float FAR_LOGIT<float> = 0x1p126f - 0x1p103f;
template <> inline constexpr double FAR_LOGIT<double> = 0x1p1022 - 0x1p970;

// Bounds ALiBi's slopes in base 2: times a distance, which is below 2^30, every sum stays finite.
constexpr double MAX_SLOPE = 0x1p95;

// Bounds of scale and softcap: beyond them products of float32 numbers overflow and give NaN.
constexpr double MAX_SCALE = 1e30, MIN_SOFTCAP = 1e-30, MAX_SOFTCAP = 1e30;

constexpr FASTATTN_HD int imin(int a, int b) { return a < b ? a : b; }
constexpr FASTATTN_HD int imax(int a, int b) { return a > b ? a : b; }

// Half-open range of keys (or rows) that a tile needs; all of [full_begin, full_end) is visible to
// every row (key) of the tile, so only what lies outside needs a mask.
struct Range {
    int begin, full_begin, full_end, end;
};

// Row i sees keys [lo(i), hi(i)). Neither ever decreases with i. Lengths and windows stay below
// 2^30 (checked where tensors come in), so no sum here overflows.
struct Band {
    int left, right;  // keys visible behind and ahead of the diagonal; -1: unbounded
    int offset;       // the diagonal of row i is key i + offset
    int q_len, kv_len;

    constexpr FASTATTN_HD int clamp_key(int j) const { return imax(0, imin(kv_len, j)); }
    constexpr FASTATTN_HD int clamp_row(int i) const { return imax(0, imin(q_len, i)); }

    constexpr FASTATTN_HD int lo(int i) const {
        return left < 0 ? 0 : clamp_key(i + offset - left);
    }
    constexpr FASTATTN_HD int hi(int i) const {
        return right < 0 ? kv_len : clamp_key(i + offset + right + 1);
    }
    constexpr FASTATTN_HD bool visible(int i, int j) const { return lo(i) <= j && j < hi(i); }

    // The first and last row of a tile bound those between.
    constexpr FASTATTN_HD Range kv_range(int row_begin, int row_end) const {
        return {lo(row_begin), lo(row_end - 1), hi(row_begin), hi(row_end - 1)};
    }

    // The transpose: the rows that see key j.
    constexpr FASTATTN_HD int first_row(int j) const {
        return right < 0 ? 0 : clamp_row(j - offset - right);
    }
    constexpr FASTATTN_HD int last_row(int j) const {
        return left < 0 ? q_len : clamp_row(j - offset + left + 1);
    }
    constexpr FASTATTN_HD Range q_range(int key_begin, int key_end) const {
        return {first_row(key_begin), first_row(key_end - 1), last_row(key_begin),
                last_row(key_end - 1)};
    }
};

static_assert(Band{-1, 0, 0, 4, 4}.visible(2, 2) && !Band{-1, 0, 0, 4, 4}.visible(2, 3));

}  // namespace fastattn
