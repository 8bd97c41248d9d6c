// The backward kernels of sm_80 as a C function, for ctypes.
// next: ../../csrc/cuda/backward_sm80.cuh
#include "backward_sm80.cuh"

#include "hosts.h"
#include "host_params80.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

template <class Element>
std::string backward_of(const BackwardCall& call, Memory memory, int grid, uint64_t seed) {
    return with_backward80<Element>(call.q.head_dim, memory, [&](auto kernel) {
        using F = decltype(kernel);
        return emulated_backward<F>(call, grid, seed, [&](const BackwardCall& whole) {
            BackwardParams80 p = backward_params80<F>(whole);
            int tiles = p.kv_tiles * p.kv_heads * p.batch;
            return emulator::launch({tiles, F::THREADS, F::SHARED_BYTES, seed},
                                    [&] { backward_sm80<F>(p); });
        });
    });
}

}  // namespace

extern "C" {

// "" or the report of what went wrong. small: of a GPU with 99 KB of shared memory.
const char* emulated_backward_sm80(const BackwardCall* call, bool bf16, int grid, uint64_t seed,
                                   bool small) {
    Memory memory = small ? Memory::SMALL : Memory::LARGE;
    return keep(bf16 ? backward_of<Bf16>(*call, memory, grid, seed)
                     : backward_of<Fp16>(*call, memory, grid, seed));
}
}
