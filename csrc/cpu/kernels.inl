// Every kernel of one instruction set. A file isa_*.cpp sets the target, VECTOR_BYTES,
// FASTATTN_BF16_DOT and, where AVX2, FMA and F16C may be used, FASTATTN_AVX2 (a target chosen by
// pragma does not define the compiler's own macro); then it includes this inside a namespace of its
// own. No #include and no std:: template with code in here, or the linker might keep a copy that
// this CPU cannot run.

template <class A> struct IntOfType;
template <> struct IntOfType<float> {
    using type = int32_t;
};
template <> struct IntOfType<double> {
    using type = int64_t;
};
template <class A> using IntOf = typename IntOfType<A>::type;

// tanh(x) = x + x^3 * series(x^2) for |x| < 0.64, minimax, 1e-7 relative.
constexpr float TANH_SERIES[6] = {-0.3333333f,  0.13333184f,   -0.053943656f,
                                  0.021682622f, -0.008130724f, 0.002098863f};

#include "vec.inl"
#include "convert.inl"
#include "gemm.inl"
#include "pack.inl"
#include "product.inl"
#include "block.inl"
#include "query_tile.inl"
#include "mask.inl"
#include "score.inl"
#include "dropout.inl"
#include "statistics.inl"
#include "forward.inl"
#include "backward.inl"
#include "maps.inl"
#include "tangents.inl"
#include "jvp.inl"
#include "jvp_bwd.inl"
#include "rows.inl"
#include "activate.inl"
#include "linear.inl"
#include "fused.inl"

template <class A> static int64_t padded(int columns) { return round_up_panel<A>(columns); }

template <class A>
constexpr Kernels KERNELS = {BLOCK_Q,   BLOCK_KV,   forward<A>, forward_statistics<A>,
                             maps<A>,   weights<A>, combine<A>, backward<A>,
                             reduce<A>, jvp<A>,     jvp_bwd<A>, padded<A>,
                             FUSED<A>};
constexpr IsaKernels ISA_KERNELS = {KERNELS<float>, KERNELS<double>};
