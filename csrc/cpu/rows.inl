// What the row kernels share: rows read into vectors of the arithmetic type and rounded once when
// they are stored, and the dropout of a row.
// next: activate.inl, fused.inl

// --- whole and partial vectors ------------------------------------------------------------------

template <class A> INLINE void store_as(A* p, Vec<A> x) { store<A>(p, x); }
template <class A> INLINE void store_as(bf16* p, Vec<A> x) {
    WordW bits = (WordW)x;
    WordW rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    WordW nan = bits >> 16 | 0x40;
    *reinterpret_cast<HalfW*>(p) = __builtin_convertvector(x == x ? rounded : nan, HalfW);
}
template <class A> INLINE void store_as(f16* p, Vec<A> x) {
#if defined(FASTATTN_AVX2) && VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(FASTATTN_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
    for (int i = 0; i < SIMD_WIDTH<A>; i++) p[i] = from_float<f16>(x[i]);
#endif
}

// The next lanes of a row of which `left` values remain; lanes past them are `fill`.
template <class A, class T> INLINE Vec<A> take(const T* p, int left, A fill = 0) {
    if (left >= SIMD_WIDTH<A>) return load_as<A>(p);
    Vec<A> x = splat(fill);
    for (int i = 0; i < left; i++) x[i] = to_float(p[i]);
    return x;
}
template <class A, class T> INLINE void put(T* p, Vec<A> x, int left) {
    if (left >= SIMD_WIDTH<A>) return store_as<A>(p, x);
    for (int i = 0; i < left; i++) {
        if constexpr (sizeof(T) == sizeof(A))
            p[i] = x[i];
        else
            p[i] = from_float<T>(x[i]);
    }
}

// Calls f(i, left, k) for each vector of a row of n values: i is its first value, left as for take,
// and k counts 0 to 3 over and over, to choose one of four sums that do not wait for each other.
// All but i are constants where the row has whole vectors.
template <class A, class F> INLINE void over(int n, const F& f) {
    constexpr int L = SIMD_WIDTH<A>;
    int i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
        f(i, L, 0);
        f(i + L, L, 1);
        f(i + 2 * L, L, 2);
        f(i + 3 * L, L, 3);
    }
    for (; i + L <= n; i += L) f(i, L, 0);
    if (i < n) f(i, n - i, 1);
}
template <class A> struct Sums {
    Vec<A> part[4] = {};
    INLINE_MEMBER Vec<A>& operator[](int k) { return part[k]; }
    INLINE_MEMBER A total() const {
        return reduce_sum<A>((part[0] + part[1]) + (part[2] + part[3]));
    }
};

template <class T> INLINE T* row_of(const Rows& rows, int64_t r) {
    return rows.data == nullptr ? nullptr : reinterpret_cast<T*>(rows.data) + r * rows.stride;
}

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

// --- dropout of a row ---------------------------------------------------------------------------
// Element (row, column) is kept by 16 bits of Philox: one call of philox8 serves a block of 64
// columns. Counter 0 is block * 8 + column % 8, counters 1 and 2 the row, counter 3 the offset;
// columns 8 w to 8 w + 7 of a block have half w % 2 of word w / 2. The twin is
// fastattn/core/philox.py.

constexpr int DROPOUT_BLOCK = 64;

struct RowDropout {
    PhiloxKeys keys;
    uint32_t counter3;
    Philox8 threshold;
    double scale;

    INLINE_MEMBER explicit RowDropout(const DropoutKey& key)
        : keys(key),
          counter3(key.counter3),
          threshold(Philox8{} + key.threshold),
          scale(1 / key.keep_probability()) {}

    // kept[j] of columns block * DROPOUT_BLOCK + j: 0 or 1
    INLINE_MEMBER void block(int64_t row, int block, float* kept) const {
        Philox8 w[4];
        philox8(keys, static_cast<uint32_t>(block) * 8, static_cast<uint32_t>(row),
                static_cast<uint32_t>(row >> 32), counter3, w);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            Philox8 bits = k % 2 ? w[k / 2] >> 16 : w[k / 2] & 0xffff;
            Float8 z = bits < threshold ? Float8{} + 1.0f : Float8{};
            *reinterpret_cast<Float8Unaligned*>(kept + 8 * k) = z;
        }
    }
};

// over(), with f(i, left, factors): what a row's dropout multiplies the vector by.
template <class A, class F>
INLINE void over_dropped(const RowDropout& dropout, int64_t row, int n, const F& f) {
    const A scale = static_cast<A>(dropout.scale);
    float kept[DROPOUT_BLOCK];
    for (int begin = 0; begin < n; begin += DROPOUT_BLOCK) {
        dropout.block(row, begin / DROPOUT_BLOCK, kept);
        auto step = [&](int i, int left, int)
                        INLINE_LAMBDA { f(begin + i, left, load_dropout<A>(kept + i) * scale); };
        if (n - begin >= DROPOUT_BLOCK)
            over<A>(DROPOUT_BLOCK, step);
        else
            over<A>(n - begin, step);
    }
}
