// Tiles of 16-bit and 8-bit elements in shared memory, and the products of whole tiles.
// next: pipeline.cuh
//
// A tile lies in panels whose rows are 128 bytes, one after the other: 64 columns of 16-bit
// elements or 128 of 8-bit ones; where a tile has fewer, the rest of each row goes unused. The
// eight 16-byte chunks of row r are permuted by XOR with r % 8, which is what TMA and wgmma call
// the 128-byte swizzle. A tile serves as either kind of operand: with rows as the M or N index and
// columns as K (k_major), or with rows as the K index and columns as M or N (mn_major).
#pragma once
#include "ptx.cuh"

namespace fastattn::cuda {

constexpr int PANEL = 64;          // columns of a panel of 16-bit elements
constexpr int ROW_BYTES = 128;     // of a panel's row
constexpr int GROUP_BYTES = 1024;  // of eight rows, after which the swizzle repeats

template <class Element> constexpr int BYTES_OF = 2;
template <> inline constexpr int BYTES_OF<E4m3> = 1;
template <class Element> constexpr int K_STEP = 32 / BYTES_OF<Element>;  // K of one wgmma

// A matrix descriptor of wgmma: in bits 0-13 the address, in 16-29 the leading and in 32-45 the
// stride byte offset, each divided by 16; bit 62 says 128-byte swizzle.
FASTATTN_DEVICE uint64_t descriptor(SharedAddress start, uint32_t leading) {
    return static_cast<uint64_t>((start & 0x3FFFF) >> 4) |
           static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(GROUP_BYTES >> 4) << 32 | uint64_t(1) << 62;
}

template <int ROWS_, int COLUMNS_, int ELEMENT = 2> struct Tile {  // ELEMENT: its bytes
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WIDTH = ROW_BYTES / ELEMENT;
    static constexpr int PANELS = (COLUMNS + WIDTH - 1) / WIDTH;
    static constexpr int PANEL_BYTES = ROWS * ROW_BYTES, BYTES = PANELS * PANEL_BYTES;
    static_assert(ROWS % 8 == 0 && (COLUMNS % WIDTH == 0 || COLUMNS == PANEL));

    SharedAddress base;  // a multiple of 1024

    FASTATTN_DEVICE SharedAddress panel(int i) const { return base + i * PANEL_BYTES; }

    // Where 16 bytes of a row lie: chunk n has columns 8 n to 8 n + 7, of 8-bit elements 16.
    FASTATTN_DEVICE SharedAddress chunk(int row, int chunk) const {
        return panel(chunk / 8) + row * ROW_BYTES + ((chunk % 8) ^ (row % 8)) * 16;
    }
    // Descriptor of an operand: rows from `row` on (a multiple of 8) by 32 bytes of columns from
    // `k`.
    FASTATTN_DEVICE uint64_t k_major(int row, int k) const {
        return descriptor(panel(k / WIDTH) + row * ROW_BYTES + k % WIDTH * ELEMENT, 16);
    }
    // Descriptor of a 16-bit operand: 16 rows from `k` by columns from `column` (a multiple of 64).
    FASTATTN_DEVICE uint64_t mn_major(int k, int column) const {
        return descriptor(panel(column / PANEL) + k * ROW_BYTES, PANEL_BYTES);
    }
};

// acc[64 x N] = a[64 rows from a_row, K] * b[N rows from b_row, K]^T. This and the products below
// only issue: the caller fences, commits and waits.
template <class Element, int N, class A, class B>
FASTATTN_DEVICE void multiply_transposed(float (&acc)[N / 2], A a, int a_row, B b, int b_row = 0) {
    static_assert(A::COLUMNS == B::COLUMNS && B::ROWS >= N);
#pragma unroll
    for (int k = 0; k < A::COLUMNS; k += K_STEP<Element>)
        wgmma_ss<N, Element, false, false>(acc, a.k_major(a_row, k), b.k_major(b_row, k), k > 0);
}

// acc[64 x N] += a[64 x K] * b[K, N], a in registers as fragments. An FP8 b lies transposed, that
// is as [N, K], its columns in the order of the fragments' (transpose_fp8.cuh).
template <class Element, int N, int FRAGMENTS, class B>
FASTATTN_DEVICE void multiply_add(float (&acc)[N / 2], const uint32_t (&a)[FRAGMENTS][4], B b) {
    constexpr bool TRANSPOSED = BYTES_OF<Element> == 1;
    static_assert((TRANSPOSED ? B::COLUMNS : B::ROWS) == K_STEP<Element> * FRAGMENTS);
    static_assert((TRANSPOSED ? B::ROWS : B::COLUMNS) == N);
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++) {
        if constexpr (TRANSPOSED)
            wgmma_rs<N, Element, false>(acc, a[i], b.k_major(0, K_STEP<Element> * i), true);
        else
            wgmma_rs<N, Element, true>(acc, a[i], b.mn_major(K_STEP<Element> * i, 0), true);
    }
}

