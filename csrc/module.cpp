// fastattn._C: facts that are not tensor operators. What was built, what this CPU has, which
// instruction set runs, and the tile schedule, so that tests can hold it equal to fastattn/spec.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "spec.h"

namespace py = pybind11;
using namespace fastattn;

#define FASTATTN_STRING_(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING_(x)

static py::dict build_info() {
    py::dict info;
    info["compiler"] = "GCC " __VERSION__;
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["pybind11"] = FASTATTN_STRING(PYBIND11_VERSION_MAJOR) "." FASTATTN_STRING(
        PYBIND11_VERSION_MINOR) "." FASTATTN_STRING(PYBIND11_VERSION_PATCH);
    return info;
}

// The features the kernels could use, whether or not they were compiled for them.
static std::map<std::string, bool> cpu_features() {
    std::map<std::string, bool> features;
#if defined(__x86_64__)
#define FASTATTN_FEATURE(name) features[name] = __builtin_cpu_supports(name) != 0
    FASTATTN_FEATURE("sse4.2");
    FASTATTN_FEATURE("avx");
    FASTATTN_FEATURE("fma");
    FASTATTN_FEATURE("f16c");
    FASTATTN_FEATURE("avx2");
    FASTATTN_FEATURE("avx512f");
    FASTATTN_FEATURE("avx512bw");
    FASTATTN_FEATURE("avx512dq");
    FASTATTN_FEATURE("avx512vl");
    FASTATTN_FEATURE("avx512vnni");
    FASTATTN_FEATURE("avx512bf16");
#undef FASTATTN_FEATURE
#endif
    return features;
}

static std::vector<std::pair<std::string, bool>> isa_table() {
    std::vector<std::pair<std::string, bool>> rows;
    for (const cpu::Isa& isa : cpu::isas()) rows.emplace_back(isa.name, isa.supported);
    return rows;
}

static std::string selected_isa() { return cpu::isas()[cpu::select_isa()].name; }

using Bounds = std::tuple<int, int, int, int>;
constexpr int LENGTH_LIMIT = 1 << 30;  // below it no sum in Band overflows

static Band make_band(int left, int right, bool align_end, int q_len, int kv_len) {
    for (int value : {q_len, kv_len})
        if (value < 0 || value >= LENGTH_LIMIT)
            throw std::invalid_argument("q_len and kv_len must be in [0, 2^30), got " +
                                        std::to_string(value));
    for (int value : {left, right})
        if (value < -1 || value >= LENGTH_LIMIT)
            throw std::invalid_argument("left and right must be in [-1, 2^30), got " +
                                        std::to_string(value));
    return {left, right, align_end ? kv_len - q_len : 0, q_len, kv_len};
}

static void check_tile(const char* name, int begin, int end, int length) {
    if (begin < 0 || begin >= end || end > length)
        throw std::invalid_argument(std::string("the tile [") + std::to_string(begin) + ", " +
                                    std::to_string(end) + ") must be a non-empty part of the " +
                                    std::to_string(length) + " " + name);
}

static Bounds bounds(Range r) { return {r.begin, r.full_begin, r.full_end, r.end}; }

static Bounds kv_range(int left, int right, bool align_end, int q_len, int kv_len, int q0, int q1) {
    Band band = make_band(left, right, align_end, q_len, kv_len);
    check_tile("rows", q0, q1, q_len);
    return bounds(band.kv_range(q0, q1));
}

static Bounds q_range(int left, int right, bool align_end, int q_len, int kv_len, int k0, int k1) {
    Band band = make_band(left, right, align_end, q_len, kv_len);
    check_tile("keys", k0, k1, kv_len);
    return bounds(band.q_range(k0, k1));
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build facts, CPU features and tile schedules of fastattn.";
    m.def("build_info", &build_info, "What compiled this module.");
    m.def("cpu_features", &cpu_features,
          "Instruction-set extensions, and whether this CPU has each.");
    m.def("isas", &isa_table, "(name, supported) of every instruction set compiled, best first.");
    m.def(
        "selected_isa", &selected_isa,
        "The instruction set the CPU kernels use; FASTATTN_ISA forces one. Raises ValueError when "
        "that names an unknown or unsupported one.");
    m.def("kv_range", &kv_range, py::arg("left"), py::arg("right"), py::arg("align_end"),
          py::arg("q_len"), py::arg("kv_len"), py::arg("q0"), py::arg("q1"),
          "(begin, full_begin, full_end, end): the keys that query rows [q0, q1) need; all of "
          "[full_begin, full_end) is visible to every row.");
    m.def(
        "q_range", &q_range, py::arg("left"), py::arg("right"), py::arg("align_end"),
        py::arg("q_len"), py::arg("kv_len"), py::arg("k0"), py::arg("k1"),
        "(begin, full_begin, full_end, end): the query rows that keys [k0, k1) need; every row of "
        "[full_begin, full_end) sees all of them.");
}
