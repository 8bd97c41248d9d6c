// What ops_cuda.cu calls for sm_80 and later. next: backward_sm80.cu
#pragma once
#include <string>

#include "launch.h"

namespace fastattn::cuda {

// Launches on the current device and returns "" or what went wrong. A CTA can have this memory.
std::string launch_backward_sm80(const BackwardCall& call, bool bf16, Memory memory,
                                 int multiprocessors, cudaStream_t stream);
BackwardSizes backward_sizes_sm80(const Operand& q, const int* cu_q, int sequences, Memory memory);

}  // namespace fastattn::cuda
