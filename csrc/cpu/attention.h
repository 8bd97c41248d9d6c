// The two passes of attention on the CPU, which ops_attention.cpp has and which its operators and
// those of ops_aten.cpp and ops_statistics.cpp call.
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

// dlse may be missing; dbias and dsinks are empty where they are not needed.
Gradients differentiate(Call& call, Tensor dout, const OptionalTensor& dlse, Tensor out,
                        const Tensor& lse, bool need_dbias, bool need_dsinks);

// Sets all elements of a dense tensor.
void fill(const Tensor& t, double value);

// Asks for huge pages for a large result in fresh memory.
void prefer_huge_pages(const Tensor& t);

// Refuses a call of too many tiles.
void check_tiles(const Call& call, int heads, int block_q);

}  // namespace fastattn::cpu
