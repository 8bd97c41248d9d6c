// What ops.cu calls. next: forward_sm90.cu, backward_sm90.cu
#pragma once
#include <string>

#include "host_params.h"

namespace fastattn::cuda {

// Both launch on the current device and return "" or what went wrong. bf16: or fp16; the forward
// takes e4m3 as well, of which it knows by the operands' bytes.
std::string launch_forward_sm90(const ForwardCall& call, bool bf16, int multiprocessors,
                                cudaStream_t stream);
std::string launch_backward_sm90(const BackwardCall& call, bool bf16, int multiprocessors,
                                 cudaStream_t stream);
BackwardSizes backward_sizes_sm90(const Operand& q, const int* cu_q, int sequences);

}  // namespace fastattn::cuda
