// Storage types to the type of arithmetic and back. bf16 and fp16 become fp32 as they are loaded
// and are rounded (to nearest, ties to even) once, when a result is stored.
// next: pack.inl

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

typedef uint16_t Half8 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint32_t Word8 __attribute__((vector_size(32), aligned(4)));
typedef uint16_t HalfW __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t WordW __attribute__((vector_size(VECTOR_BYTES)));

INLINE float to_float(bf16 x) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
INLINE float to_float(f16 x) {
#if defined(FASTATTN_AVX2)
    return _cvtsh_ss(x.bits);
#else
    // Shift exponent and mantissa into place, then scale the exponent bias away: exact for
    // subnormals too. Inf and NaN get the full fp32 exponent.
    uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
    float y = __builtin_bit_cast(float, magnitude) * 0x1p112f;
    uint32_t bits = __builtin_bit_cast(uint32_t, y);
    if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000u;
    return __builtin_bit_cast(float, bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}
INLINE float to_float(float x) { return x; }
INLINE double to_float(double x) { return x; }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
#if defined(FASTATTN_AVX2)
    return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
    uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x7f800000)
        return {static_cast<uint16_t>(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00))};
    if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
    if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds at its last bit
        float y = __builtin_bit_cast(float, bits) + 0.5f;
        return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, y) - 0x3f000000))};
    }
    bits += 0xc8000fff + (bits >> 13 & 1);
    return {static_cast<uint16_t>(sign | bits >> 13)};
#endif
}

// A vector of A from memory of type T.
template <class A> INLINE Vec<A> load_as(const A* p) { return load<A>(p); }
template <class A> INLINE Vec<A> load_as(const bf16* p) {
    WordW wide = __builtin_convertvector(*reinterpret_cast<const HalfW*>(p), WordW);
    return (Vec<A>)(wide << 16);
}
template <class A> INLINE Vec<A> load_as(const f16* p) {
#if defined(FASTATTN_AVX2) && VECTOR_BYTES == 64
    return (Vec<A>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(FASTATTN_AVX2)
    return (Vec<A>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<A> x = {};
    for (int i = 0; i < SIMD_WIDTH<A>; i++) x[i] = to_float(p[i]);
    return x;
#endif
}

template <class A, class T> INLINE void convert_row(const T* from, A* to, int n) {
    int i = 0;
    for (; i + SIMD_WIDTH<A> <= n; i += SIMD_WIDTH<A>) store<A>(to + i, load_as<A>(from + i));
    for (; i < n; i++) to[i] = to_float(from[i]);
}

// Calls f with a null pointer of the storage type that `dtype` names under arithmetic type A.
template <class A, class F> INLINE void with_type(Dtype dtype, F f) {
    if constexpr (sizeof(A) == 8) {
        f(static_cast<double*>(nullptr));
    } else {
        switch (dtype) {
            case Dtype::BF16:
                return f(static_cast<bf16*>(nullptr));
            case Dtype::F16:
                return f(static_cast<f16*>(nullptr));
            default:
                return f(static_cast<float*>(nullptr));
        }
    }
}

template <class A> INLINE void store_row(const A* from, A factor, Dtype dtype, char* to, int n) {
    with_type<A>(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* row = reinterpret_cast<T*>(to);
        if constexpr (sizeof(T) == sizeof(A)) {
            for (int i = 0; i < n; i++) row[i] = from[i] * factor;
        } else {
            for (int i = 0; i < n; i++) row[i] = from_float<T>(from[i] * factor);
        }
    });
}
