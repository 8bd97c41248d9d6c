// The sm_80 forward kernels as a C function, for ctypes. next: ../../csrc/cuda/forward_sm80.cuh
#include "forward_sm80.cuh"

#include <vector>

#include "combine.cuh"
#include "launch80.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

template <class F>
std::string forward(const ForwardCall& call, const ForwardPlan& plan, uint64_t seed) {
    ForwardParams80 p = forward_params80<F>(call, plan);
    return emulator::launch({p.tiles * plan.splits, F::THREADS, F::SHARED_BYTES, seed},
                            [&] { forward_sm80<F>(p); });
}

// Working memory is made here.
template <class Element, int D>
std::string forward_of(ForwardCall call, int multiprocessors, uint64_t seed) {
    ForwardPlan plan = forward_plan(call, multiprocessors, IDLE_SM80);
    auto [outs, lses] = part_sizes(call, plan);
    std::vector<float> part_out(outs, NAN), part_lse(lses, NAN);
    emulator::register_memory(part_out.data(), 4 * outs, "part_out");
    emulator::register_memory(part_lse.data(), 4 * lses, "part_lse");
    call.part_out = part_out.data();
    call.part_lse = part_lse.data();
    std::string error = plan.few ? forward<Forward80<Element, D, true>>(call, plan, seed)
                                 : forward<Forward80<Element, D, false>>(call, plan, seed);
    if (!error.empty() || plan.splits == 1) return error;
    CombineParams c = combine_params(call, plan);
    return emulator::launch({combine_grid(call), COMBINE_THREADS, 0, seed},
                            [&] { combine_parts<Element, D>(c); });
}

template <class Element>
std::string forward_of(const ForwardCall& call, int multiprocessors, uint64_t seed) {
    switch (call.q.head_dim) {
        case 64:
            return forward_of<Element, 64>(call, multiprocessors, seed);
        case 128:
            return forward_of<Element, 128>(call, multiprocessors, seed);
        case 256:
            return forward_of<Element, 256>(call, multiprocessors, seed);
        default:
            return "no kernel of this head dimension";
    }
}

}  // namespace

extern "C" {

void emulated_forward_plan(const ForwardCall* call, int multiprocessors, bool hopper,
                           int* numbers) {
    ForwardPlan plan = forward_plan(*call, multiprocessors, hopper ? IDLE_SM90 : IDLE_SM80);
    numbers[0] = plan.few;
    numbers[1] = plan.pack;
    numbers[2] = plan.splits;
}

const char* emulated_forward_sm80(const ForwardCall* call, bool bf16, int multiprocessors,
                                  uint64_t seed) {
    static std::string report;
    report = bf16 ? forward_of<Bf16>(*call, multiprocessors, seed)
                  : forward_of<Fp16>(*call, multiprocessors, seed);
    return report.c_str();
}
}
