// Vectors of one instruction set, written in the compiler's vector extension: the same source is
// AVX-512, AVX2 or SSE2 by VECTOR_BYTES and the target of the file that includes it.
// next: gemm.inl

template <class A> struct SimdOf;
template <> struct SimdOf<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t UnalignedI __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    // 1.5 * 2^23 + 127: adding it rounds to an integer n, and leaves n + 127, the exponent field of
    // 2^n, in the low bits.
    static constexpr float MAGIC = 12582912.0f + 127.0f;
    static constexpr float EXP_MIN = -126.0f;  // below: 2^x is subnormal, returned as 0
    static constexpr int MANTISSA = 23;
};
template <> struct SimdOf<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t UnalignedI __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    static constexpr double MAGIC = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52 + 1023
    static constexpr double EXP_MIN = -1022.0;
    static constexpr int MANTISSA = 52;
};
template <class A> using Vec = typename SimdOf<A>::V;
template <class A> using VecI = typename SimdOf<A>::I;

template <class A> constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(A));
template <class A> constexpr int PANEL = 2 * LANES<A>;  // columns of a packed panel: two vectors

constexpr float NEG_INF = -__builtin_inff();

template <class A> INLINE Vec<A> load(const A* p) {
    return *reinterpret_cast<const typename SimdOf<A>::Unaligned*>(p);
}
template <class A> INLINE void store(A* p, Vec<A> x) {
    *reinterpret_cast<typename SimdOf<A>::Unaligned*>(p) = x;
}
template <class A> INLINE VecI<A> load_int(const IntOf<A>* p) {
    return *reinterpret_cast<const typename SimdOf<A>::UnalignedI*>(p);
}
template <class A> INLINE Vec<A> splat(A x) { return x - Vec<A>{}; }
template <class A> INLINE VecI<A> splat_int(IntOf<A> x) { return x - VecI<A>{}; }
// NaN in x loses against y, which keeps a NaN score from becoming the row's maximum.
template <class A> INLINE Vec<A> vmax(Vec<A> x, Vec<A> y) { return x > y ? x : y; }

// Sum of all lanes, by halves down to 16 bytes.
template <class A, int BYTES> struct Halves {
    typedef A V __attribute__((vector_size(BYTES)));
    static INLINE_MEMBER A sum(V x) {
        if constexpr (BYTES > 16) {
            using Half = Halves<A, BYTES / 2>;
            typename Half::V low, high;
            __builtin_memcpy(&low, &x, BYTES / 2);
            __builtin_memcpy(&high, reinterpret_cast<const char*>(&x) + BYTES / 2, BYTES / 2);
            return Half::sum(low + high);
        } else if constexpr (sizeof(A) == 4) {
            return (x[0] + x[1]) + (x[2] + x[3]);
        } else {
            return x[0] + x[1];
        }
    }
};
template <class A> INLINE A reduce_sum(Vec<A> x) { return Halves<A, VECTOR_BYTES>::sum(x); }

// 2^r on [-1/2, 1/2]. float: minimax of degree 6, 0.93 ulp. double: Taylor of degree 13, 1e-16.
INLINE Vec<float> exp2_poly(Vec<float> r) {
    Vec<float> p = splat(1.5353362e-4f);
    p = p * r + 1.3398875e-3f;
    p = p * r + 9.61843692e-3f;
    p = p * r + 5.55033237e-2f;
    p = p * r + 2.40226477e-1f;
    p = p * r + 6.93147182e-1f;
    return p * r + 1.0f;
}
INLINE Vec<double> exp2_poly(Vec<double> r) {
    Vec<double> p = splat(0.0);
    double c[14] = {1.0};
    for (int k = 1; k < 14; k++) c[k] = c[k - 1] * LN2 / k;  // folded at compile time
    for (int k = 13; k >= 0; k--) p = p * r + c[k];
    return p;
}

// 2^x for x <= 1023; exactly 0 below the normal range (so 2^-inf = 0); NaN stays NaN.
template <class A> INLINE Vec<A> vexp2(Vec<A> x) {
    using S = SimdOf<A>;
    Vec<A> shifted = x + S::MAGIC;
    Vec<A> r = x - (shifted - S::MAGIC);  // NaN or worse below EXP_MIN, where it is not used
    Vec<A> power = (Vec<A>)((VecI<A>)shifted << S::MANTISSA);
    Vec<A> scaled = exp2_poly(r) * power;
    return x < S::EXP_MIN ? Vec<A>{} : scaled;
}

// tanh(x) for x >= 0 small: odd minimax; else 1 - 2 / (e^2x + 1). Relative error 3e-7.
INLINE Vec<float> vtanh(Vec<float> x) {
    Vec<float> magnitude = x < 0.0f ? -x : x;
    Vec<float> x2 = x * x;
    Vec<float> series = splat(TANH_SERIES[5]);
    for (int k = 4; k >= 0; k--) series = series * x2 + TANH_SERIES[k];
    series = x + x * x2 * series;
    Vec<float> capped = magnitude > 10.0f ? splat(10.0f) : magnitude;
    Vec<float> e = vexp2<float>(capped * float(2 * LOG2E));
    Vec<float> tail = 1.0f - 2.0f / (e + 1.0f);
    tail = x < 0.0f ? -tail : tail;
    Vec<float> y = magnitude < 0.625f ? series : tail;
    return x == x ? y : x;  // NaN stays NaN
}
INLINE Vec<double> vtanh(Vec<double> x) {
    Vec<double> y = x;
    for (int i = 0; i < LANES<double>; i++) y[i] = __builtin_tanh(x[i]);
    return y;
}
