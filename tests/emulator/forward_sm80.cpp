// The sm_80 forward kernels as a C function, for ctypes. next: ../../csrc/cuda/forward_sm80.cuh
#include "forward_sm80.cuh"

#include "hosts.h"
#include "host_params80.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

// Working memory is made here.
template <class Element>
std::string forward_of(ForwardCall call, int multiprocessors, uint64_t seed) {
    join_expanded_heads(call);
    ForwardPlan plan = forward_plan(call, multiprocessors, IDLE_SM80);
    auto [outs, lses] = split_sizes(call, plan);
    std::vector<float> split_out(outs, NAN), split_lse(lses, NAN);
    emulator::register_memory(split_out.data(), 4 * outs, "split_out");
    emulator::register_memory(split_lse.data(), 4 * lses, "split_lse");
    call.split_out = split_out.data();
    call.split_lse = split_lse.data();
    return with_forward80<Element>(call.q.head_dim, plan.few, [&](auto kernel) {
        using F = decltype(kernel);
        ForwardParams80 p = forward_params80<F>(call, plan);
        std::string error =
            emulator::launch({p.tiles * plan.splits, F::THREADS, F::SHARED_BYTES, seed},
                             [&] { forward_sm80<F>(p); });
        if (!error.empty() || plan.splits == 1) return error;
        CombineParams splits = combine_params(call, plan);
        return emulator::launch({combine_grid(call), COMBINE_THREADS, 0, seed},
                                [&] { combine_splits<Element, F::D>(splits); });
    });
}

}  // namespace

extern "C" {

void emulated_forward_plan(const ForwardCall* call, int multiprocessors, bool hopper,
                           int* numbers) {
    ForwardPlan plan = forward_plan(*call, multiprocessors, hopper ? IDLE_SM90 : IDLE_SM80);
    numbers[0] = plan.few;
    numbers[1] = plan.pack_gqa;
    numbers[2] = plan.splits;
}

const char* emulated_forward_sm80(const ForwardCall* call, bool bf16, int multiprocessors,
                                  uint64_t seed) {
    std::string why = why_not_tma(*call);
    if (!why.empty()) return keep(why);
    return keep(bf16 ? forward_of<Bf16>(*call, multiprocessors, seed)
                     : forward_of<Fp16>(*call, multiprocessors, seed));
}
}
