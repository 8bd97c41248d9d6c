// The emulator's own tests: a small matrix product, written as the kernels are, into which one
// fault at a time is planted; and single instructions. ../cuda/test_emulator.py runs them.
#include "pipeline.cuh"
#include "tile.cuh"
#include "transpose_fp8.cuh"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

// Each fault is one line that is left out of, or changed in, the kernel below.
enum Fault {
    NONE,
    NO_WAIT_FOR_DATA,
    WRONG_PHASE,
    WRONG_SWIZZLE,
    NO_PROXY_FENCE,
    NO_WGMMA_FENCE,
    NO_WGMMA_WAIT,
    EARLY_RELEASE,
    TOO_FEW_BYTES,
    TOO_MANY_BYTES,
    NO_BARRIER_BEFORE_STORE,
    NO_STORE_WAIT,
    NO_COMMIT,
    BARRIER_COUNT,
    DIVERGENCE,
    SHARED_OVERRUN,
    MISALIGNED,
    GLOBAL_OVERRUN,
    UNWRITTEN,
    RACE,
    NO_INIT_FENCE,
    NO_INIT_BARRIER,
    REGISTERS,
    ACCUMULATOR_TOUCHED,
    TILE_MISPLACED,
    EXTRA_ARRIVAL,
    FLAG_NOBODY_SETS,
};

struct Problem {
    TensorMap a, b, out;  // a, b: bf16 [64, 64 * TILES]; out: bf16 [64, 64]
    float* numbers;       // [128]
};

constexpr int TILES = 4;
using Block = Tile<64, 64>;

void consume(const Problem& p, Fault fault, SharedAddress shared, Ring<2> ring) {
    float acc[32];
    bool leads = thread_index() == 128;
    for (int i = 0; i < TILES; i++) {
        if (fault == WRONG_PHASE) ring.phase ^= 1;
        if (fault != NO_WAIT_FOR_DATA) ring.wait();
        if (fault == WRONG_PHASE) ring.phase ^= 1;
        Block a{shared + ring.stage * 2 * Block::BYTES}, b{a.base + Block::BYTES};
        if (fault == EARLY_RELEASE && leads) ring.release();
        if (fault != NO_WGMMA_FENCE) wgmma_fence();
        for (int k = 0; k < 64; k += 16) {
            uint64_t swizzle = fault == WRONG_SWIZZLE ? uint64_t(3) << 62 : 0;  // 128 -> 64 bytes
            wgmma_ss<64, Bf16, false, false>(acc, a.k_major(0, k) ^ swizzle, b.k_major(0, k),
                                             i + k > 0);
        }
        wgmma_commit();
        if (fault == ACCUMULATOR_TOUCHED) acc[3] *= 2;
        if (fault != NO_WGMMA_WAIT) wgmma_wait<0>();
        if (fault != EARLY_RELEASE && leads) ring.release();
        if (fault == EXTRA_ARRIVAL && leads) ring.release();
        ring.advance();
    }
    Block out{shared + 4 * Block::BYTES};
    store_accumulator<Bf16, 64>(out, 0, 0, acc);
    if (fault != NO_PROXY_FENCE) fence_proxy_async();
    int threads = fault == BARRIER_COUNT ? 256 : 128;
    if (fault != NO_BARRIER_BEFORE_STORE) barrier_sync(1, threads);
    if (leads) {
        tma_store(&p.out, out.base, 0, 0, 0, 0);
        if (fault != NO_COMMIT) bulk_commit();
        if (fault != NO_STORE_WAIT) bulk_wait_read<0>();
    }
}

// Faults that have nothing to do with the product, and come before it.
void misbehave(const Problem& p, Fault fault, SharedAddress shared) {
    int t = thread_index();
    SharedAddress own = shared + 5 * Block::BYTES + 4 * t;
    if (fault == SHARED_OVERRUN) st_shared(shared + 65536 * 3 + 4 * t, 0);
    if (fault == MISALIGNED) st_shared(own + 2, 0);
    if (fault == GLOBAL_OVERRUN) st_global(p.numbers + t, 0.0f);
    if (fault == UNWRITTEN) ld_shared(own);
    if (fault == RACE) st_shared(shared + 5 * Block::BYTES, static_cast<float>(t));
    if (fault == FLAG_NOBODY_SETS && t == 0)
        while (ld_global_acquire(reinterpret_cast<const int*>(p.numbers)) != 1) pause();
    if (fault == DIVERGENCE) {
        if (t % 32 < 16)
            shuffle(t, 0);
        else
            sync_warp();
    }
}

