// The instruction sets the CPU kernels are compiled for, best first, and which of them this machine
// has.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastattn::cpu {

struct Isa {
    const char* name;
    bool supported;  // by this CPU and its operating system
    bool automatic;  // may be picked when FASTATTN_ISA is not set
};

inline const std::vector<Isa>& isas() {
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
    static const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
    static const bool avx2 = false, avx512 = false, bf16 = false;
#endif
    static const std::
        vector<Isa>
            table =
                {
                    {"avx512_bf16", bf16, true},    {"avx512", avx512, true},
                    {"avx2", avx2, true},           {"portable", true, true},
                    {"portable_bf16", true, false},  // emulates the bf16 dot product, for tests
    };
    return table;
}

// Index into isas(): FASTATTN_ISA if set, else the best this machine has. Read at each call.
inline int select_isa() {
    const std::vector<Isa>& table = isas();
    const char* wanted = std::getenv("FASTATTN_ISA");
    std::string names;
    for (int i = 0; i < static_cast<int>(table.size()); i++) {
        if (wanted == nullptr || *wanted == 0) {
            if (table[i].supported && table[i].automatic) return i;
        } else if (table[i].name == std::string(wanted)) {
            if (table[i].supported) return i;
            throw std::invalid_argument(std::string("FASTATTN_ISA=") + wanted +
                                        ": this CPU does not have that instruction set");
        }
        names += (i ? ", " : "") + std::string(table[i].name);
    }
    throw std::invalid_argument(std::string("FASTATTN_ISA=") + (wanted ? wanted : "") +
                                " is not one of: " + names);
}

}  // namespace fastattn::cpu
