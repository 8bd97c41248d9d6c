// The types that tensors of the CPU kernels are stored in.
#pragma once

namespace fastattn::cpu {

enum class Dtype { F32, F64, BF16, F16, BOOL };

inline int size_of(Dtype t) {
    return t == Dtype::F64 ? 8 : t == Dtype::F32 ? 4 : t == Dtype::BOOL ? 1 : 2;
}

}  // namespace fastattn::cpu
