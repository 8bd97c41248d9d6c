// Tensors of LibTorch's stable ABI, as all operators use them: errors, properties, new tensors.
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

#include "poison.h"
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

// A macro, so that the parts of the message are only evaluated when it fails.
#define CHECK(condition, ...) \
    if (!(condition)) fail(__VA_ARGS__)

constexpr int64_t MAX_LENGTH = int64_t(1) << 30;  // rows and keys, and sums of these, are ints
constexpr int64_t MAX_HEADS = int64_t(1)
                              << 31;  // over all sequences: one word of dropout's counter
// Limits of a call's sequences and of all their pages, which take 100 and 4 bytes each: a tensor
// expanded with a stride of 0 could otherwise ask for any number of them.
constexpr int64_t MAX_ENTRIES = int64_t(1) << 24, MAX_PAGES = int64_t(1) << 28;

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

// Fills a new tensor with NaN (-1 for integers) under test. Every tensor that an operator allocates
// comes from a function below or is passed to this one.
inline Tensor poisoned(Tensor t) {
    if (!poison_on() || t.numel() == 0) return t;
    if (t.is_cpu()) {
        poison(t.data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
    } else {
        bool integers = t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long;
        torch::stable::fill_(t, integers ? -1.0 : NAN);
    }
    return t;
}

// Takes 2 thousand instructions a tensor. torch::stable::new_empty() and empty_like() go through
// torch's dispatcher and take 7 and 5.
inline Tensor new_strided(const Tensor& like, int64_t dim, const int64_t* sizes,
                          const int64_t* strides, ScalarType dtype) {
    AtenTensorHandle made;
    int32_t device_type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, type, device_type,
                                                           like.get_device_index(), &made));
    return poisoned(Tensor(made));
}

// Contiguous, on the device of `like`.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(1, sizes[i]))
        strides[i] = stride;
    return new_strided(like, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                       dtype);
}

// A new tensor with x's shape, dtype and order in memory.
inline Tensor new_like(const Tensor& x) {
    if (!is_dense(x)) return poisoned(torch::stable::empty_like(x));
    return new_strided(x, x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
}

}  // namespace fastattn
