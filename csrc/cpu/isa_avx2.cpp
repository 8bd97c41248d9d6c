// The kernels for AVX2, FMA and F16C.
// next: kernels.inl
#include "kernels.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma,f16c")
#define VECTOR_BYTES 32
#define FASTATTN_AVX2 1
#define FASTATTN_BF16_DOT 0

namespace fastattn::cpu::avx2 {
#include "kernels.inl"
}
namespace fastattn::cpu {
extern const IsaKernels* const avx2_kernels = &avx2::ISA_KERNELS;
}
TARGET_END
#else
namespace fastattn::cpu {
extern const IsaKernels* const avx2_kernels = nullptr;
}
#endif
