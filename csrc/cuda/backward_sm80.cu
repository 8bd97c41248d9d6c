// The backward pass on sm_80 and newer: what is instantiated, and its launch.
// next: backward_sm80.cuh
#include "backward_sm80.cuh"

#include "backward_rows.cuh"
#include "driver.h"

namespace fastattn::cuda {
template __global__ void backward_sm80<BackwardSm80<Bf16, 64, Memory::LARGE>>(const BackwardParamsSm80);
template __global__ void backward_sm80<BackwardSm80<Bf16, 64, Memory::SMALL>>(const BackwardParamsSm80);
template __global__ void backward_sm80<BackwardSm80<Bf16, 128, Memory::LARGE>>(const BackwardParamsSm80);
template __global__ void backward_sm80<BackwardSm80<Bf16, 128, Memory::SMALL>>(const BackwardParamsSm80);
template __global__ void backward_sm80<BackwardSm80<Bf16, 256, Memory::LARGE>>(const BackwardParamsSm80);
}
