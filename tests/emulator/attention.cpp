// The attention kernels as C functions, for ctypes. next: ../../csrc/cuda/forward_sm90.cuh
#include "backward_sm90.cuh"
#include "forward_sm90.cuh"
#include "hosts.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

std::string encode(TensorMap& map, void* data, int element_bytes, const uint64_t* sizes,
                   const uint64_t* strides, const uint32_t* box) {
    return emulator::encode_tiled(map, data, 4, element_bytes, sizes, strides, box,
                                  emulator::Swizzle::B128);
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

template <class F> std::string backward(const BackwardCall& call, int grid, uint64_t seed) {
    return emulated_backward<F>(call, grid, seed, [&](const BackwardCall& whole) {
        BackwardParams p;
        std::string error = backward_params<F>(p, whole, encode);
        if (!error.empty()) return error;
        int tiles = p.kv_tiles * p.kv_heads * p.batch;
        return emulator::launch({tiles, F::THREADS, F::SHARED_BYTES, seed},
                                [&] { backward_sm90<F>(p); });
    });
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
    std::string why = why_not_tma(*call);
    if (!why.empty()) return keep(why);
    ForwardCall joined = *call;
    join_expanded_heads(joined);
    if (call->q.bytes == 1) return keep(forward_of<E4m3>(joined, grid, seed));
    return keep(bf16 ? forward_of<Bf16>(joined, grid, seed) : forward_of<Fp16>(joined, grid, seed));
}
}
