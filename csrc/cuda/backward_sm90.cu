// The backward pass on sm_90a: what is instantiated, and its launch. next: backward_sm90.cuh
#include "backward_sm90.cuh"

#include "backward_launch.h"
#include "sm90.h"

namespace fastattn::cuda {
namespace {

template <class F>
std::string launch(const BackwardCall& call, int multiprocessors, cudaStream_t stream) {
    BackwardParams p;
    std::string error = backward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    return launch_backward<F>(call, multiprocessors, stream, [&] {
        return launch_large(backward_sm90<F>, p.kv_tiles * p.kv_heads * p.batch, F::THREADS,
                            F::SHARED_BYTES, stream, p);
    });
}

template <class Element>
std::string launch_of(const BackwardCall& call, int multiprocessors, cudaStream_t stream) {
    switch (call.q.head_dim) {
        case 64:
            return launch<Backward<Element, 64>>(call, multiprocessors, stream);
        case 128:
            return launch<Backward<Element, 128>>(call, multiprocessors, stream);
        default:
            return launch<Backward<Element, 256>>(call, multiprocessors, stream);
    }
}

}  // namespace

std::string launch_backward_sm90(const BackwardCall& call, bool bf16, int multiprocessors,
                                 cudaStream_t stream) {
    return bf16 ? launch_of<Bf16>(call, multiprocessors, stream)
                : launch_of<Fp16>(call, multiprocessors, stream);
}

BackwardSizes backward_sizes_sm90(const TensorView& q, const int* cu_q, int sequences) {
    switch (q.head_dim) {
        case 64:
            return BackwardSizes::of<Backward<Bf16, 64>>(q, cu_q, sequences);
        case 128:
            return BackwardSizes::of<Backward<Bf16, 128>>(q, cu_q, sequences);
        default:
            return BackwardSizes::of<Backward<Bf16, 256>>(q, cu_q, sequences);
    }
}

}  // namespace fastattn::cuda
