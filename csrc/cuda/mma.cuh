// The products of a warp on sm_80: rows come into tiles by cp.async, fragments out of them by
// ldmatrix, and mma.sync multiplies. An accumulator [16 x N] of a warp lies in registers as one
// warp's part of a warpgroup's [64 x N], so softmax.cuh and to_fragments serve both.
// next: forward_sm80.cuh
#pragma once
#include "tile.cuh"

namespace fastattn::cuda {

// Which index of an operand is contiguous in shared memory, along the tile's columns: K, or M or N.
enum class Major { K, MN };

// A source of rows for copy_rows: here of rows with one stride between them. A source gives the
// address of each row; for a row outside of [first, last) any address will do, as it is not read.
// TOGETHER: how far the loop over rows is unrolled, and so how many addresses are in registers.
struct EvenRows {
    static constexpr int TOGETHER = 16;

    const uint16_t* data;
    int64_t stride;  // elements

    FASTATTN_DEVICE const uint16_t* operator()(int row) const { return data + row * stride; }
};

// THREADS threads copy the rows of a tile by cp.async: row r from source(r) where r is in [first,
// last), zeros elsewhere. Neighbouring threads copy neighbouring 16 bytes. The caller commits the
// copies and waits for them.
template <int THREADS, class T, class Source>
FASTATTN_DEVICE void copy_rows(T tile, const Source& source, int first, int last) {
    constexpr int CHUNKS = T::COLUMNS / 8, STEP = THREADS / CHUNKS;  // rows at a time
    static_assert(THREADS % CHUNKS == 0 && T::ROWS % STEP == 0);
    int thread = thread_index_reread(), chunk = thread % CHUNKS, start = thread / CHUNKS;
#pragma unroll Source::TOGETHER
    for (int i = 0; i < T::ROWS; i += STEP) {
        int row = start + i;
        copy_async(tile.chunk(row, chunk), source(row) + 8 * chunk, row >= first && row < last);
    }
}

// The address that lies `rows` rows and `columns` columns after `at` in a tile. Both are constants
// once loops are unrolled, so one address register serves a whole product. Both are multiples of 8,
// and `columns` shares no bit with the column of `at`: so the swizzle, an XOR, does not carry.
template <class T> FASTATTN_DEVICE SharedAddress move(SharedAddress at, int rows, int columns) {
    return (at ^ columns % PANEL * 2) + columns / PANEL * T::PANEL_BYTES + rows * ROW_BYTES;
}

// Loads fragments of an operand that begins at index `first` of M or N. A load brings one fragment
// of A [16 x 16], or two of B [16 x 8]: columns from n on in r[0] and r[1], from n + 8 on in r[2]
// and r[3].
template <bool OF_A, Major MAJOR, class T> struct Fragments {
    static constexpr bool IN_ROWS = MAJOR == Major::K;  // the tile's rows are M or N
    // ldmatrix loads four matrices of 8 x 8. The second is the one below the first, and the third
    // the one to its right; or, where this is false, the other way round.
    static constexpr bool LOWER_FIRST = IN_ROWS == OF_A;
    SharedAddress start;

    FASTATTN_DEVICE Fragments(T tile, int first) {
        int lane = thread_index_reread() % 32, one = lane / 8 % 2, two = lane / 16;
        int row = lane % 8 + 8 * (LOWER_FIRST ? one : two), chunk = LOWER_FIRST ? two : one;
        start = tile.chunk(row + (IN_ROWS ? first : 0), chunk + (IN_ROWS ? 0 : first / 8));
    }
    FASTATTN_DEVICE void load(uint32_t (&r)[4], int from_first, int k) const {
        ldmatrix<!IN_ROWS>(r, move<T>(start, IN_ROWS ? from_first : k, IN_ROWS ? k : from_first));
    }
};

// Columns [n, n + 16) of accumulators [16 x N] += a[16 x 16] * b[16 x 16].
template <class Element, int BLOCKS, int SIZE>
FASTATTN_DEVICE void multiply_block(float (&acc)[BLOCKS][SIZE], int n,
                                    const uint32_t (&a)[BLOCKS][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            mma<Element>(reinterpret_cast<float (&)[4]>(acc[i][n / 2 + 4 * half]), a[i],
                         b[2 * half], b[2 * half + 1]);
}

// acc[i][16 x N] += a[rows from m + 16 i, K] * b[K, columns from n], both in shared memory. Each
// fragment of b serves all blocks of rows: two blocks halve what is read of b for each product.
template <class Element, Major A_MAJOR, Major B_MAJOR, int BLOCKS, int SIZE, class A, class B>
FASTATTN_DEVICE void multiply_shared(float (&acc)[BLOCKS][SIZE], A a, int m, B b, int n) {
    constexpr int K = A_MAJOR == Major::K ? A::COLUMNS : A::ROWS;
    static_assert(K == (B_MAJOR == Major::K ? B::COLUMNS : B::ROWS));
    Fragments<true, A_MAJOR, A> from_a(a, m);
    Fragments<false, B_MAJOR, B> from_b(b, n);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t of_a[BLOCKS][4], of_b[4];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) from_a.load(of_a[i], 16 * i, k);
#pragma unroll
        for (int j = 0; j < 2 * SIZE; j += 16) {
            from_b.load(of_b, j, k);
            multiply_block<Element>(acc, j, of_a, of_b);
        }
    }
}

// The same with a in registers: fragment k of block i is a[i][k].
template <class Element, Major B_MAJOR, int BLOCKS, int SIZE, int FRAGMENTS, class B>
FASTATTN_DEVICE void multiply_registers(float (&acc)[BLOCKS][SIZE],
                                        const uint32_t (&a)[BLOCKS][FRAGMENTS][4], B b, int n) {
    static_assert(16 * FRAGMENTS == (B_MAJOR == Major::K ? B::COLUMNS : B::ROWS));
    Fragments<false, B_MAJOR, B> from_b(b, n);
#pragma unroll
    for (int k = 0; k < FRAGMENTS; k++) {
        uint32_t of_a[BLOCKS][4], of_b[4];
#pragma unroll
        for (int i = 0; i < BLOCKS; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) of_a[i][j] = a[i][k][j];
#pragma unroll
        for (int j = 0; j < 2 * SIZE; j += 16) {
            from_b.load(of_b, j, 16 * k);
            multiply_block<Element>(acc, j, of_a, of_b);
        }
    }
}

// Writes the fragments of a [16 x N] accumulator to a tile, from `row` and `column` on. sm_80 has
// no stmatrix; the swizzle puts the 32 lanes of each plain store on 32 banks.
template <int FRAGMENTS, class T>
FASTATTN_DEVICE void write_fragments(T tile, int row, int column,
                                     const uint32_t (&a)[FRAGMENTS][4]) {
    SharedAddress at = tile.chunk(row + lane_index() / 4, column / 8) + lane_index() % 4 * 4;
#pragma unroll
    for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            st_shared(move<T>(at, 8 * (j % 2), 16 * i + 8 * (j / 2)), float_of(a[i][j]));
}

}  // namespace fastattn::cuda
