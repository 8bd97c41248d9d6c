// The GPU and the torch that a call runs on: what the GPU can do, and torch's current stream.
// next: driver.h
#pragma once
#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "driver.h"
#include "config.h"

namespace fastattn::cuda {

struct Gpu {
    int capability, multiprocessors;
    int shared_bytes;  // of shared memory that a CTA can have

    bool hopper() const { return capability == 90; }
    Memory memory() const {
        return shared_bytes >= shared_memory(Memory::LARGE) ? Memory::LARGE : Memory::SMALL;
    }
};

// Fills `gpu`. Returns "" or why the CUDA runtime cannot answer for this device.
inline std::string ask(int device, Gpu& gpu) {
    int major = 0, minor = 0;
    for (auto [answer, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor},
          std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&gpu.multiprocessors, cudaDevAttrMultiProcessorCount},
          std::pair{&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin}}) {
        cudaError_t error = cudaDeviceGetAttribute(answer, attribute, device);
        if (error != cudaSuccess) return problem_of(error);
    }
    gpu.capability = 10 * major + minor;
    return "";
}

// A function of any library that this process has loaded, or null. dlsym alone does not find it:
// Python loads torch's libraries outside of the global scope. The names are gathered first, because
// dlopen takes a lock which must not be taken while dl_iterate_phdr holds its own.
inline void* find_loaded(const char* function) {
    if (void* found = dlsym(RTLD_DEFAULT, function)) return found;
    std::vector<std::string> names;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* list) {
            static_cast<std::vector<std::string>*>(list)->push_back(library->dlpi_name);
            return 0;
        },
        &names);
    for (const std::string& name : names) {
        void* library = name.empty() ? nullptr : dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        void* found = library ? dlsym(library, function) : nullptr;
        if (library) dlclose(library);  // undoes RTLD_NOLOAD's count; torch keeps the library
        if (found) return found;
    }
    return nullptr;
}

// The function is in libtorch_cuda, and is looked up at run time: this library links libtorch_cpu
// alone, so that it can be built against any torch, one without CUDA too.
using CurrentStream = decltype(&aoti_torch_get_current_cuda_stream);
inline CurrentStream current_stream() {
    static const auto found =
        reinterpret_cast<CurrentStream>(find_loaded("aoti_torch_get_current_cuda_stream"));
    return found;
}
inline constexpr const char* NO_CURRENT_STREAM =
    "no library that torch has loaded has aoti_torch_get_current_cuda_stream, as builds with CUDA "
    "do";

inline cudaStream_t stream_of(const Tensor& q) {
    CHECK(current_stream(), NO_CURRENT_STREAM);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(q.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

}  // namespace fastattn::cuda