// acc[64 x N] += a[64 x K] * b[K, N columns from `column`], both in shared memory.
template <class Element, int N, class A, class B>
FASTATTN_DEVICE void multiply_add(float (&acc)[N / 2], A a, B b, int column) {
    static_assert(A::ROWS == 64 && A::COLUMNS == B::ROWS);
#pragma unroll
    for (int k = 0; k < B::ROWS; k += 16)
        wgmma_ss<N, Element, false, true>(acc, a.k_major(0, k), b.mn_major(k, column), true);
}

// Rounds an accumulator [64 x N] to Element, as the A operand of the next product. For 16-bit
// elements the two layouts agree. For FP8 a register takes two pairs of columns that are eight
// apart, so that columns come in another order than in the accumulator; transpose_fp8.cuh puts the
// keys of B into that order too. So nothing moves between threads.
template <class Element, int N>
FASTATTN_DEVICE void to_fragments(uint32_t (&a)[N / K_STEP<Element>][4], const float (&d)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / K_STEP<Element>; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (BYTES_OF<Element> == 1) {
                int at = 16 * i + 8 * (j / 2) + 2 * (j % 2);
                a[i][j] = pack4_e4m3(d[at], d[at + 1], d[at + 4], d[at + 5]);
            } else {
                int at = 8 * i + 2 * j;
                a[i][j] = pack<Element>(d[at], d[at + 1]);
            }
        }
}

// Writes the fragments of a [64 x N] accumulator to a tile, from `row` and `column` on.
template <int N, class T>
FASTATTN_DEVICE void store_fragments(T tile, int row, int column, const uint32_t (&a)[N / 16][4]) {
    int lane = lane_index(), warp = thread_index() / 32 % 4;
    // Of stmatrix's four matrices, 0 and 1 are rows 0-7 and 8-15, and 2 and 3 lie to their right.
    int at = row + 16 * warp + lane % 16;
#pragma unroll
    for (int i = 0; i < N / 16; i++)
        stmatrix<false>(tile.chunk(at, column / 8 + 2 * i + lane / 16), a[i]);
}

template <class Element, int N, class T>
FASTATTN_DEVICE void store_accumulator(T tile, int row, int column, const float (&d)[N / 2]) {
    uint32_t a[N / 16][4];
    to_fragments<Element, N>(a, d);
    store_fragments<N>(tile, row, column, a);
}

// Writes an accumulator to global memory, only its first `rows` rows: the next are another tile's.
template <class Element, int N>
FASTATTN_DEVICE void store_accumulator_rows(uint16_t* to, int64_t stride, int rows,
                                            const float (&d)[N / 2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = thread_index() / 32 % 4 * 16 + lane_index() / 4 + 8 * r;
        if (row >= rows) continue;
        uint16_t* line = to + row * stride + 2 * (lane_index() % 4);
#pragma unroll
        for (int i = 2 * r; i < N / 2; i += 4)
            st_global(reinterpret_cast<uint32_t*>(line + i / 4 * 8), pack<Element>(d[i], d[i + 1]));
    }
}

// Zeroes the rows outside [low, high) of a tile. THREADS threads call this; `thread` is the
// caller's number among them.
template <int THREADS, class T>
FASTATTN_DEVICE void clear_rows(T tile, int low, int high, int thread) {
    constexpr int CHUNKS = T::COLUMNS / 8;
    for (int i = thread; i < T::ROWS * CHUNKS; i += THREADS)
        if (i / CHUNKS < low || i / CHUNKS >= high)
            st_shared4(tile.chunk(i / CHUNKS, i % CHUNKS), uint4{0, 0, 0, 0});
}

}  // namespace fastattn::cuda
