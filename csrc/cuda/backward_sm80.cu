// The backward pass on sm_80 and later: what is instantiated, and its launch.
// next: backward_sm80.cuh
#include "backward_sm80.cuh"

#include "backward_launch.h"
#include "sm80.h"

namespace fastattn::cuda {
namespace {

template <class Element> std::string launch_of(const BackwardCall& call, Memory memory,
                                               int multiprocessors, cudaStream_t stream) {
    return with_backward80<Element>(call.q.head_dim, memory, [&](auto kernel) {
        using F = decltype(kernel);
        BackwardParams80 p = backward_params80<F>(call);
        return launch_backward<F>(call, multiprocessors, stream, [&] {
            return launch_large(backward_sm80<F>, p.kv_tiles * p.kv_heads * p.batch, F::THREADS,
                                F::SHARED_BYTES, stream, p);
        });
    });
}

}  // namespace

std::string launch_backward_sm80(const BackwardCall& call, bool bf16, Memory memory,
                                 int multiprocessors, cudaStream_t stream) {
    return bf16 ? launch_of<Bf16>(call, memory, multiprocessors, stream)
                : launch_of<Fp16>(call, memory, multiprocessors, stream);
}

BackwardSizes backward_sizes_sm80(const TensorView& q, const int* cu_q, int sequences,
                                  Memory memory) {
    return with_backward80<Bf16>(q.head_dim, memory, [&](auto kernel) {
        return BackwardSizes::of<decltype(kernel)>(q, cu_q, sequences);
    });
}

}  // namespace fastattn::cuda
