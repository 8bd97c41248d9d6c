// How one call becomes independent work items. Only shapes and lengths decide, never the number of
// threads, so the same call gives the same bits on any number of them.
// next: params.h
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "params.h"

namespace fastattn::cpu {

// Enough items to keep many threads busy; fewer, and long key ranges (forward) or row ranges
// (backward) are cut.
constexpr int ENOUGH_ITEMS = 64, ENOUGH_TILES = 8, ENOUGH_GRADIENTS = 16;
constexpr int SPLIT_KEYS = 480;  // a split smaller than this costs more than it brings
// Tiles of this few rows are bound by memory: cutting them is nearly free.
constexpr int SPLIT_ROWS = 16;
// However many splits a caller asks for, each has this many keys, and the results of all of them
// together take at most so many bytes.
constexpr int LEAST_SPLIT_KEYS = 32;
constexpr int64_t MOST_SPLIT_BYTES = int64_t(256) << 20;
// The sums of the backward's items take at most this many times the bytes of k and v, or so many
// bytes where that is more.
constexpr int64_t MOST_SUMS = 4, SMALL_SUMS = int64_t(16) << 20;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct KeySpan {
    int begin, end;

    int64_t size() const { return std::max(0, end - begin); }
};

// Keys that rows [row_begin, row_end) of `heads` query heads from `head` on may see. The first and
// last row bound those between: neither end of a band or of key ranges decreases along the rows.
inline KeySpan keys_of(const Segment& s, const KeyRanges& ranges, int head, int heads,
                       int row_begin, int row_end) {
    Range seen = s.band.kv_range(row_begin, row_end);
    if (!ranges.given()) return {seen.begin, seen.end};
    int first = s.band.kv_len, past = 0;
    for (int h = head; h < head + heads; h++) {
        first = std::min(first, ranges.first(s, h, row_begin));
        past = std::max(past, ranges.past(s, h, row_end - 1));
    }
    return {std::max(seen.begin, first), std::min(seen.end, past)};
}

struct ForwardPlan {
    std::vector<ForwardItem> items;
    struct Merge {
        int first, splits;  // items to combine
    };
    std::vector<Merge> merges;
    int64_t split_rows = 0;
    double pairs = 0;  // of a row and a key that its tile looks at
};

// row_bytes: of one row of a split's results.
inline ForwardPlan plan_forward(const std::vector<Segment>& segments, const Params& p, int block_q,
                                int num_splits, int64_t row_bytes) {
    ForwardPlan plan;
    const int heads = p.heads, group = p.group();
    int64_t tiles = 0, rows_in_all = 0;
    for (const Segment& s : segments) rows_in_all += static_cast<int64_t>(heads) * s.band.q_len;
    const int64_t most_splits =
        std::max<int64_t>(1, MOST_SPLIT_BYTES / std::max<int64_t>(1, rows_in_all * row_bytes));
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
            int wanted = tile_heads * rows <= SPLIT_ROWS ? ENOUGH_ITEMS : ENOUGH_TILES;
            for (int head = 0; head < heads; head += tile_heads)
                for (int tile = count - 1; tile >= 0;
                     tile--) {  // under a causal mask, longest first
                    ForwardItem item{};
                    item.segment = n;
                    item.head = head;
                    item.heads = tile_heads;
                    item.row = tile * rows;
                    item.rows = std::min(rows, band.q_len - item.row);
                    KeySpan range = keys_of(segments[n], p.key_ranges, head, tile_heads, item.row,
                                            item.row + item.rows);
                    int keys = static_cast<int>(range.size());
                    plan.pairs += static_cast<double>(tile_heads) * item.rows * keys;
                    int splits = tiles < wanted ? ceil_div(wanted, static_cast<int>(tiles)) : 1;
                    splits = num_splits > 0 ? std::min(num_splits, ceil_div(keys, LEAST_SPLIT_KEYS))
                                            : std::min(splits, keys / SPLIT_KEYS);
                    splits = std::max(static_cast<int>(std::min<int64_t>(splits, most_splits)), 1);
                    int step = std::max(1, ceil_div(keys, splits));
                    splits = std::max(1, ceil_div(keys, step));
                    if (splits > 1)
                        plan.merges.push_back({static_cast<int>(plan.items.size()), splits});
                    for (int split = 0; split < splits; split++) {
                        item.key_begin = range.begin + split * step;
                        item.key_end = std::min(range.end, item.key_begin + step);
                        item.split_row = splits > 1 ? plan.split_rows : -1;
                        if (splits > 1)
                            plan.split_rows += static_cast<int64_t>(item.heads) * item.rows;
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
        int first, count;
    };
    std::vector<Merge> merges;
    double pairs = 0;  // as ForwardPlan's
};

// Which items may touch the same element of dbias, and so must run one after the other.
struct BiasSharing {
    bool any = false;        // no bias gradient: nothing is shared
    bool sequences = false;  // the bias is broadcast over sequences
    bool heads = false;      // ... over heads
    bool rows = false;       // ... over rows: every tile of a head touches the same elements
};

// What one key takes: in k and v, and in the sums of an item that sees it.
struct KeyBytes {
    int64_t operands, sums;
};

// Into how many items the rows of one (segment, kv head) are cut, and how.
struct RowChunks {
    const Segment& segment;
    const Params& p;
    int block_q, block_kv;

    int rows(int chunks) const {
        return ceil_div(ceil_div(segment.band.q_len, std::max(1, chunks)), block_q) * block_q;
    }
    // The keys that rows [begin, end) see, from the start of a block.
    KeySpan keys(int kv_head, int begin, int end) const {
        if (begin >= end) return {0, 0};
        KeySpan seen = keys_of(segment, p.key_ranges, kv_head * p.group(), p.group(), begin, end);
        if (seen.size() == 0) return {0, 0};
        return {seen.begin / block_kv * block_kv, seen.end};
    }
    // At most `chunks`, fewer where some head would need sums of more than `most` keys.
    int within(int chunks, int64_t most) const {
        int kv_heads = p.key_ranges.given() ? p.kv_heads : 1;  // the band is the same for all
        for (; chunks > 1; chunks--) {
            int64_t largest = 0;
            for (int head = 0; head < kv_heads; head++) {
                int64_t sum = 0;
                for (int step = rows(chunks), row = 0; row < segment.band.q_len; row += step)
                    sum += keys(head, row, std::min(segment.band.q_len, row + step)).size();
                largest = std::max(largest, sum);
            }
            if (largest <= most) return chunks;
        }
        return 1;
    }
};

// Chunks of each segment's rows, enough of them in all to keep the threads busy.
inline std::vector<int> row_chunks(const std::vector<Segment>& segments, const Params& p,
                                   int block_q, int block_kv, KeyBytes bytes,
                                   const BiasSharing& sharing) {
    const int64_t units = std::max<int64_t>(1, static_cast<int64_t>(segments.size()) * p.kv_heads);
    const int wanted = static_cast<int>((ENOUGH_GRADIENTS + units - 1) / units);
    bool aligned = true;  // every segment has the same rows, so chunks of different sequences agree
    for (const Segment& s : segments)
        aligned &= s.row0 == 0 && s.band.q_len == segments[0].band.q_len;
    std::vector<int> chunks;
    for (const Segment& s : segments) {
        int64_t most = std::max(MOST_SUMS * bytes.operands * s.band.kv_len, SMALL_SUMS / units);
        // Chunks are disjoint rows, unless rows of other segments or all rows meet in dbias.
        bool one = sharing.any && (sharing.rows || (sharing.sequences && !aligned));
        int enough = one ? 1 : std::min(wanted, ceil_div(s.band.q_len, 2 * block_q));
        chunks.push_back(RowChunks{s, p, block_q, block_kv}.within(enough, most / bytes.sums));
    }
    if (sharing.any && sharing.sequences)  // chunk n has the same rows in each of them
        std::fill(chunks.begin(), chunks.end(),
                  chunks.empty() ? 1 : *std::min_element(chunks.begin(), chunks.end()));
    return chunks;
}

inline BackwardPlan plan_backward(const std::vector<Segment>& segments, const Params& p,
                                  int block_q, int block_kv, KeyBytes bytes, BiasSharing sharing) {
    BackwardPlan plan;
    const std::vector<int> wanted = row_chunks(segments, p, block_q, block_kv, bytes, sharing);
    struct Key {
        int sequence, head, chunk, item;
    };
    std::vector<Key> keys;
    for (int n = 0; n < static_cast<int>(segments.size()); n++) {
        RowChunks cut{segments[n], p, block_q, block_kv};
        int q_len = segments[n].band.q_len, rows = cut.rows(wanted[n]);
        int chunks = q_len == 0 ? 1 : ceil_div(q_len, rows);
        for (int head = 0; head < p.kv_heads; head++) {
            if (chunks > 1) plan.merges.push_back({static_cast<int>(plan.items.size()), chunks});
            for (int chunk = 0; chunk < chunks; chunk++) {
                int begin = std::min(q_len, chunk * rows), end = std::min(q_len, begin + rows);
                KeySpan seen = cut.keys(head, begin, end);
                plan.pairs += static_cast<double>(p.group()) * (end - begin) * seen.size();
                keys.push_back({sharing.sequences ? 0 : segments[n].sequence,
                                sharing.heads ? 0 : head, chunk,
                                static_cast<int>(plan.items.size())});
                plan.items.push_back({n, head, begin, end, seen.begin, seen.end, nullptr, nullptr});
            }
        }
    }
    auto same_task = [](const Key& a, const Key& b) {
        return a.sequence == b.sequence && a.head == b.head && a.chunk == b.chunk;
    };
    if (sharing.any)
        std::stable_sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
            if (a.sequence != b.sequence) return a.sequence < b.sequence;
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
