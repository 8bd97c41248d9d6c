// The kernels of a backward pass, launched one after the other: those before, the main kernel,
// which differs by architecture, and the one after. next: backward_sm90.cu, backward_sm80.cu
#pragma once
#include "backward_prepost.cuh"
#include "driver.h"
#include "host_params.h"

namespace fastattn::cuda {

constexpr int ROWS_CTAS = 8;  // CTAs a multiprocessor, of the kernels that walk over rows

// main() launches the main kernel. It returns "" or what went wrong, as this does.
template <class F, class Main> std::string launch_backward(const BackwardCall& call,
                                                           int multiprocessors, cudaStream_t stream,
                                                           Main main) {
    PrePostParams rows = pre_post_params<F>(call);
    int over_rows = multiprocessors * ROWS_CTAS;
    backward_prepare<F><<<over_rows, ROWS_THREADS, 0, stream>>>(rows);
    std::string error = problem_of(cudaGetLastError());
    if (!error.empty()) return error;
    if (call.dsinks)
        error =
            launch_large(backward_sinks<F>, rows.heads, SINKS_THREADS, SINKS_SHARED, stream, rows);
    if (error.empty()) error = main();
    if (!error.empty()) return error;
    backward_finish<F><<<over_rows, ROWS_THREADS, 0, stream>>>(rows);
    return problem_of(cudaGetLastError());
}

}  // namespace fastattn::cuda
