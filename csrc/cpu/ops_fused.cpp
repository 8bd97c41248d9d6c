// The CPU operators around attention: norm, gate, activate, rotate, cross_entropy. Checks, and
// the parallel loops over rows.
// next: fused.inl
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "call.h"
#include "run.h"

namespace fastattn::cpu {
namespace {

constexpr int64_t ITEM_VALUES = 1 << 14;  // values of a work item: 64 KiB of fp32, in L2
constexpr double FLOPS_A_VALUE = 8;

// --- rows ---------------------------------------------------------------------------------------

// The rows along a tensor's last dimension. Those of a dense tensor are processed in memory order,
// so that a transposed one is not copied, and results have its strides. Other tensors are read in
// place where their rows are evenly spaced (half of a wider projection), and results are
// contiguous.
class RowOrder {
  public:
    explicit RowOrder(Tensor& x) {
        check_cpu(x, "a tensor");
        auto dtype = dtype_of(x);
        CHECK(dtype && *dtype != Dtype::BOOL,
              "tensors must be float32, float64, bfloat16 or float16");
        CHECK(x.dim() >= 1, "tensors must have at least one dimension");
        const int64_t last = x.dim() - 1;
        CHECK(x.size(last) < MAX_LENGTH, "rows must be shorter than 2^30");
        this->dtype = *dtype;
        dim = static_cast<int>(x.size(last));
        order_.resize(last);
        std::iota(order_.begin(), order_.end(), 0);
        dense_ = is_dense(x) && (dim <= 1 || x.stride(last) == 1);
        if (dense_)
            std::stable_sort(order_.begin(), order_.end(),
                             [&](int a, int b) { return x.stride(a) > x.stride(b); });
        else if (!even(x))
            x = torch::stable::contiguous(x);
        for (int64_t d = 0; d < last; d++) rows *= x.size(d);
        like_ = x;
    }

    // t's rows in this order; t becomes a copy where its own order is another.
    Rows rows_of(Tensor& t, const char* name) const {
        check_cpu(t, name);
        bool same = t.dim() == like_.dim() && t.scalar_type() == like_.scalar_type();
        for (int64_t d = 0; same && d < t.dim(); d++) same = t.size(d) == like_.size(d);
        CHECK(same, name, " has shape ", shape_of(t), ", expected ", shape_of(like_),
              " in the same dtype");
        if (!even(t)) {
            Tensor copy = new_like();
            torch::stable::copy_(copy, t);
            t = copy;
        }
        int64_t stride = dim;
        for (int d : order_)
            if (t.size(d) != 1) stride = t.stride(d);  // of the innermost
        return {static_cast<char*>(t.data_ptr()), stride};
    }
    Rows rows_of(OptionalTensor& t, const char* name) const {
        return t ? rows_of(*t, name) : Rows{};
    }

    Tensor new_like() const {
        if (dense_) return fastattn::new_like(like_);
        std::vector<int64_t> sizes(like_.dim());
        for (int64_t d = 0; d < like_.dim(); d++) sizes[d] = like_.size(d);
        return new_tensor(like_, sizes, like_.scalar_type());
    }
    Tensor new_values(bool wanted = true) const {  // one for each row
        Tensor t = new_tensor(like_, {wanted ? rows : 0}, accumulate_type(like_));
        if (dim == 0)  // no kernel runs for rows of no values
            std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
        return t;
    }

    template <class F> void for_each(const F& run) const {
        int64_t step = std::max<int64_t>(1, ITEM_VALUES / std::max(1, dim));
        int64_t items = dim == 0 ? 0 : (rows + step - 1) / step;
        for_each_item(items, FLOPS_A_VALUE * rows * dim,
                      [&](int64_t i) { run(i * step, std::min(rows, (i + 1) * step)); });
    }

    Dtype dtype;
    int dim;
    int64_t rows = 1;

  private:
    // Whether rows in this order are evenly spaced, each with unit stride.
    bool even(const Tensor& t) const {
        if (t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1) return false;
        int64_t expected = -1;
        for (auto d = order_.rbegin(); d != order_.rend(); ++d) {
            if (t.size(*d) == 1) continue;
            if (expected >= 0 && t.stride(*d) != expected) return false;
            if (expected < 0 && t.stride(*d) < dim) return false;  // rows that overlap
            expected = t.stride(*d) * t.size(*d);
        }
        return true;
    }

