// What ops_cuda.cu calls. next: forward_sm90.cu
#pragma once
#include <string>

#include "launch.h"

namespace fastattn::cuda {

// Launches on the current device; "" or what went wrong.
std::string launch_forward_sm90(const ForwardCall& call, bool bf16, int multiprocessors,
                                cudaStream_t stream);

}  // namespace fastattn::cuda
