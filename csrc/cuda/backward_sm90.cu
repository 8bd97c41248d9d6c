// The backward pass on sm_90a: what is instantiated, and its launch. next: backward_sm90.cuh
#include "backward_rows.cuh"
#include "backward_sm90.cuh"
#include "driver.h"
#include "sm90.h"

namespace fastattn::cuda {
namespace {

constexpr int ROWS_CTAS = 8;  // of the kernels over rows, on a multiprocessor

template <class F>
std::string launch(const BackwardCall& call, int multiprocessors, cudaStream_t stream) {
    BackwardParams p;
    std::string error = backward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    BackwardRowsParams rows = backward_rows_params<F>(call);
    int over_rows = multiprocessors * ROWS_CTAS;
    backward_prepare<F><<<over_rows, ROWS_THREADS, 0, stream>>>(rows);
    error = state_of(cudaGetLastError());
    if (!error.empty()) return error;
    if (call.dsinks)
        error =
            launch_large(backward_sinks<F>, rows.heads, SINKS_THREADS, SINKS_SHARED, stream, rows);
    if (!error.empty()) return error;
    error = launch_large(backward_sm90<F>, p.kv_tiles * p.kv_heads * p.batch, F::THREADS,
                         F::SHARED_BYTES, stream, p);
    if (!error.empty()) return error;
    backward_finish<F><<<over_rows, ROWS_THREADS, 0, stream>>>(rows);
    return state_of(cudaGetLastError());
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

BackwardSizes backward_sizes_sm90(const Operand& q, const int* cu_q, int sequences) {
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
