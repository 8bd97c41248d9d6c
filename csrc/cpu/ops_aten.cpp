// The CPU kernels under two operators of torch's own, for override.py.
// next: attention.h
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "attention.h"

namespace fastattn::cpu {
namespace {

// aten::_scaled_dot_product_efficient_attention has a derivative and, in torch, no kernel for the
// CPU. With ours registered, override.py's calls without a mask use torch's C++ autograd, which is
// several times cheaper than a Python one, and their backward is ours even after disable().
// Causal is aligned to the start. override.py gives neither a bias nor dropout.

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Call aten_call(const Tensor& q, const Tensor& k, const Tensor& v, bool has_bias, double dropout_p,
               bool is_causal, std::optional<double> scale) {
    CHECK(!has_bias && dropout_p == 0,
          "attn_bias and dropout_p are not served by this operator on the CPU; "
          "F.scaled_dot_product_attention takes both");
    CHECK(q.dim() == 4, "q must have 4 dimensions, got shape ", shape_of(q));
    Spec spec;
    spec.scale = scale ? *scale : 1 / std::sqrt(static_cast<double>(q.size(3)));
    spec.right = is_causal ? 0 : -1;
    spec.align_end = false;
    return {{q, k, v, {}, spec}};
}

// Beside out and lse: the dropout's seed and offset, which are undefined.
FourTensors aten_forward(const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor bias,
                         bool /*compute_log_sumexp: always, it costs nothing*/, double dropout_p,
                         bool is_causal, std::optional<double> scale) {
    Call call = aten_call(q, k, v, bias && bias->defined(), dropout_p, is_causal, scale);
    auto [out, lse] = attend(call, 0);
    return {out, lse, Tensor(), Tensor()};
}

// An undefined dout means zero, as everywhere in autograd, and so do undefined results.
FourTensors aten_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& bias, const Tensor& out, const Tensor& lse,
                          const Tensor& /*seed*/, const Tensor& /*offset*/, double dropout_p,
                          std::vector<bool> /*which gradients are needed: all come at once*/,
                          bool is_causal, std::optional<double> scale) {
    if (!dout.defined()) return {Tensor(), Tensor(), Tensor(), Tensor()};
    Call call = aten_call(q, k, v, bias.defined(), dropout_p, is_causal, scale);
    Gradients g = differentiate(call, dout, std::nullopt, out, lse, false, false);
    return {g.dq, g.dk, g.dv, Tensor()};
}

// The backward operator where autograd enters it. Gradients that are to be differentiated again
// (create_graph) come from sdpa_bwd_differentiable, which override.py defines, all others from the
// kernel above by an operator without a derivative. Calling the kernel itself would bypass torch's
// modes. All three operators have the same schema, so that the arguments stay where they are.
void aten_backward_autograd(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
    const char* name = aoti_torch_grad_mode_is_enabled() ? "fastattn::sdpa_bwd_differentiable"
                                                         : "fastattn::sdpa_bwd";
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
}

}  // namespace
}  // namespace fastattn::cpu

// Gives aten's operator these kernels, once and for the rest of the process: another thread may be
// in them at any time, so they are never removed. Called by fastattn/override.py.
extern "C" __attribute__((visibility("default"))) void fastattn_register_sdpa() {
    using torch::stable::detail::StableLibrary;
    static StableLibrary* library = [] {
        auto* made = new StableLibrary(StableLibrary::Kind::IMPL, "aten", "CPU", "ops_aten.cpp", 0);
        made->impl("_scaled_dot_product_efficient_attention",
                   TORCH_BOX(&fastattn::cpu::aten_forward));
        made->impl("_scaled_dot_product_efficient_attention_backward",
                   TORCH_BOX(&fastattn::cpu::aten_backward));
        return made;
    }();
    static StableLibrary* autograd = [] {
        auto* made =
            new StableLibrary(StableLibrary::Kind::IMPL, "aten", "AutogradCPU", "ops_aten.cpp", 0);
        made->impl("_scaled_dot_product_efficient_attention_backward",
                   &fastattn::cpu::aten_backward_autograd);
        return made;
    }();
    static StableLibrary* own = [] {
        auto* made =
            new StableLibrary(StableLibrary::Kind::IMPL, "fastattn", "CPU", "ops_aten.cpp", 0);
        made->impl("sdpa_bwd", TORCH_BOX(&fastattn::cpu::aten_backward));
        return made;
    }();
    (void)library, (void)autograd, (void)own;
}
