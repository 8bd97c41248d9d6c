// The kernels with 16-byte vectors and no special instructions.
// next: kernels.inl
#include "kernels.h"

#define VECTOR_BYTES 16
#define FASTATTN_BF16_DOT 0

namespace fastattn::cpu::portable {
#include "kernels.inl"
}
namespace fastattn::cpu {
extern const IsaKernels* const portable_kernels = &portable::ISA_KERNELS;
}
