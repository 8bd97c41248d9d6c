// The kernels before and after the backward: lse in base 2 and delta of each row, the gradient of
// the sinks, and at the end dq from its fp32 sums. next: backward_tile.cuh
#pragma once
#include "backward_tile.cuh"

namespace fastattn::cuda {

constexpr int ROWS_THREADS = 256;
constexpr int SINKS_THREADS = 512,
              SINKS_SHARED = 4 * SINKS_THREADS / 32;  // one float for each warp

template <class Element> FASTATTN_DEVICE float2 widen_pair(uint32_t two) {
    return {widen<Element>(two & 0xffff), widen<Element>(two >> 16)};
}

// The row of q at a place of the padded rows, where each sequence begins with a tile of its own; -1
// where the place is padding.
template <class F> FASTATTN_DEVICE int row_at(const PrePostParams& p, int batch, int place) {
    if (!p.cu_q) return place < p.q_len ? place : -1;
    SequenceRows own = SequenceRows::of_slot(cu_of(p.cu_q, p, batch), p.sequences, p.q_len,
                                             place / F::BLOCK_Q, F::BLOCK_Q);
    int row = own.begin + place - own.first_slot * F::BLOCK_Q;
    return row < own.end ? row : -1;
}

// delta = sum(dout * out) - dlse, which is subtracted from all dprobs of a row. One warp a row.
// Padding, and rows that see no key, get lse = +inf, so that the backward computes probs of 0.
template <class F> __global__ void __launch_bounds__(ROWS_THREADS)
    backward_prepare(const __grid_constant__ PrePostParams p) {
    constexpr int WARPS = ROWS_THREADS / 32;
    int64_t lines = static_cast<int64_t>(p.batch) * p.heads * p.rows;
    for (int64_t line = static_cast<int64_t>(block_index()) * WARPS + warp_index(); line < lines;
         line += static_cast<int64_t>(grid_size()) * WARPS) {
        int64_t which = line / p.rows;
        int batch = static_cast<int>(which / p.heads), head = static_cast<int>(which % p.heads);
        int row = row_at<F>(p, batch, static_cast<int>(line % p.rows));
        float sum = 0, lse = NEGATIVE_INFINITY;
        if (row >= 0) {
            const uint16_t *out = p.out.at(batch, head, row), *dout = p.dout.at(batch, head, row);
#pragma unroll
            for (int i = 2 * lane_index(); i < F::D; i += 64) {
                float2 a = widen_pair<typename F::Element>(
                    ld_global(reinterpret_cast<const uint32_t*>(out + i)));
                float2 b = widen_pair<typename F::Element>(
                    ld_global(reinterpret_cast<const uint32_t*>(dout + i)));
                sum += a.x * b.x + a.y * b.y;
            }
            lse = ld_global(p.lse + which * p.q_len + row);
            if (p.dlse && lane_index() == 0) sum -= ld_global(p.dlse + which * p.q_len + row);
        }
#pragma unroll
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane_index() != 0) continue;
        bool none = lse == NEGATIVE_INFINITY;
        float lse2 = to_base2(lse);
        if (!none && (lse2 >= LARGE_LSE || lse2 <= -LARGE_LSE))  // a race of equal values
            st_global(p.large + batch * p.kv_heads + head / (p.heads / p.kv_heads), 1);
        st_global(p.lse2 + line, none ? -NEGATIVE_INFINITY : lse2);
        st_global(p.delta + line, none ? 0.0f : sum);
    }
}

// dsinks = -sum(exp(sink - lse) delta) over the rows of a head: a sink is like a key with a value
// of 0, whose dprobs are 0. One CTA a head sums in a fixed order, so the result is deterministic.
// Rows that see no key have lse = +inf and add nothing.
template <class F> __global__ void __launch_bounds__(SINKS_THREADS)
    backward_sinks(const __grid_constant__ PrePostParams p) {
    constexpr int WARPS = SINKS_THREADS / 32;
    int head = block_index();
    float sink2 = to_base2(sink_of(p.sinks, p.sink_type, head)), sum = 0;
    for (int batch = 0; batch < p.batch; batch++) {
        int64_t line = (static_cast<int64_t>(batch) * p.heads + head) * p.rows;
#pragma unroll 4
        for (int row = thread_index(); row < p.rows; row += SINKS_THREADS) {
            float exponent = sink2 - ld_global(p.lse2 + line + row);
            sum -= exp2_approx(exponent > 0 ? 0 : exponent) * ld_global(p.delta + line + row);
        }
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    SharedAddress sums = dynamic_shared();
    if (lane_index() == 0) st_shared(sums + 4 * warp_index(), sum);
    sync_block();
    if (thread_index() != 0) return;
    sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += ld_shared(sums + 4 * warp);
    st_global(p.dsinks + head, sum);
}

// dq = scale * its sums, rounded. Each thread takes two columns of a row.
template <class F> __global__ void __launch_bounds__(ROWS_THREADS)
    backward_finish(const __grid_constant__ PrePostParams p) {
    int64_t pairs = static_cast<int64_t>(p.batch) * p.heads * p.rows * (F::D / 2);
    for (int64_t i = static_cast<int64_t>(block_index()) * ROWS_THREADS + thread_index(); i < pairs;
         i += static_cast<int64_t>(grid_size()) * ROWS_THREADS) {
        int column = static_cast<int>(i % (F::D / 2)) * 2;
        int64_t line = i / (F::D / 2), which = line / p.rows;
        int batch = static_cast<int>(which / p.heads), head = static_cast<int>(which % p.heads);
        int row = row_at<F>(p, batch, static_cast<int>(line % p.rows));
        if (row < 0) continue;
        int in_tile = static_cast<int>(line % F::BLOCK_Q);
        const float* sums = p.dq_sums + (line - in_tile) * F::D;
        uint32_t two = pack<typename F::Element>(
            p.scale * ld_global(sums + F::sum_index(in_tile, column)),
            p.scale * ld_global(sums + F::sum_index(in_tile, column + 1)));
        uint16_t* to = p.dq.at(batch, head, row) + column;
        st_global(reinterpret_cast<uint32_t*>(to), two);
    }
}

}  // namespace fastattn::cuda
