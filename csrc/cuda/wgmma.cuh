// wgmma: a warpgroup multiplies [64 x 16] by [16 x N], or FP8 [64 x 32] by [32 x N],
// asynchronously. b is in shared memory, a there or in registers. Between an issue and the wait
// that covers it, no thread may touch the registers of d and a, or write the memory of a and b.
#pragma once
#include <cstdint>

namespace fastattn::cuda {

FASTATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FASTATTN_DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most the N newest groups are still running.
template <int N> FASTATTN_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving what produces or consumes these registers past this line.
template <int N> FASTATTN_DEVICE void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Makes ptxas compute x before this line. Otherwise it moves the next wait up, before the
// arithmetic that should run beside the products. The store depends on x, but x is never negative,
// so it never happens.
FASTATTN_DEVICE void finish_first(float x, SharedAddress anywhere) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p st.shared.f32 [%1], %0;\n}" ::"f"(x),
        "r"(anywhere)
        : "memory");
}

// D<n>: the n accumulator registers as operands of the assembly. P<n>: their placeholders.
#define D8(i)                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define D16 D8(0), D8(8)
#define D32 D16, D8(16), D8(24)
#define D40 D32, D8(32)
#define D64 D40, D8(40), D8(48), D8(56)
#define D128 D64, D8(64), D8(72), D8(80), D8(88), D8(96), D8(104), D8(112), D8(120)
#define TEN(t) "%" t "0,%" t "1,%" t "2,%" t "3,%" t "4,%" t "5,%" t "6,%" t "7,%" t "8,%" t "9,"
#define P16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define P30 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9," TEN("1") TEN("2")
#define P60 P30 TEN("3") TEN("4") TEN("5")
#define P120 P60 TEN("6") TEN("7") TEN("8") TEN("9") TEN("10") TEN("11")
#define P32 P30 "%30,%31"
#define P40 P30 "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define P64 P60 "%60,%61,%62,%63"
#define P128 P120 "%120,%121,%122,%123,%124,%125,%126,%127"

#define WGMMA(N, K, TYPE, P, OPERANDS, FLAG)                                                   \
    "{\n.reg .pred keep;\nsetp.ne.b32 keep, " FLAG ", 0;\nwgmma.mma_async.sync.aligned.m64n" N \
    "k" K ".f32." TYPE "." TYPE " {" P "}, " OPERANDS ";\n}"

// d = (accumulate ? d : 0) + a * b. ss: a and b are descriptors (tile.cuh); rs: a is in registers.
// A_MN, B_MN: the operand's M or N index is contiguous in memory. FP8 operands cannot lie so, and
// their instruction has no such immediates.
template <int N, class Element, bool A_MN, bool B_MN> struct Wgmma;

#define IMMEDIATE(i) ", " i
#define NONE(i) ""
#define DEFINE_WGMMA(N, K, HALF, ELEMENT, TYPE, MN, I0, I1, I2, I3, I4, I5, I6)                    \
    template <bool A_MN, bool B_MN> struct Wgmma<N, ELEMENT, A_MN, B_MN> {                         \
        static_assert(K == 16 || !(A_MN || B_MN));                                                 \
        static FASTATTN_DEVICE void ss(float (&d)[HALF], uint64_t a, uint64_t b, int accumulate) { \
            asm volatile(WGMMA(#N, #K, TYPE, P##HALF, I0 ", " I1 ", keep, 1, 1" MN(I3) MN(I4), I2) \
                         : D##HALF                                                                 \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN));                 \
        }                                                                                          \
        static FASTATTN_DEVICE void rs(float (&d)[HALF], const uint32_t (&a)[4], uint64_t b,       \
                                       int accumulate) {                                           \
            asm volatile(WGMMA(#N, #K, TYPE, P##HALF,                                              \
                               "{" I0 "," I1 "," I2 "," I3 "}, " I4 ", keep, 1, 1" MN(I6), I5)     \
                         : D##HALF                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),    \
                           "n"(B_MN));                                                             \
        }                                                                                          \
    };
#define DEFINE_WGMMA_BOTH(N, HALF, ...)                             \
    DEFINE_WGMMA(N, 16, HALF, Bf16, "bf16", IMMEDIATE, __VA_ARGS__) \
    DEFINE_WGMMA(N, 16, HALF, Fp16, "f16", IMMEDIATE, __VA_ARGS__)
#define DEFINE_WGMMA_ALL(N, HALF, ...)      \
    DEFINE_WGMMA_BOTH(N, HALF, __VA_ARGS__) \
    DEFINE_WGMMA(N, 32, HALF, E4m3, "e4m3", NONE, __VA_ARGS__)

DEFINE_WGMMA_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
DEFINE_WGMMA_ALL(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
DEFINE_WGMMA_BOTH(80, 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
DEFINE_WGMMA_ALL(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
DEFINE_WGMMA_ALL(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

template <int N, class Element, bool A_MN, bool B_MN>
FASTATTN_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    Wgmma<N, Element, A_MN, B_MN>::ss(d, a, b, accumulate);
}
template <int N, class Element, bool B_MN>
FASTATTN_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                              bool accumulate) {
    Wgmma<N, Element, false, B_MN>::rs(d, a, b, accumulate);
}

}  // namespace fastattn::cuda
