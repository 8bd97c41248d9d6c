// What ops.cu asks of the GPU and of torch while it runs. next: driver.h
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
    int capability, multiprocessors, shared_bytes;  // shared memory that a CTA can have

    bool hopper() const { return capability == 90; }
    Memory memory() const {
        return shared_bytes >= shared_memory(Memory::LARGE) ? Memory::LARGE : Memory::SMALL;
    }
};

// "" or why the CUDA runtime cannot answer for this device.
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

// A function of any library that this process has loaded, or null. Python loads torch's libraries
// where dlsym does not look by itself. Names are gathered first: dlopen takes a lock that must not
// be asked for under the one that dl_iterate_phdr holds.
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
        if (library) dlclose(library);  // NOLOAD counted it; torch keeps it
        if (found) return found;
    }
    return nullptr;
}

// The function is libtorch_cuda's, and is looked up: this library links libtorch_cpu alone, so that
// it can be built against any torch and loads wherever that library is.
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
