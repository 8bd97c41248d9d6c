// Implements the functions of csrc/cuda/ptx.cuh and wgmma.cuh on the CPU, under the same names.
// Kernels include this file in place of those; the code that launches kernels uses the part "for
// hosts". next: README.md, state.h
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define FASTATTN_DEVICE inline __attribute__((always_inline))
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
    float x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};

namespace fastattn::emulator {

// ---- for hosts ---------------------------------------------------------------------------------

enum class Swizzle { NONE, B32, B64, B128 };

// What a CUtensorMap holds. Built by encode_tiled, which checks what the driver checks.
struct alignas(64) TensorMap {
    uint8_t* data;
    uint64_t sizes[5], strides[5];  // strides in bytes, the first is the element's size
    uint32_t box[5];
    int rank, element_bytes;
    Swizzle swizzle;
    uint32_t valid;
};

// "" or what is wrong, in a sentence. strides[i] belongs to dimension i + 1.
std::string encode_tiled(TensorMap& map, void* data, int rank, int element_bytes,
                         const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                         Swizzle swizzle);

// Kernels may touch only memory that was registered.
void register_memory(const void* begin, size_t bytes, const char* name);
void forget_memory();

struct Launch {
    int grid, threads;
    int shared_bytes;
    uint64_t seed;
};

// Runs the CTAs one after the other. "" or a report of the first fault.
std::string launch(const Launch& how, const std::function<void()>& kernel);

// ---- the instructions, out of line -------------------------------------------------------------

enum class Op {
    SHUFFLE,
    SYNC_WARP,
    LDMATRIX,
    STMATRIX,
    MMA,
    FENCE,
    COMMIT,
    WAIT,
    WGMMA,
    SETMAXNREG
};

int thread_index();
int block_index();
int grid_size();
void shared_read(uint32_t address, void* to, int bytes);
void shared_write(uint32_t address, const void* from, int bytes);
void global_read(const void* from, void* to, int bytes);
void global_write(void* to, const void* from, int bytes);
int global_add(int* p, int x);
void global_add(float* p, float x);
void sync_warp();
void barrier(int id, int threads, bool wait);
uint32_t shuffle(uint32_t x, int from_lane);
void set_registers(int count, bool increase);
void mbarrier_init(uint32_t bar, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t bar, int expect_bytes);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void fence_proxy_async();
void yield();
void tma_load(uint32_t to, const TensorMap* map, uint32_t bar, const int (&at)[4]);
void tma_store(const TensorMap* map, uint32_t from, const int (&at)[4], bool reduce);
void bulk_load(uint32_t to, const void* from, int bytes, uint32_t bar);
void bulk_reduce_add(float* to, uint32_t from, int bytes);
void bulk_commit();
void bulk_wait(int groups, bool read_only);
void copy_async(uint32_t to, const void* from, bool valid);
void copy_commit();
void copy_wait(int groups);
void ldmatrix(uint32_t* r, uint32_t row, bool transpose);
void stmatrix(uint32_t row, const uint32_t* r, bool transpose);
void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);

enum class Format { BF16, FP16, E4M3 };

struct Wgmma {
    float* d;
    const uint32_t* a_registers;  // null: a is a descriptor
    uint64_t a, b;
    int n;
    Format format;
    bool accumulate, a_mn, b_mn;
    int k() const { return format == Format::E4M3 ? 32 : 16; }  // 32 bytes
};
void wgmma(const Wgmma& w);

}  // namespace fastattn::emulator

