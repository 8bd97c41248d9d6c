// The CPU operators of statistics: the forward pass with those of its rows, the second pass, and
// the attention weights.
// next: attention.h, maps.inl
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "attention.h"
#include "run.h"
#include "schedule.h"

namespace fastattn::cpu {
namespace {

constexpr char NO_MEMORY[] =
    "not enough memory for the list of this call's tiles: attend to fewer rows, heads or batch "
    "entries at a time";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_fwd_stats(Inputs inputs,
                                                                        int64_t num_splits,
                                                                        bool need_entropy,
                                                                        bool need_argmax) {
    Call call{std::move(inputs)};
    RowResults rows{need_entropy, need_argmax, {}, {}, {}};
    auto [out, lse] = attend(call, num_splits, &rows);
    return {out, lse, rows.max_logit, rows.entropy, rows.argmax};
}

// Checks what both operators of the second pass take beside the call, and points Params to it.
void set_lse(Call& call, const Tensor& lse) {
    call.prepare();
    check_like_lse(call.q, lse, "lse");
    call.params.lse = lse4(lse);
}

Tensor4 tensor4(const Tensor& t) {
    return {static_cast<char*>(t.data_ptr()), Dtype::F32, t.stride(0), t.stride(1),
            t.dim() > 2 ? t.stride(2) : 0};
}

// --- the second pass ----------------------------------------------------------------------------

// How many items the rows of one (segment, head) make: enough in all to keep the threads busy.
int rows_of_item(const Call& call, const Segment& s, int block_q) {
    int64_t units = std::max<int64_t>(
        1, static_cast<int64_t>(call.segments.size()) * std::max(1, call.params.heads));
    int wanted = static_cast<int>((ENOUGH_ITEMS + units - 1) / units);
    int chunks = std::max(1, std::min(wanted, ceil_div(s.band.q_len, 2 * block_q)));
    return std::max(block_q, ceil_div(ceil_div(s.band.q_len, chunks), block_q) * block_q);
}

// The sums of all items, in the kernels' arithmetic, and where each item's begin.
struct MapsPlan {
    std::vector<MapsItem> items;
    std::vector<int> first_bin, bins;  // of each item's rows
    Bytes memory;
    double pairs = 0;
};

MapsPlan plan_maps(const Call& call, const MapsResults& results, bool need_col_mass, int block_q) {
    MapsPlan plan;
    const int64_t size = call.params.dtype == Dtype::F64 ? 8 : 4;
    std::vector<int64_t> col_mass, pooled;  // offsets
    int64_t total = 0;
    for (int n = 0; n < static_cast<int>(call.segments.size()); n++) {
        const Segment& s = call.segments[n];
        int step = rows_of_item(call, s, block_q);
        for (int head = 0; head < call.params.heads; head++)
            for (int row = 0; row < s.band.q_len; row += step) {
                int end = std::min(s.band.q_len, row + step);
                KeySpan seen = keys_of(s, call.params.key_ranges, head, 1, row, end);
                plan.pairs += static_cast<double>(end - row) * static_cast<double>(seen.size());
                plan.items.push_back({n, head, row, end, nullptr, nullptr});
                auto bin = [&](int64_t at) {
                    return static_cast<int>((s.row0 + at) * results.pooled / results.rows);
                };
                int first = results.pooled ? bin(row) : 0;
                int bins = results.pooled ? bin(end - 1) + 1 - first : 0;
                plan.first_bin.push_back(first);
                plan.bins.push_back(bins);
                col_mass.push_back(total);
                total += need_col_mass ? s.band.kv_len : 0;
                pooled.push_back(total);
                total += static_cast<int64_t>(bins) * results.pooled;
            }
    }
    plan.memory = new_bytes(total * size + 1);
    std::memset(plan.memory.get(), 0, static_cast<size_t>(total * size));
    for (size_t i = 0; i < plan.items.size(); i++) {
        if (need_col_mass) plan.items[i].col_mass = plan.memory.get() + col_mass[i] * size;
        if (results.pooled) plan.items[i].pooled = plan.memory.get() + pooled[i] * size;
    }
    return plan;
}

// Adds one head's sums up, in the order of its items. A bin's map is the mean over its rows.
template <class A> void add_up(const Call& call, const MapsPlan& plan, const MapsResults& results,
                               int head, const Tensor& col_mass, const Tensor& pooled) {
    const bool sums = col_mass.numel() > 0;
    Tensor4 mass = sums ? tensor4(col_mass) : Tensor4{};
    Tensor4 maps = results.pooled ? tensor4(pooled) : Tensor4{};
    const int64_t n = results.pooled;
    for (size_t i = 0; i < plan.items.size(); i++) {
        const MapsItem& item = plan.items[i];
        if (item.head != head) continue;
        const Segment& s = call.segments[item.segment];
        const A* from = static_cast<const A*>(item.col_mass);
        A* to = sums ? mass.at<A>(s.batch, head, 0) + s.kv_begin : nullptr;
        for (int j = 0; sums && j < s.band.kv_len; j++) to[j] += from[j];
        from = static_cast<const A*>(item.pooled);
        for (int64_t bin = 0; bin < plan.bins[i]; bin++, from += n) {
            int64_t at = plan.first_bin[i] + bin;
            auto first = [&](int64_t x) { return (x * results.rows + n - 1) / n; };
            A share = A(1) / static_cast<A>(first(at + 1) - first(at));
            A* row = maps.at<A>(s.batch, head, at);
            for (int64_t b = 0; b < n; b++) row[b] += from[b] * share;
        }
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flash_attn_maps(Tensor lse, Inputs inputs,
                                                           bool need_col_mass, int64_t topk,
                                                           int64_t pooled) try {
    Call call{std::move(inputs)};
    set_lse(call, lse);
    const Tensor& q = call.q;
    const bool packed = call.operands.cu_seqlens_q.has_value();
    const int64_t keys = packed ? call.k.size(2) : call.max_kv, rows = q.size(2);
    CHECK(topk >= 0 && topk < MAX_LENGTH, "topk must be in [0, 2^30), got ", topk);
    CHECK(pooled >= 0 && pooled <= std::min(rows, keys), "pooled must be in [0, ",
          std::min(rows, keys), "], the smaller of the numbers of rows and keys, got ", pooled);
    CHECK(pooled == 0 || !packed,
          "pooled is given for packed sequences, whose maps would be of "
          "different sizes");
    CHECK(!need_col_mass || !packed || !call.operands.page_table,
          "need_col_mass is given for packed sequences with page_table, whose keys have no order "
          "of their own");
    const ScalarType dtype = accumulate_type(q);
    auto made = [&](bool need, std::vector<int64_t> sizes, ScalarType type, double value) {
        Tensor t = new_tensor(q, need ? sizes : std::vector<int64_t>{0}, type);
        if (need) fill(t, value);
        return t;
    };
    Tensor col_mass = made(need_col_mass, {q.size(0), q.size(1), keys}, dtype, 0);
    Tensor maps = made(pooled > 0, {q.size(0), q.size(1), pooled, pooled}, dtype, 0);
    std::vector<int64_t> sizes{q.size(0), q.size(1), rows, topk};
    Tensor probs = made(topk > 0, sizes, dtype, 0);
    Tensor largest = made(topk > 0, sizes, ScalarType::Long, -1);
    MapsResults results{static_cast<int>(topk), static_cast<int>(pooled), rows, keys, {}, {}};
    if (topk > 0) {
        results.probs = tensor4(probs);
        results.largest = tensor4(largest);
    }
    const Params& p = call.params;
    const Kernels& kernels = kernels_for(p.dtype);
    check_tiles(call, p.heads, kernels.block_q);
    MapsPlan plan = plan_maps(call, results, need_col_mass, kernels.block_q);
    double flops = 2 * plan.pairs * p.head_dim;
    for_each_item(static_cast<int64_t>(plan.items.size()), flops,
                  [&](int64_t i) { kernels.maps(p, plan.items[i], results); });
    if (need_col_mass || pooled > 0)
        for_each_item(p.heads, flops, [&](int64_t head) {
            auto add = dtype == ScalarType::Double ? add_up<double> : add_up<float>;
            add(call, plan, results, static_cast<int>(head), col_mass, maps);
        });
    return {col_mass, probs, largest, maps};
} catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
}

// --- attention weights --------------------------------------------------------------------------

// The rows of each segment that are asked for, one segment after the other, and where they go.
struct ListedRows {
    std::vector<int> rows, places;
    std::vector<int> begin;  // of each segment, and the end
};

ListedRows list_rows(const Call& call, const OptionalTensor& rows) {
    const int64_t q_len = call.q.size(2);
    std::vector<int64_t> wanted;
    if (rows) {
        check_cpu(*rows, "rows");
        CHECK(rows->scalar_type() == ScalarType::Long && rows->dim() == 1,
              "rows must be int64 with one dimension, got shape ", shape_of(*rows));
        CHECK(rows->size(0) < MAX_LENGTH, "rows has ", rows->size(0),
              " elements, the limit is 2^30");
        for (int64_t i = 0; i < rows->size(0); i++) {
            int64_t row = static_cast<const int64_t*>(rows->data_ptr())[i * rows->stride(0)];
            CHECK(row >= 0 && row < q_len, "rows[", i, "] is ", row, ", outside [0, ", q_len, ")");
            wanted.push_back(row);
        }
    } else {
        for (int64_t i = 0; i < q_len; i++) wanted.push_back(i);
    }
    ListedRows list;
    for (const Segment& s : call.segments) {
        list.begin.push_back(static_cast<int>(list.rows.size()));
        for (size_t i = 0; i < wanted.size(); i++) {
            int64_t row = wanted[i] - s.q_begin;
            if (row < 0 || row >= s.band.q_len) continue;
            list.rows.push_back(static_cast<int>(row));
            list.places.push_back(static_cast<int>(i));
        }
    }
    list.begin.push_back(static_cast<int>(list.rows.size()));
    return list;
}

std::tuple<Tensor> flash_attn_weights(Tensor lse, Inputs inputs, OptionalTensor rows,
                                      bool average) try {
    Call call{std::move(inputs)};
    CHECK(!call.operands.cu_seqlens_q && !call.operands.page_table,
          "cu_seqlens_q or page_table is given, and the weights of packed or paged calls would be "
          "of different shapes: call it for each sequence");
    set_lse(call, lse);
    const Tensor& q = call.q;
    const Params& p = call.params;
    ListedRows list = list_rows(call, rows);
    const int64_t count = rows ? rows->size(0) : q.size(2), keys = call.k.size(2);
    std::vector<int64_t> sizes{q.size(0), count, keys};
    if (!average) sizes.insert(sizes.begin() + 1, q.size(1));
    Tensor made = new_tensor(q, sizes, q.scalar_type());
    prefer_huge_pages(made);
    if (p.heads == 0) fill(made, 0);
    Tensor4 to{static_cast<char*>(made.data_ptr()), p.dtype, made.stride(0),
               average ? 0 : made.stride(1), keys};
    WeightsResult result{to, keys, list.rows.data(), list.places.data()};
    const Kernels& kernels = kernels_for(p.dtype);
    check_tiles(call, p.heads, kernels.block_q);
    std::vector<WeightsItem> items;
    const int heads = average ? p.heads : 1;
    for (int n = 0; n < static_cast<int>(call.segments.size()); n++)
        for (int head = 0; head < p.heads; head += heads)
            for (int at = list.begin[n]; at < list.begin[n + 1]; at += kernels.block_q)
                items.push_back(
                    {n, head, heads, at, std::min(list.begin[n + 1], at + kernels.block_q)});
    double flops = 2.0 * p.heads * static_cast<double>(list.rows.size()) *
                   static_cast<double>(keys) * p.head_dim;
    for_each_item(static_cast<int64_t>(items.size()), flops,
                  [&](int64_t i) { kernels.weights(p, items[i], result); });
    return {made};
} catch (const std::bad_alloc&) {
    fail(NO_MEMORY);
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
    m.impl("flash_attn_fwd_stats", BOX(&flash_attn_fwd_stats));
    m.impl("flash_attn_maps", BOX(&flash_attn_maps));
    m.impl("flash_attn_weights", BOX(&flash_attn_weights));
}

}  // namespace
}  // namespace fastattn::cpu
