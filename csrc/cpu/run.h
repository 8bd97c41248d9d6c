// Which instruction set's kernels run, and the loop over work items on torch's threads.
#pragma once
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "isa.h"
#include "params.h"

namespace fastattn::cpu {

inline const Kernels& kernels_for(Dtype dtype) {
    static const IsaKernels* const table[] = {avx512_bf16_kernels, avx512_kernels, avx2_kernels,
                                              portable_kernels, portable_bf16_kernels};
    const IsaKernels& isa = *table[select_isa()];
    return dtype == Dtype::F64 ? isa.f64 : isa.f32;
}

constexpr double SERIAL_FLOPS = 4e5;  // about 10 us of one core: less than waking the others

// A child of fork() has only the thread that forked; OpenMP does not know, and would wait for ever
// for those that its parent had. There, items run one after the other.
inline bool forked = false;
inline const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// Items are handed out one by one, in order, to whichever thread is free. The first exception ends
// the loop and goes to the caller: C code lies between, which would only say that something failed.
template <class F> void for_each_item(int64_t count, double flops, const F& run) {
    bool serial = forked || flops < SERIAL_FLOPS;
    int64_t threads = std::min<int64_t>(count, serial ? 1 : torch::stable::get_num_threads());
    if (threads <= 1) {
        for (int64_t i = 0; i < count; i++) run(i);
        return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        try {
            for (int64_t i = next++; i < count && !failed; i = next++) run(i);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    });
    if (error) std::rethrow_exception(error);
}

}  // namespace fastattn::cpu
