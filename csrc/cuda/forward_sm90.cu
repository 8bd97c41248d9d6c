// The forward pass on sm_90a: what is instantiated, and its launch. next: forward_sm90.cuh
#include <cudaTypedefs.h>

#include "forward_sm90.h"
#include "forward_sm90.cuh"

namespace fastattn::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                         cudaEnableDefault, &state);
    bool ok = error == cudaSuccess && state == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
}

std::string encode(TensorMap& map, void* data, const uint64_t* sizes, const uint64_t* strides,
                   const uint32_t* box) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
    if (!encoder) return "the NVIDIA driver has no cuTensorMapEncodeTiled; 12.0 or newer is needed";
    const uint32_t element_strides[4] = {1, 1, 1, 1};
    CUresult result =
        encoder(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, data, sizes, strides, box, element_strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS
               ? ""
               : "cuTensorMapEncodeTiled failed with error " + std::to_string(result);
}

template <class F>
std::string launch(const ForwardCall& call, int multiprocessors, cudaStream_t stream) {
    ForwardParams p;
    std::string error = forward_params<F>(p, call, encode);
    if (!error.empty()) return error;
    auto kernel = forward_sm90<F>;
    cudaError_t state =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::SHARED_BYTES);
    if (state == cudaSuccess) {
        kernel<<<std::min(p.tiles, multiprocessors), F::THREADS, F::SHARED_BYTES, stream>>>(p);
        state = cudaGetLastError();
    }
    return state == cudaSuccess ? "" : cudaGetErrorString(state);
}

template <class Element>
std::string launch_of(const ForwardCall& call, int multiprocessors, cudaStream_t stream) {
    switch (call.q.head_dim) {
        case 64:
            return launch<Forward<Element, 64>>(call, multiprocessors, stream);
        case 128:
            return launch<Forward<Element, 128>>(call, multiprocessors, stream);
        case 256:
            return launch<Forward<Element, 256>>(call, multiprocessors, stream);
        default:
            return "the kernels have head dimensions 64, 128 and 256";
    }
}

}  // namespace

std::string launch_forward_sm90(const ForwardCall& call, bool bf16, int multiprocessors,
                                cudaStream_t stream) {
    return bf16 ? launch_of<Bf16>(call, multiprocessors, stream)
                : launch_of<Fp16>(call, multiprocessors, stream);
}

}  // namespace fastattn::cuda
