// The forward pass on sm_80 and later: what is instantiated, and its launch. next: forward_sm80.cuh
#include "combine.cuh"
#include "driver.h"
#include "forward_sm80.cuh"
#include "sm80.h"

namespace fastattn::cuda {
namespace {

template <class Element>
std::string launch_of(const ForwardCall& call, const ForwardPlan& plan, cudaStream_t stream) {
    return with_forward80<Element>(call.q.head_dim, plan.few, [&](auto kernel) {
        using F = decltype(kernel);
        ForwardParams80 p = forward_params80<F>(call, plan);
        std::string error = launch_large(forward_sm80<F>, p.tiles * plan.splits, F::THREADS,
                                         F::SHARED_BYTES, stream, p);
        if (!error.empty() || plan.splits == 1) return error;
        combine_splits<Element, F::D>
            <<<combine_grid(call), COMBINE_THREADS, 0, stream>>>(combine_params(call, plan));
        return problem_of(cudaGetLastError());
    });
}

}  // namespace

std::string launch_forward_sm80(const ForwardCall& call, const ForwardPlan& plan, bool bf16,
                                cudaStream_t stream) {
    return bf16 ? launch_of<Bf16>(call, plan, stream) : launch_of<Fp16>(call, plan, stream);
}

}  // namespace fastattn::cuda
