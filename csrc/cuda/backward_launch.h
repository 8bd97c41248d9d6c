// What the backward passes launch one after the other; their main kernels differ.
// next: backward_sm90.cu, backward_sm80.cu
#pragma once
#include "backward_prepost.cuh"
#include "driver.h"
#include "host_params.h"

namespace fastattn::cuda {

constexpr int ROWS_CTAS = 8;  // of the kernels over rows, on a multiprocessor

// main() launches the main kernel; it returns "" or what went wrong, as this does.
template <class F, class Main> std::string launch_backward(const BackwardCall& call,
                                                           int multiprocessors, cudaStream_t stream,
                                                           Main main) {
    BackwardRowsParams rows = backward_rows_params<F>(call);
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