void product(const Problem& p, Fault fault) {
    SharedAddress shared = dynamic_shared();
    Ring<2> ring{shared + 4 * Block::BYTES + Block::BYTES + 2048};
    if (thread_index() == 0) {
        ring.init(1);
        if (fault != NO_INIT_FENCE) fence_mbarrier_init();
    }
    if (fault != NO_INIT_BARRIER) sync_block();
    misbehave(p, fault, shared);
    if (warpgroup_index() == 0) {
        registers_decrease<24>();
        if (thread_index() == 0)
            for (int i = 0; i < TILES; i++) {
                int bytes = 2 * Block::BYTES;
                if (fault == TOO_FEW_BYTES) bytes -= Block::BYTES;
                if (fault == TOO_MANY_BYTES) bytes += 16;
                ring.acquire(bytes);
                SharedAddress to = shared + ring.stage * 2 * Block::BYTES;
                tma_load(to + (fault == TILE_MISPLACED ? 128 : 0), &p.a, ring.full(), 64 * i, 0, 0,
                         0, EVICT_FIRST);
                tma_load(to + Block::BYTES, &p.b, ring.full(), 64 * i, 0, 0, 0, EVICT_FIRST);
                ring.advance();
            }
    } else {
        if (fault == REGISTERS) registers_increase<256>();
        if (fault == REGISTERS && warpgroup_index() == 2) registers_increase<256>();
        if (warpgroup_index() == 1) consume(p, fault, shared, ring);
    }
}

TensorMap map_of(const void* data, int columns, int rows, emulator::Swizzle swizzle,
                 int box_columns, int box_rows, int bytes = 2) {
    TensorMap map;
    uint64_t sizes[4] = {uint64_t(columns), uint64_t(rows), 1, 1};
    uint64_t strides[3] = {uint64_t(columns) * bytes, 16, 16};
    uint32_t box[4] = {uint32_t(box_columns), uint32_t(box_rows), 1, 1};
    std::string error = emulator::encode_tiled(map, const_cast<void*>(data), 4, bytes, sizes,
                                               strides, box, swizzle);
    if (!error.empty()) std::abort();
    return map;
}

// What the FP8 forward does: a product of FP8 matrices, rounded to FP8, times values which three
// warps transpose meanwhile. Again a fault is one line that is left out or changed.
enum class Fault8 {
    NONE,
    NO_WAIT_FOR_TRANSPOSE,
    NO_PROXY_FENCE,
    NO_WAIT_FOR_DATA,
    MN_MAJOR,
    NOT_TRANSPOSED
};

struct Problem8 {
    TensorMap a, b;  // [64, 128], [128, 128]
    float* out;      // [64, 128]
};

