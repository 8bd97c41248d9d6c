// Transposes FP8 values in place, in shared memory. wgmma takes FP8 operands only with the summed
// index, here the key, along the rows, and no instruction transposes bytes. next: forward_sm90.cuh
//
// A panel has 128 keys of 128 channels, one byte each, and becomes 128 channels of 128 keys. Blocks
// of 32 x 32 swap places in pairs, so no warp waits for another. ldmatrix.trans transposes pairs of
// bytes, that is of channels: two registers of keys that are eight apart then hold what two rows of
// the result get, and permute_bytes sorts them. The keys of each 32 come in another order: four
// neighbours are keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of the first 16, or of the other 16. In the
// same order to_fragments (tile.cuh) leaves the probs.
#pragma once
#include "tile.cuh"

namespace fastattn::cuda {

constexpr int TRANSPOSE_SIDE = 128;  // keys and channels of a panel
constexpr int TRANSPOSE_JOBS = 8;    // of a panel; each is of two blocks

// Hexadecimal digit n belongs to job n. The job's two blocks are in row FIRST and column SECOND,
// and in row THIRD and column FOURTH, of the panel's 4 x 4 blocks. Each job swaps two mirrored
// blocks, or transposes two on the diagonal. The first 64 channels need jobs 0 to 5 only.
constexpr uint32_t FIRST = 0x22011000, SECOND = 0x23032321;
constexpr uint32_t THIRD = 0x33132321, FOURTH = 0x32111000;

// A block of 32 keys from 32 * row_block on and 32 channels from 32 * column_block on, in registers
// as two groups of 16 channels. Keys from `keys` on become zeros: their probs are 0, but 0 times
// NaN is NaN, and memory that no key has may hold it.
struct TransposeBlock {
    int row_block, column_block;
    uint32_t x[2][4];

    FASTATTN_DEVICE void read(SharedAddress panel, int keys) {
        using Panel = Tile<TRANSPOSE_SIDE, TRANSPOSE_SIDE, 1>;
        int row = 32 * row_block + lane_index();
#pragma unroll
        for (int half = 0; half < 2; half++)
            ldmatrix<true>(x[half], Panel{panel}.chunk(row, 2 * column_block + half));
        if (keys >= TRANSPOSE_SIDE) return;
        int first = keys - 32 * row_block - 2 * (lane_index() % 4);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 4; i++)  // keys 8 i and, in the high half, 8 i + 1
                x[half][i] &= first > 8 * i + 1 ? ~0u : first > 8 * i ? 0xffff : 0;
    }

    // Lanes from 16 on write odd channels first, so that the eight rows of each matrix that
    // stmatrix writes are in different banks.
    FASTATTN_DEVICE void write(SharedAddress panel) const {
        using Panel = Tile<TRANSPOSE_SIDE, TRANSPOSE_SIDE, 1>;
        int lane = lane_index();
        uint32_t first = lane < 16 ? 0x6420 : 0x7531, second = lane < 16 ? 0x7531 : 0x6420;
        int row = 32 * column_block + 2 * (lane % 8) + (lane / 8 % 2 ^ lane % 8 / 4);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t y[4] = {permute_bytes(x[half][0], x[half][1], first),
                             permute_bytes(x[half][0], x[half][1], second),
                             permute_bytes(x[half][2], x[half][3], first),
                             permute_bytes(x[half][2], x[half][3], second)};
            stmatrix<false>(Panel{panel}.chunk(row + 16 * half, 2 * row_block + lane / 16), y);
        }
    }
};

// What warp number `warp` of `warps` does to transpose a tile of 128 keys and CHANNELS channels.
template <int CHANNELS>
FASTATTN_DEVICE void transpose_tile(SharedAddress tile, int keys, int warp, int warps) {
    constexpr int JOBS = CHANNELS == 64 ? 6 : CHANNELS / TRANSPOSE_SIDE * TRANSPOSE_JOBS;
    for (int job = warp; job < JOBS; job += warps) {
        SharedAddress panel = tile + job / TRANSPOSE_JOBS * TRANSPOSE_SIDE * ROW_BYTES;
        int digit = job % TRANSPOSE_JOBS * 4;
        TransposeBlock one{int(FIRST >> digit & 3), int(SECOND >> digit & 3), {}};
        TransposeBlock other{int(THIRD >> digit & 3), int(FOURTH >> digit & 3), {}};
        one.read(panel, keys);
        other.read(panel, keys);
        sync_warp();
        one.write(panel);
        other.write(panel);
    }
}

}  // namespace fastattn::cuda
