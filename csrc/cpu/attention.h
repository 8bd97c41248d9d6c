// The two passes of attention on the CPU, which ops_attention.cpp has and which its operators and
// those of ops_aten.cpp, ops_derivatives.cpp and ops_statistics.cpp call.
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

// Statistics of the rows, which a forward pass makes where they are asked for.
struct RowResults {
    bool need_entropy, need_argmax;
    Tensor max_logit, entropy, argmax;  // empty where not needed
};
Result attend(Call& call, int64_t num_splits, RowResults* rows = nullptr);

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

// Sets all elements of a dense tensor.
void fill(const Tensor& t, double value);

// Asks for huge pages for a large result in fresh memory.
void prefer_huge_pages(const Tensor& t);

// Refuses a call of too many tiles.
void check_tiles(const Call& call, int heads, int block_q);

}  // namespace fastattn::cpu
