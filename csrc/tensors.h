// Tensors of LibTorch's stable ABI, as all operators use them: refusing, asking, making.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "spec.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream text;
    text << "fastattn: ";
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// A macro, so that the parts of the message are only made when it is needed.
#define CHECK(condition, ...) \
    if (!(condition)) fail(__VA_ARGS__)

constexpr int64_t MAX_LENGTH = int64_t(1) << 30;  // rows and keys are counted in int, with sums

inline void check_score_numbers(double scale, double softcap) {
    CHECK(std::abs(scale) <= MAX_SCALE, "scale must be a number in [-1e30, 1e30], got ", scale);
    CHECK(softcap == 0 || (softcap >= MIN_SOFTCAP && softcap <= MAX_SOFTCAP),
          "softcap must be 0 (off) or a number in [1e-30, 1e30], got ", softcap);
}

inline std::string shape_of(const Tensor& t) {
    std::ostringstream text;
    text << "[";
    for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
    text << "]";
    return text.str();
}

inline Tensor unit_stride(const Tensor& t) {
    return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline bool is_dense(const Tensor& t) {
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (int64_t i = 0; i < t.dim(); i++)
        if (t.size(i) != 1) dims.emplace_back(t.stride(i), t.size(i));
    std::sort(dims.begin(), dims.end());
    int64_t expected = 1;
    for (auto [stride, size] : dims) {
        if (stride != expected) return false;
        expected *= size;
    }
    return true;
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(like, sizes, dtype);
}

}  // namespace fastattn
