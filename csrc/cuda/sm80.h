// What ops_cuda.cu calls for sm_80 and later. next: forward_sm80.cu, launch80.h
#pragma once
#include <string>

#include "launch80.h"

namespace fastattn::cuda {

// Launches on the current device and returns "" or what went wrong. The call has part_sizes() of
// working memory for the plan.
std::string launch_forward_sm80(const ForwardCall& call, const ForwardPlan& plan, bool bf16,
                                cudaStream_t stream);

}  // namespace fastattn::cuda
