// Dropout's random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011). A pure function of (seed, offset, batch x head, row, key), so every kernel, tile shape
// and device drops the same weights. The Python twin is fastattn/core/philox.py.
#pragma once
#include <cstdint>

namespace fastattn {

constexpr uint32_t PHILOX_A = 0xD2511F53u, PHILOX_B = 0xCD9E8D57u;
constexpr uint32_t PHILOX_KEY_A = 0x9E3779B9u, PHILOX_KEY_B = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

// Where the numbers of the operand dropout_seed lie: int64 [2], or [4] where the call's heads are a
// part of a whole (tensor parallelism) and dropout counts the whole's. fastattn/core/philox.py and
// kernels/philox.py have the same names.
enum DropoutNumber { SEED, OFFSET, FIRST_HEAD, TOTAL_HEADS, DROPOUT_NUMBERS };

// One call makes eight 16-bit numbers: rows i and i^8, keys j, j^1, j^8, j^9. That is what a lane
// of a tensor-core accumulator holds, and eight neighbouring rows fill an AVX2 register.
struct DropoutKey {
    uint32_t key0, key1, counter3;
    uint32_t threshold;  // of 65536: a weight is kept when its 16 bits are below

    static DropoutKey make(uint64_t seed, uint64_t offset, double dropout_p) {
        int64_t kept = static_cast<int64_t>((1.0 - dropout_p) * 65536.0 + 0.5);
        return {static_cast<uint32_t>(seed), static_cast<uint32_t>((seed >> 32) ^ (offset >> 32)),
                static_cast<uint32_t>(offset), static_cast<uint32_t>(kept < 1 ? 1 : kept)};
    }
    double keep_probability() const { return threshold / 65536.0; }
};

constexpr uint32_t philox_row(uint32_t i) { return (i >> 4) * 8 + (i & 7); }
constexpr uint32_t philox_column(uint32_t j) { return (j >> 4) * 4 + ((j & 7) >> 1); }

}  // namespace fastattn