namespace fastattn::cuda {

using TensorMap = emulator::TensorMap;
using SharedAddress = uint32_t;
struct Bf16 {};
struct Fp16 {};
struct E4m3 {};
template <class E> constexpr bool IS_BF16 = false;
template <> inline constexpr bool IS_BF16<Bf16> = true;
template <class E> constexpr emulator::Format FORMAT = emulator::Format::BF16;
template <> inline constexpr emulator::Format FORMAT<Fp16> = emulator::Format::FP16;
template <> inline constexpr emulator::Format FORMAT<E4m3> = emulator::Format::E4M3;
constexpr uint64_t EVICT_FIRST = 0, EVICT_LAST = 0;

inline int thread_index() { return emulator::thread_index(); }
inline int lane_index() { return thread_index() % 32; }
inline int block_index() { return emulator::block_index(); }
inline int grid_size() { return emulator::grid_size(); }
inline int thread_index_reread() { return thread_index(); }
inline int warp_index() { return thread_index() / 32; }
inline int warpgroup_index() { return thread_index() / 128; }
constexpr int SHARED_ALIGNMENT = 1024;
constexpr SharedAddress SHARED_BASE = 1024;
inline SharedAddress dynamic_shared() { return SHARED_BASE; }
template <class T> FASTATTN_DEVICE T opaque(T x) { return x; }

template <class T> FASTATTN_DEVICE T read_shared(SharedAddress a) {
    T x;
    emulator::shared_read(a, &x, sizeof x);
    return x;
}
FASTATTN_DEVICE float ld_shared(SharedAddress a) { return read_shared<float>(a); }
FASTATTN_DEVICE float2 ld_shared2(SharedAddress a) { return read_shared<float2>(a); }
FASTATTN_DEVICE uint4 ld_shared4(SharedAddress a) { return read_shared<uint4>(a); }
FASTATTN_DEVICE void st_shared(SharedAddress a, float x) { emulator::shared_write(a, &x, 4); }
FASTATTN_DEVICE void st_shared4(SharedAddress a, uint4 x) { emulator::shared_write(a, &x, 16); }
template <class T> FASTATTN_DEVICE T ld_global(const T* p) {
    T x;
    emulator::global_read(p, &x, sizeof x);
    return x;
}
template <class T> FASTATTN_DEVICE void st_global(T* p, T x) {
    emulator::global_write(p, &x, sizeof x);
}
FASTATTN_DEVICE int ld_global_acquire(const int* p) { return ld_global(p); }
FASTATTN_DEVICE void add_global_release(int* p, int x) { emulator::global_add(p, x); }
FASTATTN_DEVICE void add_global(float* p, float x) { emulator::global_add(p, x); }
FASTATTN_DEVICE int atomic_add_global(int* p, int x) { return emulator::global_add(p, x); }
FASTATTN_DEVICE void pause() { emulator::yield(); }

FASTATTN_DEVICE void sync_warp() { emulator::sync_warp(); }
FASTATTN_DEVICE void sync_block() { emulator::barrier(0, 0, true); }
FASTATTN_DEVICE void barrier_sync(int id, int threads) { emulator::barrier(id, threads, true); }
FASTATTN_DEVICE void barrier_arrive(int id, int threads) { emulator::barrier(id, threads, false); }
FASTATTN_DEVICE int shuffle(int x, int lane) { return emulator::shuffle(x, lane); }
FASTATTN_DEVICE float shuffle_xor(float x, int mask) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = emulator::shuffle(bits, lane_index() ^ mask);
    std::memcpy(&x, &bits, 4);
    return x;
}
template <int N> FASTATTN_DEVICE void registers_increase() { emulator::set_registers(N, true); }
template <int N> FASTATTN_DEVICE void registers_decrease() { emulator::set_registers(N, false); }

FASTATTN_DEVICE void mbarrier_init(SharedAddress b, int n) { emulator::mbarrier_init(b, n); }
FASTATTN_DEVICE void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
FASTATTN_DEVICE void mbarrier_arrive(SharedAddress b) { emulator::mbarrier_arrive(b, 0); }
FASTATTN_DEVICE void mbarrier_arrive_expect(SharedAddress b, int bytes) {
    emulator::mbarrier_arrive(b, bytes);
}
FASTATTN_DEVICE void mbarrier_wait(SharedAddress b, uint32_t parity) {
    emulator::mbarrier_wait(b, parity);
}

