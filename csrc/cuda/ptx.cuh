// The instructions that the kernels use, one function each. Shared memory is an address, as in PTX,
// and no C++ pointer leads there: so the emulator, which implements the same names on the CPU
// (tests/emulator), sees every access. wgmma is in wgmma.cuh. next: tile.cuh
#pragma once
#include <cstdint>

#ifdef FASTATTN_EMULATE
#include "emulator.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>

#define FASTATTN_DEVICE __device__ __forceinline__

namespace fastattn::cuda {

using TensorMap = CUtensorMap;
using SharedAddress = uint32_t;

// Names of element types. Their values travel in registers as uint32_t: two of 16 bits, or four of
// 8.
struct Bf16 {};
struct Fp16 {};
struct E4m3 {};

constexpr uint64_t EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

// --- where am I ---------------------------------------------------------------------------------

FASTATTN_DEVICE int thread_index() { return threadIdx.x; }
FASTATTN_DEVICE int lane_index() { return threadIdx.x % 32; }
FASTATTN_DEVICE int block_index() { return blockIdx.x; }
FASTATTN_DEVICE int grid_size() { return gridDim.x; }
// The thread's index, read again from its special register: the compiler does not keep what it
// computes with it in registers from one use to the next. The remainder tells it that the index is
// not negative.
FASTATTN_DEVICE int thread_index_reread() {
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x % 1024;
}
// The shuffle tells the compiler that all lanes of a warp have the same index.
FASTATTN_DEVICE int warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }
FASTATTN_DEVICE int warpgroup_index() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// The first multiple of SHARED_ALIGNMENT in the dynamic shared memory. The alignment of the
// declaration is not always kept, so launches ask for SHARED_ALIGNMENT bytes more than they use.
constexpr int SHARED_ALIGNMENT = 1024;
FASTATTN_DEVICE SharedAddress dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t memory[];
    SharedAddress start = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
    return (start + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
}

// x, of which the compiler knows nothing: it does not compute what depends on x before a loop, to
// keep it in registers throughout.
template <class T> FASTATTN_DEVICE T opaque(T x) {
    asm volatile("" : "+r"(x));
    return x;
}

// --- memory -------------------------------------------------------------------------------------

FASTATTN_DEVICE float ld_shared(SharedAddress a) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(a) : "memory");
    return x;
}
FASTATTN_DEVICE float2 ld_shared2(SharedAddress a) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(a) : "memory");
    return x;
}
FASTATTN_DEVICE uint4 ld_shared4(SharedAddress a) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(a)
                 : "memory");
    return x;
}
FASTATTN_DEVICE void st_shared(SharedAddress a, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(a), "f"(x) : "memory");
}
FASTATTN_DEVICE void st_shared4(SharedAddress a, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
}
template <class T> FASTATTN_DEVICE T ld_global(const T* p) { return *p; }
template <class T> FASTATTN_DEVICE void st_global(T* p, T x) { *p = x; }
FASTATTN_DEVICE int ld_global_acquire(const int* p) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
FASTATTN_DEVICE void add_global_release(int* p, int x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
FASTATTN_DEVICE void add_global(float* p, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}
FASTATTN_DEVICE int atomic_add_global(int* p, int x) { return atomicAdd(p, x); }
FASTATTN_DEVICE void pause() { __nanosleep(64); }  // between two reads of a flag in global memory

// --- threads meet -------------------------------------------------------------------------------

FASTATTN_DEVICE void sync_warp() { __syncwarp(); }
FASTATTN_DEVICE void sync_block() { __syncthreads(); }
FASTATTN_DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FASTATTN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
FASTATTN_DEVICE int shuffle(int x, int lane) { return __shfl_sync(~0u, x, lane); }
template <int N> FASTATTN_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> FASTATTN_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// --- mbarrier -----------------------------------------------------------------------------------

FASTATTN_DEVICE void mbarrier_init(SharedAddress bar, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}
FASTATTN_DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTATTN_DEVICE void mbarrier_arrive(SharedAddress bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives; the phase now also waits for `bytes` more bytes of asynchronous copies.
FASTATTN_DEVICE void mbarrier_arrive_expect(SharedAddress bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}
// Blocks until the phase with this parity has completed. In a new barrier, that of parity 1 has.
FASTATTN_DEVICE void mbarrier_wait(SharedAddress bar, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}

// --- TMA ----------------------------------------------------------------------------------------

// Makes this thread's ordinary writes to shared memory visible to wgmma and TMA.
FASTATTN_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
FASTATTN_DEVICE void tma_load(SharedAddress to, const TensorMap* map, SharedAddress bar, int c0,
                              int c1, int c2, int c3, uint64_t hint) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
        : "memory");
}
FASTATTN_DEVICE void tma_store(const TensorMap* map, SharedAddress from, int c0, int c1, int c2,
                               int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
FASTATTN_DEVICE void tma_reduce_add(const TensorMap* map, SharedAddress from, int c0, int c1,
                                    int c2, int c3) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group "
        "[%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
FASTATTN_DEVICE void bulk_load(SharedAddress to, const void* from, int bytes, SharedAddress bar) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
}
FASTATTN_DEVICE void bulk_reduce_add(float* to, SharedAddress from, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
}
FASTATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most the N newest of this thread's bulk groups are still writing their
// destination, or, with _read, still reading shared memory.
template <int N> FASTATTN_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N> FASTATTN_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// --- cp.async, ldmatrix, stmatrix, mma ----------------------------------------------------------

// Copies 16 bytes to shared memory, zeros where `valid` is false.
FASTATTN_DEVICE void copy_async(SharedAddress to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
FASTATTN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> FASTATTN_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four matrices of 8 x 8. Lane l gives the address of row l % 8 of matrix l / 8, which has 16
// bytes.
template <bool TRANSPOSE> FASTATTN_DEVICE void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
    if constexpr (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
}
template <bool TRANSPOSE> FASTATTN_DEVICE void stmatrix(SharedAddress row, const uint32_t (&r)[4]) {
    if constexpr (TRANSPOSE)
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
            "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
            : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
}

#define FASTATTN_MMA(TYPE)                                                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d[16 x 8] += a[16 x 16] * b[16 x 8]
template <class Element>
FASTATTN_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FASTATTN_DEVICE void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FASTATTN_MMA("bf16");
}
template <>
FASTATTN_DEVICE void mma<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    FASTATTN_MMA("f16");
}

// --- arithmetic ---------------------------------------------------------------------------------

FASTATTN_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FASTATTN_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FASTATTN_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FASTATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTATTN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Two values rounded to 16 bits, `low` in the low half of the result.
template <class Element> FASTATTN_DEVICE uint32_t pack(float low, float high);
template <> FASTATTN_DEVICE uint32_t pack<Bf16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> FASTATTN_DEVICE uint32_t pack<Fp16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Four values rounded to e4m3, x0 in the lowest byte. Values beyond +-448 become +-448.
FASTATTN_DEVICE uint32_t pack4_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t r;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(r)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return r;
}
// Byte i of the result is byte n of x, or byte n - 4 of y, where n is the selector's hexadecimal
// digit i.
FASTATTN_DEVICE uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t selector) {
    return __byte_perm(x, y, selector);
}
// A 16-bit value, given by its bits, as a float.
template <class Element> FASTATTN_DEVICE float widen(uint32_t bits);
template <> FASTATTN_DEVICE float widen<Bf16>(uint32_t bits) { return __uint_as_float(bits << 16); }
template <> FASTATTN_DEVICE float widen<Fp16>(uint32_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
}

}  // namespace fastattn::cuda

#include "wgmma.cuh"
#endif
