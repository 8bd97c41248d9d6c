// The CUDA runtime and driver as the host uses them: what an error means, the driver's encoder of
// tensor maps, and launches with more than 48 KB of shared memory.
#pragma once
#include <cudaTypedefs.h>

#include <string>

#include "ptx.cuh"

namespace fastattn::cuda {

inline std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What an error of the runtime means to the user. Where the driver is older than the major version
// of the runtime in this library, every call of the runtime fails; minor versions are compatible.
inline std::string problem_of(cudaError_t error) {
    if (error == cudaSuccess) return "";
    constexpr int NEEDED = CUDART_VERSION / 1000 * 1000;
    int driver = 0;
    cudaDriverGetVersion(&driver);
    std::string text = cudaGetErrorString(error);
    if (driver == 0) return "there is no NVIDIA driver here (" + text + ")";
    if (driver < NEEDED)
        return "the NVIDIA driver serves CUDA up to " + version_text(driver) +
               ", and this library needs a driver for CUDA " + version_text(NEEDED) +
               " or newer (" + text + ")";
    return text;
}

inline PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                         cudaEnableDefault, &state);
#else
    cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state);
#endif
    bool ok = error == cudaSuccess && state == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
}

inline std::string encode(TensorMap& map, void* data, int element_bytes, const uint64_t* sizes,
                          const uint64_t* strides, const uint32_t* box) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
    if (!encoder) return "the NVIDIA driver has no cuTensorMapEncodeTiled; 12.0 or newer is needed";
    const uint32_t element_strides[4] = {1, 1, 1, 1};
    CUtensorMapDataType type =
        element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    CUresult result =
        encoder(&map, type, 4, data, sizes, strides, box, element_strides,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS
               ? ""
               : "cuTensorMapEncodeTiled failed with error " + std::to_string(result);
}

template <class Params> std::string launch_large(void (*kernel)(Params), int grid, int threads,
                                                 int shared_bytes, cudaStream_t stream,
                                                 const Params& p) {
    shared_bytes += SHARED_ALIGNMENT;
    cudaError_t state =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (state != cudaSuccess) return problem_of(state);
    kernel<<<grid, threads, shared_bytes, stream>>>(p);
    return problem_of(cudaGetLastError());
}

}  // namespace fastattn::cuda