    std::vector<int> order_;  // of all dimensions but the last
    bool dense_;
    Tensor like_;
};

// A vector [dim] of any floating dtype in the arithmetic type, contiguous.
OptionalTensor arithmetic(const OptionalTensor& t, const RowOrder& order, const char* name) {
    if (!t) return t;
    check_cpu(*t, name);
    CHECK(t->dim() == 1 && t->size(0) == order.dim, name, " has shape ", shape_of(*t),
          ", expected [", order.dim, "]");
    ScalarType wanted = order.dtype == Dtype::F64 ? ScalarType::Double : ScalarType::Float;
    Tensor x = t->scalar_type() == wanted ? *t : torch::stable::to(*t, wanted);
    return torch::stable::contiguous(x);
}

void* pointer(const OptionalTensor& t) { return t ? t->data_ptr() : nullptr; }

// A call's dropout. It counts rows in memory order, so x is made contiguous: copies of one tensor
// with other strides drop the same elements.
template <class C> void set_dropout(C& call, const OptionalTensor& seed, double p, Tensor& x) {
    CHECK(p >= 0 && p < 1, "dropout_p must be in [0, 1), got ", p);
    call.dropout = p > 0;
    call.dropout_key = DropoutKey::make(0, 0, p);
    if (p == 0) return;
    CHECK(seed.has_value(), "dropout needs dropout_seed");
    check_cpu(*seed, "dropout_seed");
    CHECK(seed->scalar_type() == ScalarType::Long && seed->dim() == 1 && seed->size(0) == 2,
          "dropout_seed must be int64 [2]: seed and offset");
    const int64_t* key = static_cast<const int64_t*>(seed->data_ptr());
    call.dropout_key = DropoutKey::make(key[0], key[seed->stride(0)], p);
    x = torch::stable::contiguous(x);
}

// Sums over rows: at most MAX_PARTS ranges of rows are summed in parallel, and these partial sums
// are added in order. Their number depends only on the shape, so the bits do not depend on threads.
constexpr int64_t MAX_PARTS = 32;

template <class A, int N, class F>
void sum_in_parts(const RowOrder& order, Tensor* const (&results)[N], const F& run) {
    const int64_t n = order.dim;
    const bool wanted = std::any_of(results, results + N, [](auto* t) { return t != nullptr; });
    const int64_t limit = wanted ? MAX_PARTS : int64_t(1) << 20;
    int64_t parts = std::max<int64_t>(1, std::min(limit, order.rows * n / ITEM_VALUES));
    if (n == 0) return;
    Bytes memory = new_bytes(sizeof(A) * (wanted ? N * parts * n + 1 : 1));
    A* all = reinterpret_cast<A*>(memory.get());
    std::fill(all, all + (wanted ? N * parts * n : 0), A(0));
    for_each_item(parts, FLOPS_A_VALUE * order.rows * n, [&](int64_t i) {
        A* sums[N];
        for (int k = 0; k < N; k++) sums[k] = results[k] ? all + (N * i + k) * n : nullptr;
        run(order.rows * i / parts, order.rows * (i + 1) / parts, sums);
    });
    for (int k = 0; k < N; k++) {
        if (results[k] == nullptr) continue;
        A* total = static_cast<A*>(results[k]->data_ptr());
        for (int64_t j = 0; j < n; j++) total[j] = 0;
        for (int64_t i = 0; i < parts; i++)
            for (int64_t j = 0; j < n; j++) total[j] += all[(N * i + k) * n + j];
    }
}

// Calls run(begin, end, sums) on ranges of rows; sums[k] is the partial sum of results[k], or null.
template <int N, class F>
void run_in_parts(const RowOrder& order, Tensor* const (&results)[N], const F& run) {
    if (order.dtype == Dtype::F64)
        sum_in_parts<double>(order, results, run);
    else
        sum_in_parts<float>(order, results, run);
}

// --- norm ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(Tensor x, OptionalTensor residual,
                                                    OptionalTensor weight, OptionalTensor bias,
                                                    double eps, bool center,
                                                    OptionalTensor dropout_seed, double dropout_p) {
    NormCall call{};
    set_dropout(call, dropout_seed, dropout_p, x);
    CHECK(residual || !call.dropout, "dropout needs a residual");
    RowOrder order(x);
    Tensor y = order.new_like(), rstd = order.new_values(), mean = order.new_values(center);
    Tensor summed = residual ? order.new_like() : new_tensor(x, {0}, x.scalar_type());
    weight = arithmetic(weight, order, "weight");
    bias = arithmetic(bias, order, "bias");
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.center = center;
    call.eps = eps;
    call.x = order.rows_of(x, "x");
    call.residual = order.rows_of(residual, "residual");
    call.y = order.rows_of(y, "y");
    if (residual) call.summed = order.rows_of(summed, "summed");
    call.weight = pointer(weight);
    call.bias = pointer(bias);
    call.mean = mean.data_ptr();
    call.rstd = rstd.data_ptr();
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    order.for_each([&](int64_t begin, int64_t end) { kernels.norm(call, begin, end); });
    return {y, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(Tensor dy, OptionalTensor dsummed, Tensor x,
                                                    OptionalTensor weight, Tensor mean, Tensor rstd,
                                                    double eps, bool center, bool need_dweight,
                                                    bool need_dbias, OptionalTensor dropout_seed,
                                                    double dropout_p) {
    NormCall call{};
    set_dropout(call, dropout_seed, dropout_p, x);
    RowOrder order(x);
    ScalarType accumulate = accumulate_type(x);
    CHECK(rstd.scalar_type() == accumulate && rstd.dim() == 1 && rstd.size(0) == order.rows &&
              mean.scalar_type() == accumulate && mean.dim() == 1 &&
              mean.size(0) == (center ? order.rows : 0),
          "mean and rstd must be those of the forward pass");
    Tensor dx = order.new_like();
    Tensor dkept = call.dropout ? order.new_like() : new_tensor(x, {0}, x.scalar_type());
    Tensor dweight = new_tensor(x, {need_dweight ? order.dim : 0}, accumulate);
    Tensor dbias = new_tensor(x, {need_dbias ? order.dim : 0}, accumulate);
    weight = arithmetic(weight, order, "weight");
    mean = torch::stable::contiguous(mean);
    rstd = torch::stable::contiguous(rstd);
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.center = center;
    call.eps = eps;
    call.x = order.rows_of(x, "x");
    call.dy = order.rows_of(dy, "dy");
    call.dsummed = order.rows_of(dsummed, "dsummed");
    call.dx = order.rows_of(dx, "dx");
    if (call.dropout) call.dkept = order.rows_of(dkept, "dkept");
    call.weight = pointer(weight);
    call.mean = mean.data_ptr();
    call.rstd = rstd.data_ptr();
    Tensor* const results[] = {need_dweight ? &dweight : nullptr, need_dbias ? &dbias : nullptr};
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    run_in_parts(order, results, [&](int64_t begin, int64_t end, auto sums) {
        kernels.norm_backward(call, begin, end, sums[0], sums[1]);
    });
    return {dx, dweight, dbias, dkept};
}

// --- gate ---------------------------------------------------------------------------------------

// Only activate has the first two.
constexpr std::pair<const char*, Activation> ACTIVATIONS[] = {
    {"identity", Activation::IDENTITY},   {"relu", Activation::RELU},
    {"silu", Activation::SILU},           {"gelu", Activation::GELU},
    {"gelu_tanh", Activation::GELU_TANH},
};
constexpr int GATES_BEGIN = 2;

Activation activation_of(const std::string& name, int begin) {
    std::string accepted;
    for (int i = begin; i < static_cast<int>(std::size(ACTIVATIONS)); i++) {
        if (name == ACTIVATIONS[i].first) return ACTIVATIONS[i].second;
        accepted += (accepted.empty() ? "" : ", ") + std::string(ACTIVATIONS[i].first);
    }
    fail("activation is '", name, "'; accepted are ", accepted);
}

Tensor gate_fwd(Tensor gate, Tensor up, std::string activation) {
    RowOrder order(gate);
    Tensor out = order.new_like();
    GateCall call{};
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.activation = activation_of(activation, GATES_BEGIN);
    call.gate = order.rows_of(gate, "gate");
    call.up = order.rows_of(up, "up");
    call.out = order.rows_of(out, "out");
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    order.for_each([&](int64_t begin, int64_t end) { kernels.gate(call, begin, end); });
    return out;
}

std::tuple<Tensor, Tensor> gate_bwd(Tensor dout, Tensor gate, Tensor up, std::string activation) {
    RowOrder order(gate);
    Tensor dgate = order.new_like(), dup = order.new_like();
    GateCall call{};
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.activation = activation_of(activation, GATES_BEGIN);
    call.gate = order.rows_of(gate, "gate");
    call.up = order.rows_of(up, "up");
    call.dout = order.rows_of(dout, "dout");
    call.dgate = order.rows_of(dgate, "dgate");
    call.dup = order.rows_of(dup, "dup");
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    order.for_each([&](int64_t begin, int64_t end) { kernels.gate_backward(call, begin, end); });
    return {dgate, dup};
}

// --- activate -----------------------------------------------------------------------------------

Tensor activate_fwd(Tensor x, OptionalTensor bias, OptionalTensor dropout_seed, double dropout_p,
                    std::string activation) {
    ActivateCall call{};
    call.activation = activation_of(activation, 0);
    set_dropout(call, dropout_seed, dropout_p, x);
    RowOrder order(x);
    Tensor out = order.new_like();
    bias = arithmetic(bias, order, "bias");
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.bias = pointer(bias);
    call.x = order.rows_of(x, "x");
    call.out = order.rows_of(out, "out");
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    order.for_each([&](int64_t begin, int64_t end) { kernels.activate(call, begin, end); });
    return out;
}

std::tuple<Tensor, Tensor> activate_bwd(Tensor dout, OptionalTensor saved, OptionalTensor bias,
                                        OptionalTensor dropout_seed, double dropout_p,
                                        std::string activation, bool need_dbias) {
    ActivateCall call{};
    call.activation = activation_of(activation, 0);
    CHECK(saved || call.activation == Activation::IDENTITY, activation, " needs what was saved");
    set_dropout(call, dropout_seed, dropout_p, dout);
    RowOrder order(dout);
    Tensor dx = order.new_like();
    Tensor dbias = new_tensor(dout, {need_dbias ? order.dim : 0}, accumulate_type(dout));
    bias = arithmetic(bias, order, "bias");
    call.dtype = order.dtype;
    call.dim = order.dim;
    call.bias = pointer(bias);
    call.x = order.rows_of(saved, "saved");
    call.dout = order.rows_of(dout, "dout");
    call.dx = order.rows_of(dx, "dx");
    Tensor* const results[] = {need_dbias ? &dbias : nullptr};
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    run_in_parts(order, results, [&](int64_t begin, int64_t end, auto sums) {
        kernels.activate_backward(call, begin, end, sums[0]);
    });
    return {dx, dbias};
}

// --- rotate -------------------------------------------------------------------------------------

void check_table(const Tensor& t, const Tensor& like, const char* name, ScalarType wanted) {
    check_cpu(t, name);
    CHECK(t.scalar_type() == wanted, name, " must be float32 (float64 for float64 tensors)");
    CHECK(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == like.size(1), name,
          " has shape ", shape_of(t), ", expected [positions, pairs], cos and sin alike");
}

// positions [S] or [B, S] as int64, each a row of a table of `rows`.
Tensor checked_positions(const Tensor& t, int64_t batch, int64_t length, int64_t rows) {
    check_cpu(t, "positions");
    CHECK((t.dim() == 1 && t.size(0) == length) ||
              (t.dim() == 2 && t.size(0) == batch && t.size(1) == length),
          "positions has shape ", shape_of(t), ", expected [", length, "] or [", batch, ", ",
          length, "]");
    bool wide = t.scalar_type() == ScalarType::Long;
    CHECK(wide || t.scalar_type() == ScalarType::Int, "positions must be int32 or int64");
    Tensor x = torch::stable::contiguous(wide ? t : torch::stable::to(t, ScalarType::Long));
    const int64_t* values = static_cast<const int64_t*>(x.data_ptr());
    for (int64_t i = 0; i < x.numel(); i++)
        CHECK(values[i] >= 0 && values[i] < rows, "positions holds ", values[i],
              ", and cos and sin have ", rows, " rows");
    return x;
}

Tensor rotate(Tensor x, Tensor cos, Tensor sin, OptionalTensor positions, bool interleaved,
              bool inverse) {
    check_cpu(x, "x");
    auto dtype = dtype_of(x);
    CHECK(dtype && *dtype != Dtype::BOOL && x.dim() == 4,
          "x must be [B, heads, S, D] in float32, float64, bfloat16 or float16");
    CHECK(x.size(3) < MAX_LENGTH, "D must be below 2^30");
    check_table(cos, cos, "cos", accumulate_type(x));
    check_table(sin, cos, "sin", accumulate_type(x));
    CHECK(2 * cos.size(1) <= x.size(3), "x has ", x.size(3), " channels and ", cos.size(1),
          " pairs to rotate");
    CHECK(positions || cos.size(0) >= x.size(2), "cos has ", cos.size(0), " rows and x ",
          x.size(2));
    if (x.size(3) > 1 && x.stride(3) != 1) x = torch::stable::contiguous(x);
    if (cos.size(1) > 1 && cos.stride(1) != 1) cos = torch::stable::contiguous(cos);
    if (sin.size(1) > 1 && sin.stride(1) != 1) sin = torch::stable::contiguous(sin);
    Tensor out = new_like(x);
    if (out.numel() == 0) return out;  // strides of 0 allow any number of empty rows
    RotateCall call{};
    call.dtype = *dtype;
    call.batch = x.size(0);
    call.heads = x.size(1);
    call.length = x.size(2);
    call.dim = static_cast<int>(x.size(3));
    call.pairs = static_cast<int>(cos.size(1));
    call.x = static_cast<char*>(x.data_ptr());
    call.out = static_cast<char*>(out.data_ptr());
    for (int d = 0; d < 3; d++) {
        call.x_stride[d] = x.stride(d);
        call.out_stride[d] = out.stride(d);
    }
    call.heads_inside = x.stride(1) < x.stride(2);
    call.cos = cos.data_ptr();
    call.sin = sin.data_ptr();
    call.cos_stride = cos.stride(0);
    call.sin_stride = sin.stride(0);
    if (positions) {
        positions = checked_positions(*positions, x.size(0), x.size(2), cos.size(0));
        call.positions = static_cast<const int64_t*>(positions->data_ptr());
        call.positions_batch = positions->dim() == 2 ? x.size(2) : 0;
    }
    call.interleaved = interleaved;
    call.inverse = inverse;
    int64_t rows = call.batch * call.heads * call.length, dim = call.dim;
    int64_t step = std::max<int64_t>(1, ITEM_VALUES / std::max<int64_t>(1, dim));
    const FusedKernels& kernels = kernels_for(*dtype).fused;
    for_each_item((rows + step - 1) / step, FLOPS_A_VALUE * rows * dim, [&](int64_t i) {
        kernels.rotate(call, i * step, std::min(rows, (i + 1) * step));
    });
    return out;
}

// --- cross entropy ------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> cross_entropy_(Tensor logits, Tensor labels, OptionalTensor scale,
                                          int64_t ignore_index, double label_smoothing,
                                          double z_loss, double softcap) {
    // Checked first, because RowOrder would copy other layouts and the gradients go into the copy.
    CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be [N, V], contiguous");
    RowOrder order(logits);
    check_cpu(labels, "labels");
    CHECK(labels.scalar_type() == ScalarType::Long && labels.dim() == 1 &&
              labels.size(0) == order.rows,
          "labels must be int64 [", order.rows, "], got shape ", shape_of(labels));
    labels = torch::stable::contiguous(labels);
    const int64_t* values = static_cast<const int64_t*>(labels.data_ptr());
    for (int64_t i = 0; i < order.rows; i++)
        CHECK(values[i] == ignore_index || (values[i] >= 0 && values[i] < order.dim),
              "labels holds ", values[i], "; accepted is [0, ", order.dim - 1, "], or ",
              ignore_index, " to ignore a row");
    if (scale) {
        CHECK(scale->dim() == 1 && scale->size(0) == order.rows &&
                  scale->scalar_type() == accumulate_type(logits),
              "scale must be float32 (float64 for float64) [", order.rows, "]");
        check_cpu(*scale, "scale");
        scale = torch::stable::contiguous(*scale);
    }
    CHECK(order.dim >= 1, "logits must have at least one column");
    Tensor loss = order.new_values(), lse = order.new_values();
    CrossEntropyCall call{order.dtype,     order.dim,     order.rows_of(logits, "logits"),
                          values,          ignore_index,  label_smoothing,
                          z_loss,          softcap,       pointer(scale),
                          loss.data_ptr(), lse.data_ptr()};
    const FusedKernels& kernels = kernels_for(order.dtype).fused;
    order.for_each([&](int64_t begin, int64_t end) { kernels.cross_entropy(call, begin, end); });
    return {loss, lse};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("norm_fwd", TORCH_BOX(&norm_fwd));
    m.impl("norm_bwd", TORCH_BOX(&norm_bwd));
    m.impl("gate_fwd", TORCH_BOX(&gate_fwd));
    m.impl("gate_bwd", TORCH_BOX(&gate_bwd));
    m.impl("activate_fwd", TORCH_BOX(&activate_fwd));
    m.impl("activate_bwd", TORCH_BOX(&activate_bwd));
    m.impl("rotate", TORCH_BOX(&rotate));
    m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace
}  // namespace fastattn::cpu
