// The instruction sets the CPU kernels are compiled for, best first, and which of them this machine
// has.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastattn::cpu {

struct Feature {
    const char* name;  // as Linux writes it in /proc/cpuinfo
    bool here;         // this CPU has it, and the operating system keeps its registers
};

// CPUID itself, because compilers differ in the names that __builtin_cpu_supports() knows.
inline const std::vector<Feature>& features() {
#if defined(__x86_64__)
    enum Register { EAX, EBX, ECX, EDX };
    constexpr uint64_t SSE = 0x2, AVX = 0x6, AVX512 = 0xe6, AMX = 0x60006;  // bits of XCR0
    struct Place {
        const char* name;
        unsigned leaf, subleaf;
        Register reg;
        int bit;
        uint64_t state;
    };
    static constexpr Place PLACES[] = {
        {"sse4_2", 1, 0, ECX, 20, SSE},        {"avx", 1, 0, ECX, 28, AVX},
        {"fma", 1, 0, ECX, 12, AVX},           {"f16c", 1, 0, ECX, 29, AVX},
        {"avx2", 7, 0, EBX, 5, AVX},           {"avx512f", 7, 0, EBX, 16, AVX512},
        {"avx512bw", 7, 0, EBX, 30, AVX512},   {"avx512dq", 7, 0, EBX, 17, AVX512},
        {"avx512vl", 7, 0, EBX, 31, AVX512},   {"avx512_vnni", 7, 0, ECX, 11, AVX512},
        {"avx512_bf16", 7, 1, EAX, 5, AVX512}, {"avx512_fp16", 7, 0, EDX, 23, AVX512},
        {"avx_vnni", 7, 1, EAX, 4, AVX},       {"amx_tile", 7, 0, EDX, 24, AMX},
        {"amx_bf16", 7, 0, EDX, 22, AMX},      {"amx_int8", 7, 0, EDX, 25, AMX},
    };
    static const std::vector<Feature> found = [] {
        unsigned word[4];
        uint64_t kept = SSE;
        bool has_xgetbv = __get_cpuid(1, word, word + 1, word + 2, word + 3) && word[ECX] >> 27 & 1;
        if (has_xgetbv) {
            uint32_t low, high;
            asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            kept = uint64_t(high) << 32 | low;
        }
        std::vector<Feature> rows;
        for (const Place& p : PLACES) {
            bool told =
                __get_cpuid_count(p.leaf, p.subleaf, word, word + 1, word + 2, word + 3) != 0;
            rows.push_back(
                {p.name, told && (word[p.reg] >> p.bit & 1) && (kept & p.state) == p.state});
        }
        return rows;
    }();
#else
    static const std::vector<Feature> found;
#endif
    return found;
}

struct Isa {
    const char* name;
    std::vector<std::string> lacking;  // features that it needs and this machine does not have
    bool automatic = true;             // may be picked when FASTATTN_ISA is not set

    bool supported() const { return lacking.empty(); }
};

inline std::vector<std::string> lacking(std::vector<std::string> needs) {
    for (const Feature& f : features())
        if (f.here) needs.erase(std::remove(needs.begin(), needs.end(), f.name), needs.end());
    return needs;
}

inline const std::vector<Isa>& isas() {
    static const std::vector<Isa> table = {
        {"avx512_bf16", lacking({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16",
                                 "avx2", "fma", "f16c"})},
        {"avx512", lacking({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"})},
        {"avx2", lacking({"avx2", "fma", "f16c"})},
        {"portable", {}},
        {"portable_bf16", {}, false},  // emulates the bf16 dot product, for tests
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
            if (table[i].supported() && table[i].automatic) return i;
        } else if (table[i].name == std::string(wanted)) {
            if (table[i].supported()) return i;
            std::string missing;
            for (const std::string& name : table[i].lacking)
                missing += (missing.empty() ? "" : ", ") + name;
            throw std::invalid_argument(std::string("FASTATTN_ISA=") + wanted +
                                        ": this CPU lacks " + missing);
        }
        names += (i ? ", " : "") + std::string(table[i].name);
    }
    throw std::invalid_argument(std::string("FASTATTN_ISA=") + (wanted ? wanted : "") +
                                " is not one of: " + names);
}

}  // namespace fastattn::cpu
