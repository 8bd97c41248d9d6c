// The attention kernels as C functions, for ctypes. next: ../../csrc/cuda/forward_sm90.cuh
#include "backward_rows.cuh"
#include "backward_sm90.cuh"
#include "forward_sm90.cuh"
#include "launch.h"

#include <vector>

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

std::string encode(TensorMap& map, void* data, int element_bytes, const uint64_t* sizes,
                   const uint64_t* strides, const uint32_t* box) {
    return emulator::encode_tiled(map, data, 4, element_bytes, sizes, strides, box,
                                  emulator::Swizzle::B128);
}

const char* keep(std::string text) {
    static std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

template <class F> std::string forward(const ForwardCall& call, int grid, uint64_t seed) {
    ForwardParams p;
    std::string error = forward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    grid = std::min(grid, p.tiles);
    return emulator::launch({grid, F::THREADS, F::SHARED_BYTES, seed}, [&] { forward_sm90<F>(p); });
}

template <class Element> std::string forward_of(const ForwardCall& call, int grid, uint64_t seed) {
    switch (call.q.head_dim) {
        case 64:
            return forward<Forward<Element, 64>>(call, grid, seed);
        case 128:
            return forward<Forward<Element, 128>>(call, grid, seed);
        case 256:
            return forward<Forward<Element, 256>>(call, grid, seed);
        default:
            return "no kernel of this head dimension";
    }
}

// Working memory is made here; grid: of the kernels that go over rows.
// call.turns: null, or anything else to take turns.
template <class F> std::string backward(BackwardCall call, int grid, uint64_t seed) {
    BackwardSizes sizes = BackwardSizes::of<F>(call.q, call.cu_q, call.sequences);
    std::vector<float> lse2(sizes.rows, NAN), delta(sizes.rows, NAN), sums(sizes.sums, 0.0f);
    std::vector<int> turns(sizes.turns, 0);
    emulator::register_memory(lse2.data(), 4 * lse2.size(), "lse2");
    emulator::register_memory(delta.data(), 4 * delta.size(), "delta");
    emulator::register_memory(sums.data(), 4 * sums.size(), "dq_sums");
    emulator::register_memory(turns.data(), 4 * turns.size(), "turns");
    call.lse2 = lse2.data();
    call.delta = delta.data();
    call.dq_sums = sums.data();
    if (call.turns) call.turns = turns.data();
    BackwardParams p;
    std::string error = backward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    BackwardRowsParams rows = backward_rows_params<F>(call);
    emulator::Launch small{grid, ROWS_THREADS, 0, seed};
    error = emulator::launch(small, [&] { backward_prepare<F>(rows); });
    if (!error.empty()) return error;
    if (call.dsinks)
        error = emulator::launch({rows.heads, SINKS_THREADS, SINKS_SHARED, seed},
                                 [&] { backward_sinks<F>(rows); });
    if (!error.empty()) return error;
    error = emulator::launch({p.kv_tiles * p.kv_heads * p.batch, F::THREADS, F::SHARED_BYTES, seed},
                             [&] { backward_sm90<F>(p); });
    if (!error.empty()) return error;
    return emulator::launch(small, [&] { backward_finish<F>(rows); });
}

template <class Element>
std::string backward_of(const BackwardCall& call, int grid, uint64_t seed) {
    switch (call.q.head_dim) {
        case 64:
            return backward<Backward<Element, 64>>(call, grid, seed);
        case 128:
            return backward<Backward<Element, 128>>(call, grid, seed);
        case 256:
            return backward<Backward<Element, 256>>(call, grid, seed);
        default:
            return "no kernel of this head dimension";
    }
}

}  // namespace

extern "C" {

const char* emulated_backward_sm90(const BackwardCall* call, bool bf16, int grid, uint64_t seed) {
    return keep(bf16 ? backward_of<Bf16>(*call, grid, seed) : backward_of<Fp16>(*call, grid, seed));
}

const char* emulated_register(const void* data, int64_t bytes, const char* name) {
    emulator::register_memory(data, bytes, name);
    return "";
}
void emulated_forget() { emulator::forget_memory(); }

// "" or the report of what went wrong. The grid is what the device would have room for.
const char* emulated_forward_sm90(const ForwardCall* call, bool bf16, int grid, uint64_t seed) {
    for (auto [operand, name] : {std::pair{&call->q, "q"}, std::pair{&call->k, "k"},
                                 std::pair{&call->v, "v"}, std::pair{&call->out, "out"}}) {
        std::string why = why_not_tma(*operand, name);
        if (!why.empty()) return keep(why);
    }
    if (call->q.bytes == 1) return keep(forward_of<E4m3>(*call, grid, seed));
    return keep(bf16 ? forward_of<Bf16>(*call, grid, seed) : forward_of<Fp16>(*call, grid, seed));
}
}
