// The products of csrc/cuda/mma.cuh, for each way in which operands can lie in shared memory.
// next: ../cuda/test_emulator.py
#include "mma.cuh"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

using Block = Tile<64, 64>;

// Two warps of 32 rows each. Rows [first, last) of a are copied, the others are zeros.
template <Major A_MAJOR, Major B_MAJOR>
void product(const uint16_t* a, const uint16_t* b, float* out, int first, int last) {
    SharedAddress shared = dynamic_shared();
    Block at{shared}, bt{shared + Block::BYTES}, ct{shared + 2 * Block::BYTES};
    copy_rows<64>(at, EvenRows{a, 64}, first, last);
    copy_rows<64>(bt, EvenRows{b, 64}, 0, 64);
    copy_commit();
    copy_wait<0>();
    sync_block();
    int m = 32 * warp_index();
    float acc[2][32] = {};
    multiply_shared<Bf16, A_MAJOR, B_MAJOR>(acc, at, m, bt, 0);
    for (int i = 0; i < 2; i++) {
        int row = m + 16 * i + lane_index() / 4, column = 2 * (lane_index() % 4);
        for (int j = 0; j < 32; j++)
            st_global(out + (row + 8 * (j / 2 % 2)) * 64 + j / 4 * 8 + column + j % 2, acc[i][j]);
    }
    // The rounded product is an operand of the next one, from registers and through shared memory.
    uint32_t fragments[2][4][4];
    for (int i = 0; i < 2; i++) {
        to_fragments<Bf16, 64>(fragments[i], acc[i]);
        write_fragments(ct, m + 16 * i, 0, fragments[i]);
    }
    sync_block();
    float direct[2][32] = {}, through[2][32] = {};
    multiply_registers<Bf16, B_MAJOR>(direct, fragments, bt, 0);
    multiply_shared<Bf16, Major::K, B_MAJOR>(through, ct, m, bt, 0);
    for (int i = 0; i < 2; i++) {
        int row = 64 + m + 16 * i + lane_index() / 4, column = 2 * (lane_index() % 4);
        for (int j = 0; j < 32; j++) {
            float* to = out + (row + 8 * (j / 2 % 2)) * 64 + j / 4 * 8 + column + j % 2;
            st_global(to, direct[i][j]);
            st_global(to + 64 * 64, through[i][j]);
        }
    }
}

}  // namespace

extern "C" {

// out fp32 [3, 64, 64]: a b; and (a b) b, twice. majors: 2 for a, 1 for b, where its M or N index
// is contiguous.
const char* emulated_product(const uint16_t* a, const uint16_t* b, float* out, int majors,
                             int first, int last, uint64_t seed) {
    static std::string report;
    constexpr Major K = Major::K, MN = Major::MN;
    auto kernel = majors == 0   ? product<K, K>
                  : majors == 1 ? product<K, MN>
                  : majors == 2 ? product<MN, K>
                                : product<MN, MN>;
    report =
        emulator::launch({1, 64, 3 * Block::BYTES, seed}, [&] { kernel(a, b, out, first, last); });
    return report.c_str();
}
}
