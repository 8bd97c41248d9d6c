// The matrix product of every kernel: C[R rows][PANEL columns] (+)= A[R][depth] * B[depth][PANEL].
// next: pack.inl
//
// 6 rows x 2 vectors: 12 accumulators + 2 of B + 1 of A fill AVX2's 16 registers, and 12 chains of
// latency 4 keep both FMA ports busy. A is read element by element and broadcast, so it needs no
// packing and may be a transpose: by rows (element (i, k) at a[i * lda + k]) or by columns
// (a[k * lda + i]).

enum class Order { ROWS, COLUMNS };
enum class Store { SET, ADD, RESCALE };  // C = AB, C += AB, C = C * rescale[i] + AB

constexpr int GEMM_ROWS = 6;

constexpr int BLOCK_Q = 96;   // rows of a tile: a multiple of every PANEL and of GEMM_ROWS
constexpr int BLOCK_KV = 96;  // keys of a tile: a multiple of GEMM_ROWS

template <int R, Order ORDER, Store STORE, class A, class T>
INLINE void micro(int depth, const A* a, int64_t lda, const T* b, int64_t ldb, A* c, int64_t ldc,
                  const A* rescale) {
    Vec<A> acc[R][2] = {};
    constexpr int W = SIMD_WIDTH<A>;
#pragma GCC unroll 4
    for (int k = 0; k < depth; k++) {
        Vec<A> b0 = load_as<A>(b + k * ldb), b1 = load_as<A>(b + k * ldb + W);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++) {
            Vec<A> x = splat(ORDER == Order::ROWS ? a[i * lda + k] : a[k * lda + i]);
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
        A* row = c + i * ldc;
        Vec<A> c0 = acc[i][0], c1 = acc[i][1];
        if (STORE == Store::ADD) {
            c0 += load<A>(row);
            c1 += load<A>(row + W);
        } else if (STORE == Store::RESCALE) {
            c0 += load<A>(row) * rescale[i];
            c1 += load<A>(row + W) * rescale[i];
        }
        store<A>(row, c0);
        store<A>(row + W, c1);
    }
}

// Any number of rows up to GEMM_ROWS.
template <Order ORDER, Store STORE, class A, class T>
INLINE void micro_rows(int rows, int depth, const A* a, int64_t lda, const T* b, int64_t ldb, A* c,
                       int64_t ldc, const A* rescale = nullptr) {
    switch (rows) {
        case 6:
            return micro<6, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
        case 5:
            return micro<5, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
        case 4:
            return micro<4, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
        case 3:
            return micro<3, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
        case 2:
            return micro<2, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
        case 1:
            return micro<1, ORDER, STORE>(depth, a, lda, b, ldb, c, ldc, rescale);
    }
}

// The bf16 dot product: acc += a.low * b.low + a.high * b.high, a pair of bf16 to a 32-bit word.
// VDPBF16PS does it in one instruction; elsewhere it is two fp32 products, which are exact.
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

INLINE Vec<float> dot_pairs(Vec<float> acc, Words a, Words b) {
#if FASTATTN_BF16_DOT && VECTOR_BYTES == 64
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    acc += (Vec<float>)(a << 16) * (Vec<float>)(b << 16);
    return acc + (Vec<float>)(a & 0xffff0000u) * (Vec<float>)(b & 0xffff0000u);
#endif
}

// C (+)= factor * A B as micro() with Order::ROWS, on bf16: B holds pairs along the depth.
template <int R, Store STORE> INLINE void micro_pairs(int depth, const uint16_t* a, int64_t lda,
                                                      const uint32_t* b, float* c, int64_t ldc,
                                                      float factor) {
    Vec<float> acc[R][2] = {};
    constexpr int W = SIMD_WIDTH<float>;
    for (int k = 0; k < depth; k += 2, b += PANEL<float>) {
        Words b0, b1;
        __builtin_memcpy(&b0, b, sizeof b0);
        __builtin_memcpy(&b1, b + W, sizeof b1);
        for (int i = 0; i < R; i++) {
            uint32_t pair = a[i * lda + k];  // an odd depth ends with half a pair
            if (k + 1 < depth) __builtin_memcpy(&pair, a + i * lda + k, sizeof pair);
            Words x = Words{} + pair;
            acc[i][0] = dot_pairs(acc[i][0], x, b0);
            acc[i][1] = dot_pairs(acc[i][1], x, b1);
        }
    }
    for (int i = 0; i < R; i++) {
        float* row = c + i * ldc;
        Vec<float> c0 = acc[i][0] * factor, c1 = acc[i][1] * factor;
        if (STORE == Store::ADD) {
            c0 += load<float>(row);
            c1 += load<float>(row + W);
        }
        store<float>(row, c0);
        store<float>(row + W, c1);
    }
}
