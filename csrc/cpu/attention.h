// The two passes of attention on the CPU, which ops_attention.cpp has and which its operators and
// those of ops_aten.cpp call.
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

// dlse may be missing; dbias and dsinks are empty where they are not needed.
Gradients differentiate(Call& call, Tensor dout, const OptionalTensor& dlse, Tensor out,
                        const Tensor& lse, bool need_dbias, bool need_dsinks);

}  // namespace fastattn::cpu
