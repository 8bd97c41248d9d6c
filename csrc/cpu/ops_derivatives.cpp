// The CPU operators of forward mode and of its backward.
// next: attention.h
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "attention.h"

namespace fastattn::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_jvp(Inputs inputs, Tangents tangents) {
    Call call{std::move(inputs), std::move(tangents)};
    auto [primal, tangent] = attend_jvp(call);
    return {primal.out, primal.lse, tangent.out, tangent.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_jvp_bwd(
    Tensor dtout, OptionalTensor dtlse, Tensor out, Tensor lse, Tensor tout, Tensor tlse,
    Inputs inputs, Tangents tangents, bool need_dbias, bool need_dsinks) {
    Call call{std::move(inputs), std::move(tangents), tout, tlse};
    Gradients g = differentiate(call, dtout, dtlse, out, lse, need_dbias, need_dsinks);
    return {g.dq, g.dk, g.dv, g.dbias, g.dsinks};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("flash_attn_jvp", BOX(&flash_attn_jvp));
    m.impl("flash_attn_jvp_bwd", BOX(&flash_attn_jvp_bwd));
}

}  // namespace
}  // namespace fastattn::cpu
