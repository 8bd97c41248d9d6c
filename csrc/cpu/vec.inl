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

template <class A> constexpr int SIMD_WIDTH = VECTOR_BYTES / static_cast<int>(sizeof(A));
// Columns of a packed panel: two vectors.
template <class A> constexpr int PANEL = 2 * SIMD_WIDTH<A>;

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
template <class A> INLINE Vec<A> vmax(Vec<A> x, Vec<A> y) {
#if defined(FASTATTN_AVX2) && VECTOR_BYTES == 32  // the compiler makes two instructions of it
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_max_ps((__m256)x, (__m256)y);
#elif defined(FASTATTN_AVX2)
    if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_max_ps((__m512)x, (__m512)y);
#endif
    return x > y ? x : y;
}

// spec.h says what these do and why, of vectors and of single numbers.
template <class A, class X> INLINE X to_base2(X x) {
    X near = x * A(LOG2E), low = x * A(0.5) - FAR_LOGIT<A>, high = x * A(0.5) + FAR_LOGIT<A>;
    X y = near < low ? low : near;
    return y > high ? high : y;
}
template <class A> INLINE double from_base2(double y) {  // rounded once, by the caller
    double near = y * LN2, low = 2 * (y - FAR_LOGIT<A>), high = 2 * (y + FAR_LOGIT<A>);
    double x = near < low ? low : near;
    return x > high ? high : x;
}

// Sum of all lanes, by halves down to 16 bytes. By shuffles: an accumulator whose address is taken
// would live in memory.
template <int FIRST, class V, int... LANE>
INLINE auto lanes_from(V x, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, x, FIRST + LANE...);
}
template <class A, class V> INLINE A sum_lanes(V x) {
    if constexpr (sizeof(V) > 16) {
        constexpr int HALF = sizeof(V) / sizeof(A) / 2;
        constexpr auto lanes = std::make_integer_sequence<int, HALF>{};
        return sum_lanes<A>(lanes_from<0>(x, lanes) + lanes_from<HALF>(x, lanes));
    } else if constexpr (sizeof(A) == 4) {
        return (x[0] + x[1]) + (x[2] + x[3]);
    } else {
        return x[0] + x[1];
    }
}
template <class A> INLINE A reduce_sum(Vec<A> x) { return sum_lanes<A>(x); }

// p = 2^r on [-1/2, 1/2]. float: minimax of degree 5 with p(0) = 1, within 1.6e-7. double: Taylor
// of degree 13, 1e-16.
constexpr float EXP2_SERIES[6] = {1.0f,          0.693147004f,   0.240222439f,
                                  0.0555073321f, 0.00967151299f, 0.00132647273f};
template <int N> INLINE void exp2_poly(const Vec<float>* r, Vec<float>* p) {
    for (int u = 0; u < N; u++) p[u] = r[u] * EXP2_SERIES[5] + EXP2_SERIES[4];
#pragma GCC unroll 4
    for (int k = 3; k >= 0; k--)
        for (int u = 0; u < N; u++) p[u] = p[u] * r[u] + EXP2_SERIES[k];
}
template <int N> INLINE void exp2_poly(const Vec<double>* r, Vec<double>* p) {
    double c[14] = {1.0};
    for (int k = 1; k < 14; k++) c[k] = c[k - 1] * LN2 / k;  // folded at compile time
    for (int u = 0; u < N; u++) p[u] = splat(c[13]);
    for (int k = 12; k >= 0; k--)
        for (int u = 0; u < N; u++) p[u] = p[u] * r[u] + c[k];
}

// x = 2^x for N vectors side by side, x <= 1023; exactly 0 below the normal range (so 2^-inf = 0);
// NaN stays NaN.
template <class A, int N> INLINE void vexp2(Vec<A>* x) {
    using S = SimdOf<A>;
    const Vec<A> least = splat(A(S::EXP_MIN - 1));
    Vec<A> shifted[N], r[N], p[N];
    for (int u = 0; u < N; u++) x[u] = vmax<A>(least, x[u]);
    for (int u = 0; u < N; u++) shifted[u] = x[u] + S::MAGIC;
    for (int u = 0; u < N; u++) r[u] = shifted[u] - S::MAGIC;
    for (int u = 0; u < N; u++) r[u] = x[u] - r[u];
    exp2_poly<N>(r, p);
    for (int u = 0; u < N; u++) x[u] = p[u] * (Vec<A>)((VecI<A>)shifted[u] << S::MANTISSA);
}
template <class A> INLINE Vec<A> vexp2(Vec<A> x) {
    vexp2<A, 1>(&x);
    return x;
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
    for (int i = 0; i < SIMD_WIDTH<double>; i++) y[i] = __builtin_tanh(x[i]);
    return y;
}
