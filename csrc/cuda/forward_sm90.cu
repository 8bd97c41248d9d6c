// What is instantiated of forward_sm90.cuh.
#include "forward_sm90.cuh"

namespace fastattn::cuda {

template __global__ void forward_sm90<Forward<Bf16, 64>>(const __grid_constant__ ForwardParams);
template __global__ void forward_sm90<Forward<Bf16, 128>>(const __grid_constant__ ForwardParams);
template __global__ void forward_sm90<Forward<Bf16, 256>>(const __grid_constant__ ForwardParams);

}  // namespace fastattn::cuda