FASTATTN_DEVICE void fence_proxy_async() { emulator::fence_proxy_async(); }
FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap*) {}
FASTATTN_DEVICE void tma_load(SharedAddress to, const TensorMap* map, SharedAddress bar, int c0,
                              int c1, int c2, int c3, uint64_t) {
    emulator::tma_load(to, map, bar, {c0, c1, c2, c3});
}
FASTATTN_DEVICE void tma_store(const TensorMap* map, SharedAddress from, int c0, int c1, int c2,
                               int c3) {
    emulator::tma_store(map, from, {c0, c1, c2, c3}, false);
}
FASTATTN_DEVICE void tma_reduce_add(const TensorMap* map, SharedAddress from, int c0, int c1,
                                    int c2, int c3) {
    emulator::tma_store(map, from, {c0, c1, c2, c3}, true);
}
FASTATTN_DEVICE void bulk_load(SharedAddress to, const void* from, int bytes, SharedAddress bar) {
    emulator::bulk_load(to, from, bytes, bar);
}
FASTATTN_DEVICE void bulk_reduce_add(float* to, SharedAddress from, int bytes) {
    emulator::bulk_reduce_add(to, from, bytes);
}
FASTATTN_DEVICE void bulk_commit() { emulator::bulk_commit(); }
template <int N> FASTATTN_DEVICE void bulk_wait() { emulator::bulk_wait(N, false); }
template <int N> FASTATTN_DEVICE void bulk_wait_read() { emulator::bulk_wait(N, true); }

FASTATTN_DEVICE void copy_async(SharedAddress to, const void* from, bool valid) {
    emulator::copy_async(to, from, valid);
}
FASTATTN_DEVICE void copy_commit() { emulator::copy_commit(); }
template <int N> FASTATTN_DEVICE void copy_wait() { emulator::copy_wait(N); }
template <bool TRANSPOSE> FASTATTN_DEVICE void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
    emulator::ldmatrix(r, row, TRANSPOSE);
}
template <bool TRANSPOSE> FASTATTN_DEVICE void stmatrix(SharedAddress row, const uint32_t (&r)[4]) {
    emulator::stmatrix(row, r, TRANSPOSE);
}
template <class E>
FASTATTN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::mma(d, a, b0, b1, IS_BF16<E>);
}

FASTATTN_DEVICE void wgmma_fence() { emulator::wgmma_fence(); }
FASTATTN_DEVICE void wgmma_commit() { emulator::wgmma_commit(); }
template <int N> FASTATTN_DEVICE void wgmma_wait() { emulator::wgmma_wait(N); }
template <int N> FASTATTN_DEVICE void pin(float (&)[N]) {}
FASTATTN_DEVICE void finish_first(float, SharedAddress) {}
template <int N, class E, bool A_MN, bool B_MN>
FASTATTN_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulator::wgmma({d, nullptr, a, b, N, FORMAT<E>, accumulate, A_MN, B_MN});
}
template <int N, class E, bool B_MN> FASTATTN_DEVICE void wgmma_rs(float (&d)[N / 2],
                                                                   const uint32_t (&a)[4],
                                                                   uint64_t b, bool accumulate) {
    emulator::wgmma({d, a, 0, b, N, FORMAT<E>, accumulate, false, B_MN});
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1 / x; }
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
uint16_t narrow_bf16(float x);
uint16_t narrow_fp16(float x);
template <class E> uint32_t pack(float low, float high) {
    if constexpr (IS_BF16<E>)
        return narrow_bf16(low) | static_cast<uint32_t>(narrow_bf16(high)) << 16;
    else
        return narrow_fp16(low) | static_cast<uint32_t>(narrow_fp16(high)) << 16;
}
uint8_t narrow_e4m3(float x);
inline uint32_t pack4_e4m3(float x0, float x1, float x2, float x3) {
    return narrow_e4m3(x0) | narrow_e4m3(x1) << 8 | narrow_e4m3(x2) << 16 |
           static_cast<uint32_t>(narrow_e4m3(x3)) << 24;
}
inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    uint64_t both = x | static_cast<uint64_t>(y) << 32;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return r;
}
float widen_e4m3(uint8_t bits);
float widen_bits(uint16_t bits, bool bf16);
template <class E> float widen(uint32_t bits) {
    return widen_bits(static_cast<uint16_t>(bits), IS_BF16<E>);
}

}  // namespace fastattn::cuda