void product8(const Problem8& p, Fault8 fault) {
    constexpr int SIDE = TRANSPOSE_SIDE;
    using Keys = Tile<SIDE, SIDE, 1>;
    SharedAddress shared = dynamic_shared();
    Keys keys{shared}, values{shared + Keys::BYTES};
    Tile<64, SIDE, 1> rows{shared + 2 * Keys::BYTES};
    TransposedRing<1> ring{{rows.base + rows.BYTES}};
    if (thread_index() == 0) {
        ring.init(1, 3);
        fence_mbarrier_init();
    }
    sync_block();
    int warp = warp_index();
    if (thread_index() == 0) {
        ring.acquire(2 * Keys::BYTES + rows.BYTES);
        tma_load(rows.base, &p.a, ring.full(), 0, 0, 0, 0, EVICT_FIRST);
        for (Keys tile : {keys, values})
            tma_load(tile.base, &p.b, ring.full(), 0, 0, 0, 0, EVICT_FIRST);
    } else if (warp >= 1 && warp <= 3) {
        if (fault != Fault8::NO_WAIT_FOR_DATA) ring.wait_loaded();
        if (fault != Fault8::NOT_TRANSPOSED) transpose_tile<SIDE>(values.base, SIDE, warp - 1, 3);
        if (fault != Fault8::NO_PROXY_FENCE) fence_proxy_async();
        sync_warp();
        if (lane_index() == 0) ring.signal_transposed();
    } else if (warp >= 4) {
        float scores[SIDE / 2], acc[SIDE / 2] = {};
        uint32_t probs[SIDE / 32][4];
        ring.wait_loaded();
        wgmma_fence();
        multiply_transposed<E4m3, SIDE>(scores, rows, 0, keys);
        wgmma_commit();
        wgmma_wait<0>();
        to_fragments<E4m3, SIDE>(probs, scores);
        if (fault != Fault8::NO_WAIT_FOR_TRANSPOSE) ring.wait();
        wgmma_fence();
        if (fault == Fault8::MN_MAJOR)
            wgmma_rs<SIDE, E4m3, true>(acc, probs[0], values.mn_major(0, 0), true);
        multiply_add<E4m3, SIDE>(acc, probs, values);
        wgmma_commit();
        wgmma_wait<0>();
        int t = thread_index() % 128, row = t / 32 * 16 + t % 32 / 4;
        for (int i = 0; i < SIDE / 2; i++)
            st_global(p.out + (row + 8 * (i / 2 % 2)) * SIDE + i / 4 * 8 + 2 * (t % 4) + i % 2,
                      acc[i]);
    }
}

const char* keep(std::string text) {
    static std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

}  // namespace

