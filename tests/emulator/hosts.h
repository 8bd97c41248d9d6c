// What the emulator's hosts of attention kernels share.
// next: attention.cpp, forward_sm80.cpp, backward_sm80.cpp
#pragma once
#include "backward_prepost.cuh"
#include "host_params.h"

#include <string>
#include <vector>

namespace fastattn::cuda {

// Keeps the text until the next call, for ctypes to read.
inline const char* keep(std::string text) {
    static std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

// "" or why the kernels cannot read or write one of the call's tensors.
inline std::string why_not_tma(const ForwardCall& call) {
    for (auto [operand, name] : {std::pair{&call.q, "q"}, std::pair{&call.k, "k"},
                                 std::pair{&call.v, "v"}, std::pair{&call.out, "out"}}) {
        std::string why = why_not_tma(*operand, name);
        if (!why.empty()) return why;
    }
    return "";
}

// The backward pass with main(call) as its main kernel. Working memory is made here; grid: of the
// kernels that go over rows. call.semaphores: null, or anything else for deterministic sums.
template <class F, class Main>
std::string emulated_backward(BackwardCall call, int grid, uint64_t seed, Main main) {
    BackwardSizes sizes = BackwardSizes::of<F>(call.q, call.cu_q, call.sequences);
    std::vector<float> lse2(sizes.rows, NAN), delta(sizes.rows, NAN), sums(sizes.dq_sums, 0.0f);
    std::vector<int> semaphores(sizes.semaphores, 0), large(sizes.large, 0);
    emulator::register_memory(lse2.data(), 4 * lse2.size(), "lse2");
    emulator::register_memory(delta.data(), 4 * delta.size(), "delta");
    emulator::register_memory(sums.data(), 4 * sums.size(), "dq_sums");
    emulator::register_memory(semaphores.data(), 4 * semaphores.size(), "semaphores");
    emulator::register_memory(large.data(), 4 * large.size(), "large");
    call.large = large.data();
    call.lse2 = lse2.data();
    call.delta = delta.data();
    call.dq_sums = sums.data();
    if (call.semaphores) call.semaphores = semaphores.data();
    PrePostParams rows = pre_post_params<F>(call);
    emulator::Launch small{grid, ROWS_THREADS, 0, seed};
    std::string error = emulator::launch(small, [&] { backward_prepare<F>(rows); });
    if (!error.empty()) return error;
    if (call.dsinks)
        error = emulator::launch({rows.heads, SINKS_THREADS, SINKS_SHARED, seed},
                                 [&] { backward_sinks<F>(rows); });
    if (error.empty()) error = main(call);
    if (!error.empty()) return error;
    return emulator::launch(small, [&] { backward_finish<F>(rows); });
}

}  // namespace fastattn::cuda
