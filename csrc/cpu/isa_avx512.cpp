// The kernels for AVX-512 (F, BW, VL, DQ).
// next: kernels.inl
#include "kernels.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define VECTOR_BYTES 64
#define FASTATTN_AVX2 1
#define FASTATTN_BF16_DOT 0

namespace fastattn::cpu::avx512 {
#include "kernels.inl"
}
namespace fastattn::cpu {
extern const IsaKernels* const avx512_kernels = &avx512::ISA_KERNELS;
}
TARGET_END
#else
namespace fastattn::cpu {
extern const IsaKernels* const avx512_kernels = nullptr;
}
#endif
