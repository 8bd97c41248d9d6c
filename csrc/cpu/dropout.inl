// Dropout's factors for a tile, from Philox: philox.h says which score has which bits.
// next: forward.inl

typedef uint32_t Philox8 __attribute__((vector_size(32)));
typedef uint64_t Wide4 __attribute__((vector_size(32)));

// The two halves of eight 64-bit products. AVX2 is spelled out: the compiler makes three products
// of each and no blends (1.8 ns a score of dropout against 0.8).
INLINE void multiply(Philox8 x, uint32_t by, Philox8& high, Philox8& low) {
#if defined(FASTATTN_AVX2)
    __m256i factor = _mm256_set1_epi32(static_cast<int>(by));
    __m256i even = _mm256_mul_epu32((__m256i)x, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
    low = (Philox8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = (Philox8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    Wide4 even = ((Wide4)x & 0xffffffffull) * by, odd = ((Wide4)x >> 32) * by;
    low = (Philox8)((even & 0xffffffffull) | (odd << 32));
    high = (Philox8)((even >> 32) | (odd & 0xffffffff00000000ull));
#endif
}

// The rounds' keys, one vector each: a tile makes them once.
struct PhiloxKeys {
    Philox8 k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];

    INLINE_MEMBER explicit PhiloxKeys(const DropoutKey& key) {
        for (int round = 0; round < PHILOX_ROUNDS; round++) {
            k0[round] = Philox8{} + (key.key0 + round * PHILOX_KEY_A);
            k1[round] = Philox8{} + (key.key1 + round * PHILOX_KEY_B);
        }
    }
};

// The four words of philox.h for eight consecutive values of counter 0.
INLINE void philox8(const PhiloxKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                    Philox8 w[4]) {
    constexpr Philox8 IOTA = {0, 1, 2, 3, 4, 5, 6, 7};
    w[0] = IOTA + c0;
    w[1] = Philox8{} + c1;
    w[2] = Philox8{} + c2;
    w[3] = Philox8{} + c3;
#pragma GCC unroll 10
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        Philox8 high0, low0, high2, low2;
        multiply(w[0], PHILOX_A, high0, low0);
        multiply(w[2], PHILOX_B, high2, low2);
        w[0] = high2 ^ w[1] ^ keys.k0[round];
        w[2] = high0 ^ w[3] ^ keys.k1[round];
        w[1] = low2;
        w[3] = low0;
    }
}

constexpr int DROPOUT_LD = BLOCK_Q + 32;  // rows and keys widened to whole blocks of 16
constexpr int DROPOUT_ROWS = BLOCK_KV + 32;
typedef float (*DropoutTile)[DROPOUT_LD];

// Fills keep[j - j16][i - i16] = 0 or 1 for logical rows [i, i + rows) and keys [j, j + n), where
// i16, j16 are i, j rounded down to 16, and returns the tile's first element.
INLINE const float* dropout_block(const DropoutKey& key, uint32_t bh, int i, int rows, int j, int n,
                                  DropoutTile keep) {
    int i16 = i / 16 * 16, j16 = j / 16 * 16;
    PhiloxKeys keys(key);
    Philox8 threshold = Philox8{} + key.threshold;
    for (int jj = j16; jj < j + n; jj += 16)
        for (int column = 0; column < 4; column++)
            for (int ii = i16; ii < i + rows; ii += 16) {
                Philox8 w[4];
                philox8(keys, philox_row(ii), philox_column(jj) + column, bh, key.counter3, w);
                for (int word = 0; word < 4; word++)
                    for (int half = 0; half < 2; half++) {
                        Philox8 bits = half ? w[word] >> 16 : w[word] & 0xffff;
                        Float8 z = bits < threshold ? Float8{} + 1.0f : Float8{};
                        float* to = &keep[jj - j16 + 8 * (word & 1) + 2 * column + half]
                                         [ii - i16 + 8 * (word >> 1)];
                        *reinterpret_cast<Float8Unaligned*>(to) = z;
                    }
            }
    return &keep[j - j16][i - i16];
}

// The tile's factors as [key][row], DROPOUT_LD apart. One head's rows are used where they were
// made; those of several heads are gathered in `gathered`.
template <class A> INLINE const float* dropout_tile(const Params& p, const Segment& s,
                                                    const QueryTile<A>& tile, int key, int n,
                                                    DropoutTile scratch, DropoutTile gathered) {
    for (int tile_row = 0; tile_row < tile.count;) {
        int rows = 1;
        while (tile_row + rows < tile.count && tile.head[tile_row + rows] == tile.head[tile_row] &&
               tile.row[tile_row + rows] == tile.row[tile_row] + rows)
            rows++;
        uint32_t bh = s.sequence * p.total_heads + p.first_head + tile.head[tile_row];
        const float* from = dropout_block(p.dropout_key, bh, s.row0 + tile.row[tile_row], rows,
                                          s.key0 + key, n, scratch);
        if (rows == tile.count) return from;
        for (int j = 0; j < n; j++)
            for (int i = 0; i < rows; i++) gathered[j][tile_row + i] = from[j * DROPOUT_LD + i];
        tile_row += rows;
    }
    return gathered[0];
}

template <class A> INLINE Vec<A> load_dropout(const float* z) {
    Vec<A> x = {};
    if constexpr (sizeof(A) == 4)
        x = load<A>(z);
    else
        for (int i = 0; i < SIMD_WIDTH<A>; i++) x[i] = z[i];
    return x;
}
