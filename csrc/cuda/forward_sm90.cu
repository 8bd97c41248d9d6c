// The forward pass on sm_90a: what is instantiated, and its launch. next: forward_sm90.cuh
#include "driver.h"
#include "forward_sm90.cuh"
#include "sm90.h"

namespace fastattn::cuda {
namespace {

template <class F>
std::string launch(const ForwardCall& call, int multiprocessors, cudaStream_t stream) {
    ForwardParams p;
    std::string error = forward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    return launch_large(forward_sm90<F>, std::min(p.tiles, multiprocessors), F::THREADS,
                        F::SHARED_BYTES, stream, p);
}

template <class Element>
std::string launch_of(const ForwardCall& call, int multiprocessors, cudaStream_t stream) {
    switch (call.q.head_dim) {
        case 64:
            return launch<Forward<Element, 64>>(call, multiprocessors, stream);
        case 128:
            return launch<Forward<Element, 128>>(call, multiprocessors, stream);
        case 256:
            return launch<Forward<Element, 256>>(call, multiprocessors, stream);
        default:
            return "the kernels have head dimensions 64, 128 and 256";
    }
}

}  // namespace

std::string launch_forward_sm90(const ForwardCall& call, bool bf16, int multiprocessors,
                                cudaStream_t stream) {
    if (call.q.bytes == 1) return launch_of<E4m3>(call, multiprocessors, stream);
    return bf16 ? launch_of<Bf16>(call, multiprocessors, stream)
                : launch_of<Fp16>(call, multiprocessors, stream);
}

}  // namespace fastattn::cuda
