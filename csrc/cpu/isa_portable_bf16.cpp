// The kernels with 16-byte vectors and no special instructions; the bf16 dot product is emulated,
// for tests.
// next: kernels.inl
#include "kernels.h"

#define VECTOR_BYTES 16
#define FASTATTN_BF16_DOT 1

namespace fastattn::cpu::portable_bf16 {
#include "kernels.inl"
}
namespace fastattn::cpu {
extern const IsaKernels* const portable_bf16_kernels = &portable_bf16::ISA_KERNELS;
}
