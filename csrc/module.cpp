// fastattn._C: what compiled it, and the tile schedule, so that tests can hold that equal to
// fastattn/core/spec.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "spec.h"

namespace py = pybind11;
using namespace fastattn;

#define FASTATTN_STRING_(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING_(x)

static py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = __VERSION__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["cxx_standard"] = static_cast<long>(__cplusplus);
    info["pybind11"] = FASTATTN_STRING(PYBIND11_VERSION_MAJOR) "." FASTATTN_STRING(
        PYBIND11_VERSION_MINOR) "." FASTATTN_STRING(PYBIND11_VERSION_PATCH);
    return info;
}

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
    m.doc() = "Build facts and tile schedules of fastattn.";
    m.def("build_info", &build_info, "What compiled this module.");
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
