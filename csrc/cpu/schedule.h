// How one call becomes independent work items. Only shapes and lengths decide, never the number of
// threads, so the same call gives the same bits on any number of them.
// next: params.h
#pragma once
#include <algorithm>
#include <vector>

#include "params.h"

namespace fastattn::cpu {

// Enough items to keep many threads busy; fewer, and long key ranges (forward) or row ranges
// (backward) are cut.
constexpr int ENOUGH_ITEMS = 64, ENOUGH_TILES = 8, ENOUGH_GRADIENTS = 16;
constexpr int SPLIT_KEYS = 480;  // a split smaller than this costs more than it brings
constexpr int SPLIT_LANES =
    16;  // tiles this narrow are bound by memory: cutting them is nearly free

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct ForwardPlan {
    std::vector<ForwardItem> items;
    struct Merge {
        int first, splits;  // items to combine
    };
    std::vector<Merge> merges;
    int64_t partial_rows = 0;
};

inline ForwardPlan plan_forward(const std::vector<Segment>& segments, int heads, int group,
                                int block_q, int num_splits) {
    ForwardPlan plan;
    int64_t tiles = 0;
    for (int pass = 0; pass < 2; pass++)  // count, then make
        for (int n = 0; n < static_cast<int>(segments.size()); n++) {
            const Band& band = segments[n].band;
            if (band.q_len == 0) continue;
            int tile_heads =
                1;  // q heads of one kv head that share a tile: they read the same keys
            for (int h = 2; h <= group; h++)
                if (group % h == 0 && h * band.q_len <= block_q) tile_heads = h;
            int count = ceil_div(band.q_len, block_q);
            int rows = std::min(band.q_len, ceil_div(ceil_div(band.q_len, count), 16) * 16);
            count = ceil_div(band.q_len, rows);
            if (pass == 0) {
                tiles += static_cast<int64_t>(heads / tile_heads) * count;
                continue;
            }
            int wanted = tile_heads * rows <= SPLIT_LANES ? ENOUGH_ITEMS : ENOUGH_TILES;
            for (int head = 0; head < heads; head += tile_heads)
                for (int tile = count - 1; tile >= 0;
                     tile--) {  // under a causal mask, longest first
                    ForwardItem item{};
                    item.segment = n;
                    item.head = head;
                    item.heads = tile_heads;
                    item.row = tile * rows;
                    item.rows = std::min(rows, band.q_len - item.row);
                    Range range = band.kv_range(item.row, item.row + item.rows);
                    int keys = std::max(0, range.end - range.begin);
                    int splits = tiles < wanted ? ceil_div(wanted, static_cast<int>(tiles)) : 1;
                    splits = num_splits > 0 ? std::min(num_splits, keys)
                                            : std::min(splits, keys / SPLIT_KEYS);
                    splits = std::max(splits, 1);
                    int step = std::max(1, ceil_div(keys, splits));
                    splits = std::max(1, ceil_div(keys, step));
                    if (splits > 1)
                        plan.merges.push_back({static_cast<int>(plan.items.size()), splits});
                    for (int part = 0; part < splits; part++) {
                        item.key_begin = range.begin + part * step;
                        item.key_end = std::min(range.end, item.key_begin + step);
                        item.partial = splits > 1 ? plan.partial_rows : -1;
                        if (splits > 1)
                            plan.partial_rows += static_cast<int64_t>(item.heads) * item.rows;
                        plan.items.push_back(item);
                    }
                }
        }
    return plan;
}

struct BackwardPlan {
    std::vector<BackwardItem> items;  // those of one (segment, kv head) follow each other
    std::vector<int> tasks;           // items in the order of tasks
    std::vector<int> task_begin;  // task n runs tasks[task_begin[n] .. task_begin[n + 1]) in order
    struct Merge {
        int first, parts;
    };
    std::vector<Merge> merges;
};

// Which items may touch the same element of dbias, and so must run one after the other.
struct BiasSharing {
    bool any = false;      // no bias gradient: nothing is shared
    bool entries = false;  // the bias is broadcast over entries
    bool heads = false;    // ... over heads
    bool rows = false;     // ... over rows: every tile of a head touches the same elements
};

inline BackwardPlan plan_backward(const std::vector<Segment>& segments, int kv_heads, int block_q,
                                  BiasSharing sharing) {
    BackwardPlan plan;
    int units = static_cast<int>(segments.size()) * kv_heads;
    bool aligned = true;  // every segment has the same rows, so chunks of different entries agree
    for (const Segment& s : segments)
        aligned &= s.row0 == 0 && s.band.q_len == segments[0].band.q_len;
    struct Key {
        int entry, head, chunk, item;
    };
    std::vector<Key> keys;
    for (int n = 0; n < static_cast<int>(segments.size()); n++) {
        int q_len = segments[n].band.q_len;
        int chunks =
            std::min(ceil_div(ENOUGH_GRADIENTS, std::max(1, units)), ceil_div(q_len, 2 * block_q));
        // Chunks are disjoint rows, unless rows of other segments or all rows meet in dbias.
        if (sharing.any && (sharing.rows || (sharing.entries && !aligned))) chunks = 1;
        int rows = ceil_div(ceil_div(q_len, std::max(1, chunks)), block_q) * block_q;
        chunks = q_len == 0 ? 1 : ceil_div(q_len, rows);
        for (int head = 0; head < kv_heads; head++) {
            if (chunks > 1) plan.merges.push_back({static_cast<int>(plan.items.size()), chunks});
            for (int chunk = 0; chunk < chunks; chunk++) {
                int begin = std::min(q_len, chunk * rows);
                keys.push_back({sharing.entries ? 0 : segments[n].entry, sharing.heads ? 0 : head,
                                chunk, static_cast<int>(plan.items.size())});
                plan.items.push_back(
                    {n, head, begin, std::min(q_len, begin + rows), nullptr, nullptr});
            }
        }
    }
    auto same_task = [](const Key& a, const Key& b) {
        return a.entry == b.entry && a.head == b.head && a.chunk == b.chunk;
    };
    if (sharing.any)
        std::stable_sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
            if (a.entry != b.entry) return a.entry < b.entry;
            return a.head != b.head ? a.head < b.head : a.chunk > b.chunk;
        });
    for (size_t i = 0; i < keys.size(); i++) {
        if (i == 0 || !sharing.any || !same_task(keys[i], keys[i - 1]))
            plan.task_begin.push_back(static_cast<int>(i));
        plan.tasks.push_back(keys[i].item);
    }
    plan.task_begin.push_back(static_cast<int>(keys.size()));
    return plan;
}

}  // namespace fastattn::cpu
