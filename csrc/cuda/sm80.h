// The launches of the sm_80 kernels, which run on every later GPU too.
// next: forward_sm80.cu, backward_sm80.cu, host_params80.h
#pragma once
#include <string>

#include "config.h"
#include "host_params80.h"

namespace fastattn::cuda {

// Both launch on the current device and return "" or what went wrong. The forward's call has
// working memory of split_sizes(); `memory` is what a CTA of this GPU can have.
std::string launch_forward_sm80(const ForwardCall& call, const ForwardPlan& plan, bool bf16,
                                cudaStream_t stream);
std::string launch_backward_sm80(const BackwardCall& call, bool bf16, Memory memory,
                                 int multiprocessors, cudaStream_t stream);
BackwardSizes backward_sizes_sm80(const TensorView& q, const int* cu_q, int sequences,
                                  Memory memory);

}  // namespace fastattn::cuda
