// Which instruction set's kernels run, and the loop over work items on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

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

// Items are handed out one by one, in order, to whichever thread is free.
template <class F> void for_each_item(int count, double flops, const F& run) {
    int threads = std::min<int>(count, flops < SERIAL_FLOPS ? 1 : torch::stable::get_num_threads());
    if (threads <= 1) {
        for (int i = 0; i < count; i++) run(i);
        return;
    }
    std::atomic<int> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int i = next++; i < count; i = next++) run(i);
    });
}

}  // namespace fastattn::cpu