extern "C" {

// out = a b^T with a fault planted. All bf16: a, b [64, 256], out [64, 64]; numbers: fp32 [128].
const char* emulated_self_test(int fault, uint64_t seed, void* a, void* b, void* out,
                               float* numbers) {
    auto b128 = emulator::Swizzle::B128;
    Problem p{map_of(a, 64 * TILES, 64, b128, 64, 64), map_of(b, 64 * TILES, 64, b128, 64, 64),
              map_of(out, 64, 64, b128, 64, 64), numbers};
    return keep(emulator::launch({1, 384, 5 * Block::BYTES + 4096, seed},
                                 [&] { product(p, static_cast<Fault>(fault)); }));
}

// Writes to bytes_out what shared memory holds after TMA has loaded one box [box_rows, box_columns]
// at (row, column) of a matrix.
const char* emulated_box(const void* data, int element_bytes, int columns, int rows, int swizzle,
                         int box_columns, int box_rows, int column, int row, float* bytes_out,
                         uint64_t seed) {
    TensorMap map = map_of(data, columns, rows, static_cast<emulator::Swizzle>(swizzle),
                           box_columns, box_rows, element_bytes);
    return keep(emulator::launch({1, 32, 16384 + 64, seed}, [&] {
        SharedAddress shared = dynamic_shared(), bar = shared + 16384;
        int bytes = box_columns * box_rows * element_bytes;
        if (thread_index() == 0) {
            mbarrier_init(bar, 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect(bar, bytes);
            tma_load(shared, &map, bar, column, row, 0, 0, EVICT_FIRST);
        }
        sync_warp();
        mbarrier_wait(bar, 0);
        for (int i = thread_index() * 4; i < bytes; i += 128)
            st_global(bytes_out + i / 4, ld_shared(shared + i));
    }));
}

// out [64, n] fp32 = a^T b of a bf16 [64, 64] (k, m) and b bf16 [64, n] (k, n): both MN-major.
const char* emulated_transposed(const void* a, const void* b, float* out, uint64_t seed) {
    constexpr int N = 128;
    auto b128 = emulator::Swizzle::B128;
    TensorMap ma = map_of(a, 64, 64, b128, 64, 64);
    TensorMap mb = map_of(b, N, 64, b128, 64, 64);
    return keep(emulator::launch({1, 128, 3 * Block::BYTES + 64, seed}, [&] {
        SharedAddress shared = dynamic_shared(), bar = shared + 3 * Block::BYTES;
        if (thread_index() == 0) {
            mbarrier_init(bar, 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect(bar, 3 * Block::BYTES);
            tma_load(shared, &ma, bar, 0, 0, 0, 0, EVICT_FIRST);
            tma_load(shared + Block::BYTES, &mb, bar, 0, 0, 0, 0, EVICT_FIRST);
            tma_load(shared + 2 * Block::BYTES, &mb, bar, 64, 0, 0, 0, EVICT_FIRST);
        }
        sync_block();
        mbarrier_wait(bar, 0);
        float acc[N / 2];
        wgmma_fence();
        for (int k = 0; k < 64; k += 16)
            wgmma_ss<N, Bf16, true, true>(acc, Block{shared}.mn_major(k, 0),
                                          Tile<64, N>{shared + Block::BYTES}.mn_major(k, 0), k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        int t = thread_index(), row = t / 32 * 16 + t % 32 / 4, column = 2 * (t % 4);
        for (int i = 0; i < N / 2; i++)
            st_global(out + (row + 8 * (i / 2 % 2)) * N + i / 4 * 8 + column + i % 2, acc[i]);
    }));
}

// out [16, 16] in fp32 = a b of fp16 matrices [16, 16], by cp.async, ldmatrix and mma; at = a^T, by
// stmatrix.trans.
const char* emulated_warp(const uint16_t* a, const uint16_t* b, float* out, uint16_t* at,
                          uint64_t seed) {
    return keep(emulator::launch({1, 32, 2048, seed}, [&] {
        SharedAddress shared = dynamic_shared();
        int lane = lane_index();
        copy_async(shared + lane * 16, a + lane * 8, true);
        copy_async(shared + 512 + lane * 16, b + lane * 8, true);
        copy_commit();
        copy_wait<0>();
        sync_warp();
        uint32_t x[4], y[4];
        SharedAddress row = lane % 16 * 32 + lane / 16 * 16;
        ldmatrix<false>(x, shared + row);
        ldmatrix<true>(y, shared + 512 + row);
        for (int n = 0; n < 2; n++) {
            float d[4] = {0, 0, 0, 0};
            mma<Fp16>(d, x, y[2 * n], y[2 * n + 1]);
            for (int i = 0; i < 4; i++)
                st_global(out + (lane / 4 + 8 * (i / 2)) * 16 + 8 * n + 2 * (lane % 4) + i % 2,
                          d[i]);
        }
        // Matrices 1 and 2 change places, each is transposed.
        SharedAddress to = shared + 1024 + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16;
        stmatrix<true>(to, x);
        sync_warp();
        uint4 line = ld_shared4(shared + 1024 + lane * 16);
        st_global(reinterpret_cast<uint4*>(at) + lane, line);
    }));
}

// sums fp32 [n] += terms fp32 [n], twice.
const char* emulated_reduce(const float* terms, float* sums, int n, uint64_t seed) {
    return keep(emulator::launch({1, 32, 4096, seed}, [&] {
        SharedAddress shared = dynamic_shared(), bar = shared + 2048;
        if (thread_index() != 0) return;
        mbarrier_init(bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(bar, n * 4);
        bulk_load(shared, terms, n * 4, bar);
        mbarrier_wait(bar, 0);
        for (int i = 0; i < 2; i++) bulk_reduce_add(sums, shared, n * 4);
        bulk_commit();
        bulk_wait<0>();
    }));
}
// out [64, 128] fp32 = e4m3(a b^T) b, of a [64, 128] and b [128, 128] in e4m3.
const char* emulated_self_test8(int fault, uint64_t seed, const void* a, const void* b,
                                float* out) {
    constexpr int SIDE = TRANSPOSE_SIDE;
    auto b128 = emulator::Swizzle::B128;
    Problem8 p{map_of(a, SIDE, 64, b128, SIDE, 64, 1), map_of(b, SIDE, SIDE, b128, SIDE, SIDE, 1),
               out};
    return keep(emulator::launch({1, 256, 5 * 64 * SIDE + 64, seed},
                                 [&] { product8(p, static_cast<Fault8>(fault)); }));
}

// Converts n numbers (a multiple of 4) to e4m3 and back.
void emulated_e4m3(const float* x, uint32_t* bytes, float* back, int n) {
    for (int i = 0; i < n; i += 4) bytes[i / 4] = pack4_e4m3(x[i], x[i + 1], x[i + 2], x[i + 3]);
    for (int i = 0; i < n; i++) back[i] = widen_e4m3(reinterpret_cast<uint8_t*>(bytes)[i]);
}
}
