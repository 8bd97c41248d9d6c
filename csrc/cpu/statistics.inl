// What the forward pass keeps of its rows beside their maxima and sums, where a call asks for it.
// next: forward.inl
//
// Entropy: with P = exp2(s - m), where m is the largest score so far, a row sums P and P (s - m).
// When m grows by d, the second sum becomes (itself - d * sum of P) * exp2(-d). In the end
//   entropy = log(sum of P) - log(2) * (sum of P (s - m)) / (sum of P)
// has two terms that are never negative, so nothing cancels.

// The lanes of a comparison that are true, a bit each.
template <class A> INLINE uint32_t lanes_of(VecI<A> x) {
#if defined(FASTATTN_AVX2) && VECTOR_BYTES == 32
    if constexpr (sizeof(A) == 8) return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)x));
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)x));
#elif defined(FASTATTN_AVX2)
    if constexpr (sizeof(A) == 8) return _mm512_test_epi64_mask((__m512i)x, (__m512i)x);
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#else
    uint32_t lanes = 0;
    for (int i = 0; i < SIMD_WIDTH<A>; i++) lanes |= static_cast<uint32_t>(x[i] & 1) << i;
    return lanes;
#endif
}

template <class A> INLINE void store_int(IntOf<A>* p, VecI<A> x) {
    *reinterpret_cast<typename SimdOf<A>::UnalignedI*>(p) = x;
}

// Of a forward pass that is asked for none. Its functions cost nothing.
struct NoStatistics {
    static constexpr bool ON = false;
};

template <class A> struct RowStatistics {
    static constexpr bool ON = true;
    bool need_argmax;
    alignas(64) A weighted[BLOCK_Q];       // the sum of P (s - m)
    alignas(64) IntOf<A> argmax[BLOCK_Q];  // the first key with the largest score
};

// The first of keys [begin, end) whose score is the rows' new maximum, where that has grown. `s`
// are the scores from key `key` on.
template <class A> INLINE void find_largest(RowStatistics<A>& r, int tile_row, const A* s,
                                            int64_t ld, int begin, int end, int key, Vec<A> old_max,
                                            Vec<A> row_max) {
    VecI<A> grown = row_max > old_max;
    if (!r.need_argmax || lanes_of<A>(grown) == 0) return;
    VecI<A> at = {};
    for (int j = end - 1; j >= begin; j--)
        at = load<A>(s + j * ld) == row_max ? splat_int<A>(key + j) : at;
    store_int<A>(r.argmax + tile_row, grown ? at : load_int<A>(r.argmax + tile_row));
}

template <class A> static void begin_statistics(const Params& p, int rows, RowStatistics<A>& r) {
    r.need_argmax = p.argmax.data != nullptr;
    for (int i = 0; i < rows; i++) r.weighted[i] = r.argmax[i] = 0;
}

// s - m of a score that is hidden, and whose P is 0, is not -inf: 0 * -inf is NaN.
template <class A> INLINE Vec<A> finite_exponent(Vec<A> x) {
    return vmax<A>(splat(A(SimdOf<A>::EXP_MIN - 1)), x);
}

// The rows' sums of P (s - m), after those of P have been rescaled from old_max to row_max.
template <class A> INLINE void add_weighted(RowStatistics<A>& r, int tile_row, Vec<A> old_sum,
                                            Vec<A> grown_by, Vec<A> rescale, Vec<A> added) {
    Vec<A> before = (load<A>(r.weighted + tile_row) - old_sum * grown_by) * rescale;
    // of a row that had seen nothing, and so grows by infinity, there is nothing to rescale
    store<A>(r.weighted + tile_row, (old_sum == 0 ? Vec<A>{} : before) + added);
}
