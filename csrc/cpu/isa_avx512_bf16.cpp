// The kernels for AVX-512 with the bf16 dot product (VDPBF16PS).
// next: kernels.inl
#include "kernels.h"

#if defined(__x86_64__)
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define VECTOR_BYTES 64
#define FASTATTN_AVX2 1
#define FASTATTN_BF16_DOT 1

namespace fastattn::cpu::avx512_bf16 {
#include "kernels.inl"
}
namespace fastattn::cpu {
extern const IsaKernels* const avx512_bf16_kernels = &avx512_bf16::ISA_KERNELS;
}
TARGET_END
#else
namespace fastattn::cpu {
extern const IsaKernels* const avx512_bf16_kernels = nullptr;
}
#endif
