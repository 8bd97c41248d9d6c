// Combines the results of the splits of the keys into one: lse is the log of the sum of their
// denominators, out the mean of their outputs, weighted by the denominators. One warp a row.
// next: host_params80.h
#pragma once
#include "params.h"
#include "softmax.cuh"

namespace fastattn::cuda {

constexpr int COMBINE_THREADS = 128, COMBINE_ROWS = COMBINE_THREADS / 32;  // of a CTA

template <class Element, int D> __global__ void __launch_bounds__(COMBINE_THREADS)
    combine_splits(const __grid_constant__ CombineParams p) {
    int64_t rows = int64_t(p.batch) * p.heads * p.q_len;
    int64_t at = int64_t(block_index()) * COMBINE_ROWS + thread_index() / 32;
    if (at >= rows) return;
    int row = static_cast<int>(at % p.q_len), head = static_cast<int>(at / p.q_len % p.heads);
    int batch = static_cast<int>(at / p.q_len / p.heads);
    float top = NEGATIVE_INFINITY;
    for (int i = 0; i < p.splits; i++) top = fmaxf(top, ld_global(p.split_lse + i * rows + at));
    bool dead = top == NEGATIVE_INFINITY;
    float sink = dead ? NEGATIVE_INFINITY : sink_of(p.sinks, p.sink_type, head);
    top = dead ? 0 : fmaxf(top, sink);  // a row that sees no key gets a weight of 0 for each split
    float sum = exp2_approx((sink - top) * static_cast<float>(LOG2E));
    constexpr int COLUMNS = D / 32;  // of out in each lane, in pairs that lie side by side
    float acc[COLUMNS] = {};
#pragma unroll 4
    for (int i = 0; i < p.splits; i++) {
        float lse = ld_global(p.split_lse + i * rows + at);
        float weight = exp2_approx((lse - top) * static_cast<float>(LOG2E));
        const float* from = p.split_out + (i * rows + at) * D + 2 * lane_index();
        sum += weight;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2) {
            float2 x = ld_global(reinterpret_cast<const float2*>(from + 32 * j));
            acc[j] += weight * x.x;
            acc[j + 1] += weight * x.y;
        }
    }
    float scale = dead ? 0 : 1 / sum;
    uint16_t* to = p.out.at(batch, head, row) + 2 * lane_index();
#pragma unroll
    for (int j = 0; j < COLUMNS; j += 2)
        st_global(reinterpret_cast<uint32_t*>(to + 32 * j),
                  pack<Element>(acc[j] * scale, acc[j + 1] * scale));
    if (lane_index() == 0)
        st_global(p.lse + at,
                  dead ? NEGATIVE_INFINITY : top + log2_approx(sum) * static_cast<float>(LN2));
}

}  // namespace fastattn::cuda
