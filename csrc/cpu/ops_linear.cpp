// The CPU operator for a Linear's weight and bias gradients.
// next: linear.inl
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "arena.h"
#include "call.h"
#include "run.h"

namespace fastattn::cpu {
namespace {

constexpr int MAX_DEPTH =
    16 * WEIGHT_DEPTH;  // rows packed at once, which bounds the panels' memory

int blocks(int n, int size) { return (n + size - 1) / size; }

Rows rows2(Tensor& t) {
    if (t.size(1) > 1 && t.stride(1) != 1) t = torch::stable::contiguous(t);
    return {static_cast<char*>(t.data_ptr()), t.stride(0)};
}

// total[i] (+)= the sum of parts[k][i].
template <class A>
void add_parts(const Tensor& parts, const WeightCall& call, const Tensor& total) {
    const A* from = static_cast<const A*>(parts.data_ptr());
    A* to = static_cast<A*>(total.data_ptr());
    if (!call.add) std::fill(to, to + call.out, A(0));
    for (int k = 0; k < blocks(call.depth, WEIGHT_DEPTH); k++)
        for (int i = 0; i < call.out; i++) to[i] += from[static_cast<int64_t>(k) * call.out + i];
}

std::tuple<Tensor, Tensor> linear_bwd_weight(Tensor dout, Tensor x, bool need_dbias) {
    check_cpu(dout, "dout");
    check_cpu(x, "x");
    const ScalarType dtype = x.scalar_type();
    CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
          "x must be float32 or float64");
    CHECK(
        dout.dim() == 2 && x.dim() == 2 && dout.size(0) == x.size(0) && dout.scalar_type() == dtype,
        "dout and x must be [rows, out] and [rows, in] of one dtype, got ", shape_of(dout), " and ",
        shape_of(x));
    CHECK(dout.size(1) < MAX_LENGTH && x.size(1) < MAX_LENGTH, "rows must be shorter than 2^30");
    const int64_t rows = x.size(0);
    const Dtype arithmetic = *dtype_of(x);
    WeightCall call{};
    call.out = static_cast<int>(dout.size(1));
    call.in = static_cast<int>(x.size(1));
    Tensor dweight = new_tensor(x, {call.out, call.in}, dtype);
    Tensor dbias = new_tensor(x, {need_dbias ? call.out : 0}, dtype);
    if (rows == 0) {
        for (const Tensor& t : {dweight, dbias})
            std::memset(t.data_ptr(), 0, static_cast<size_t>(t.numel()) * t.element_size());
        return {dweight, dbias};
    }
    const int row_blocks = blocks(call.out, WEIGHT_ROWS),
              column_blocks = blocks(call.in, WEIGHT_COLUMNS);
    const int deepest = static_cast<int>(std::min<int64_t>(rows, MAX_DEPTH));
    const int64_t depths = blocks(deepest, WEIGHT_DEPTH);
    const int64_t size = size_of(arithmetic);
    // Taken from the thread's arena: the allocator returns blocks of this size to the system, so
    // that every call would pay a page fault for each 4 KB of them.
    ArenaLease arena;
    call.strips = arena->take<char>(size * deepest * row_blocks * WEIGHT_ROWS);
    call.panels = arena->take<char>(size * deepest * column_blocks * WEIGHT_COLUMNS);
    Tensor sums = new_tensor(x, {need_dbias ? depths : 0, call.out}, dtype);
    const Rows from_dout = rows2(dout), from_x = rows2(x);
    call.dweight = dweight.data_ptr();
    call.sums = need_dbias ? sums.data_ptr() : nullptr;
    const FusedKernels& kernels = kernels_for(arithmetic).fused;
    for (int64_t first = 0; first < rows; first += MAX_DEPTH) {
        call.add = first > 0;
        call.depth = static_cast<int>(std::min<int64_t>(rows - first, MAX_DEPTH));
        call.dout = {from_dout.data + first * from_dout.stride * size, from_dout.stride};
        call.x = {from_x.data + first * from_x.stride * size, from_x.stride};
        const double flops = 2.0 * call.depth * call.out * call.in;
        for_each_item(blocks(call.depth, WEIGHT_DEPTH) * (row_blocks + column_blocks), flops,
                      [&](int64_t i) { kernels.weight_pack(call, i); });
        for_each_item(row_blocks * column_blocks, flops,
                      [&](int64_t i) { kernels.weight_product(call, i); });
        if (need_dbias)
            arithmetic == Dtype::F64 ? add_parts<double>(sums, call, dbias)
                                     : add_parts<float>(sums, call, dbias);
    }
    return {dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("linear_bwd_weight", TORCH_BOX(&linear_bwd_weight));
}

}  // namespace
}  // namespace fastattn::cpu
