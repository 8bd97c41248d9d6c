// The products of a warp on sm_80: cp.async of rows into tiles, fragments by ldmatrix, mma.sync.
// An accumulator [16 x N] has the layout of one warp of a warpgroup's, so softmax.cuh and
// to_fragments serve it as they are. next: forward_sm80.cuh
#pragma once
#include "tile.cuh"

namespace fastattn::cuda {

// Which index of an operand is contiguous in shared memory: a tile's columns are K, or M or N.
enum class Major { K, MN };

// Rows that lie evenly in memory. Other sources are called alike; of a row that is not there, they
// may give any address, as it is not read. TOGETHER: how many addresses are in registers at once.
struct EvenRows {
    static constexpr int TOGETHER = 16;

    const uint16_t* data;
    int64_t stride;  // elements

    FASTATTN_DEVICE const uint16_t* operator()(int row) const { return data + row * stride; }
};

// Rows of a tile by cp.async of THREADS threads: row r from source(r) where r is in [first, last),
// zeros elsewhere. Neighbouring threads copy neighbouring 16 bytes. The caller commits and waits.
template <int THREADS, class T, class Source>
FASTATTN_DEVICE void copy_rows(T tile, const Source& source, int first, int last) {
    constexpr int CHUNKS = T::COLUMNS / 8, STEP = THREADS / CHUNKS;  // rows at a time
    static_assert(THREADS % CHUNKS == 0 && T::ROWS % STEP == 0);
    int thread = thread_index_anew(), chunk = thread % CHUNKS, start = thread / CHUNKS;
#pragma unroll Source::TOGETHER
    for (int i = 0; i < T::ROWS; i += STEP) {
        int row = start + i;
        copy_async(tile.chunk(row, chunk), source(row) + 8 * chunk, row >= first && row < last);
    }
}

// From an address in a tile to the one rows and columns on, both constants, so that one register
// serves a product. rows is a multiple of 8; columns is one, and shares no bit with the column of
// `at`: then the swizzle, an XOR, lets them be added.
template <class T> FASTATTN_DEVICE SharedAddress move(SharedAddress at, int rows, int columns) {
    return (at ^ columns % PANEL * 2) + columns / PANEL * T::PANEL_BYTES + rows * ROW_BYTES;
}

// An operand from index `first` of M or N on. A load gives a fragment of A [16 x 16], or two of B:
// [16 from k] x [8 from n] and [8 from n + 8], in b[0], b[1] and b[2], b[3].
template <bool OF_A, Major MAJOR, class T> struct Fragments {
    static constexpr bool IN_ROWS = MAJOR == Major::K;  // M or N is the tile's row
    // Of the four matrices of a block, 1 and 2 are the lower left and the upper right one, or the
    // other way round.
    static constexpr bool LOWER_FIRST = IN_ROWS == OF_A;
    SharedAddress start;

    FASTATTN_DEVICE Fragments(T tile, int first) {
        int lane = thread_index_anew() % 32, one = lane / 8 % 2, two = lane / 16;
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

// acc[i][16 x N] += a[rows from m + 16 i, K] * b[K, columns from n], both in shared memory. A
// fragment of b serves all blocks of rows: with two, half of what is read for each product.
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

// Writes the fragments of a [16 x N] accumulator to rows from `row`, columns from `column` of a
// tile, without the stmatrix that sm_90 has; the swizzle keeps the 32 lanes on 32 banks.
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
