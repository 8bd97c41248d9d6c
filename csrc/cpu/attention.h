// The two passes of attention on the CPU, which ops_attention.cpp has and which its operators and
// those of ops_aten.cpp and ops_derivatives.cpp call.
#pragma once
#include <cstdint>

#include "call.h"

namespace fastattn::cpu {

struct Result {
    Tensor out, lse;
};

struct Gradients {
    Tensor dq, dk, dv, dbias, dsinks;
};

Result attend(Call& call, int64_t num_splits);

// The results and their tangents along call.tangents.
struct JvpResult {
    Result primal, tangent;
};
JvpResult attend_jvp(Call& call);

// dlse may be missing; dbias and dsinks are empty where they are not needed. Where the call has
// tout and tlse, dout and dlse are the cotangents of these, and the gradients those of forward
// mode.
Gradients differentiate(Call& call, Tensor dout, const OptionalTensor& dlse, Tensor out,
                        const Tensor& lse, bool need_dbias, bool need_dsinks);

}  // namespace fastattn::cpu
