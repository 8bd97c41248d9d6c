// The forward pass on sm_80 and later: what is instantiated, and its launch. next: forward_sm80.cuh
#include "combine.cuh"
#include "driver.h"
#include "forward_sm80.cuh"
#include "sm80.h"

namespace fastattn::cuda {
namespace {

template <class F>
std::string launch(const ForwardCall& call, const ForwardPlan& plan, cudaStream_t stream) {
    ForwardParams80 p = forward_params80<F>(call, plan);
    return launch_large(forward_sm80<F>, p.tiles * plan.splits, F::THREADS, F::SHARED_BYTES, stream,
                        p);
}

template <class Element, int D>
std::string launch_of(const ForwardCall& call, const ForwardPlan& plan, cudaStream_t stream) {
    std::string error = plan.few ? launch<Forward80<Element, D, true>>(call, plan, stream)
                                 : launch<Forward80<Element, D, false>>(call, plan, stream);
    if (!error.empty() || plan.splits == 1) return error;
    combine_parts<Element, D>
        <<<combine_grid(call), COMBINE_THREADS, 0, stream>>>(combine_params(call, plan));
    return state_of(cudaGetLastError());
}

template <class Element>
std::string launch_of(const ForwardCall& call, const ForwardPlan& plan, cudaStream_t stream) {
    switch (call.q.head_dim) {
        case 64:
            return launch_of<Element, 64>(call, plan, stream);
        case 128:
            return launch_of<Element, 128>(call, plan, stream);
        case 256:
            return launch_of<Element, 256>(call, plan, stream);
        default:
            return "the kernels have head dimensions 64, 128 and 256";
    }
}

}  // namespace

std::string launch_forward_sm80(const ForwardCall& call, const ForwardPlan& plan, bool bf16,
                                cudaStream_t stream) {
    return bf16 ? launch_of<Bf16>(call, plan, stream) : launch_of<Fp16>(call, plan, stream);
}

}  // namespace fastattn::cuda
