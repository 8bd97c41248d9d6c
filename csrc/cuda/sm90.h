// The launches of the sm_90a kernels. next: forward_sm90.cu, backward_sm90.cu
#pragma once
#include <string>

#include "host_params.h"

namespace fastattn::cuda {

// Both launch on the current device and return "" or what went wrong. Elements are BF16 or, where
// bf16 is false, FP16; the forward takes FP8 as well, which it tells by the size of q's elements.
std::string launch_forward_sm90(const ForwardCall& call, bool bf16, int multiprocessors,
                                cudaStream_t stream);
std::string launch_backward_sm90(const BackwardCall& call, bool bf16, int multiprocessors,
                                 cudaStream_t stream);
BackwardSizes backward_sizes_sm90(const TensorView& q, const int* cu_q, int sequences);

}  // namespace fastattn::cuda
