// Where a CPU kernel finds its operands, and the table of functions one instruction set offers.
// next: kernels.inl
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../philox.h"
#include "../spec.h"
#include "dtype.h"
#include "fused.h"

namespace fastattn::cpu {

// [batch, heads, rows, columns] in memory; strides in elements, 0 where broadcast.
struct Tensor4 {
    char* data = nullptr;  // null: absent
    Dtype dtype = Dtype::F32;
    int64_t batch = 0, head = 0, row = 0, col = 1;

    template <class T> T* at(int64_t b, int64_t h, int64_t r) const {
        return reinterpret_cast<T*>(data) + b * batch + h * head + r * row;
    }
    char* bytes_at(int64_t b, int64_t h, int64_t r) const {
        return data + (b * batch + h * head + r * row) * size_of(dtype);
    }
};

// Query rows that share one run of keys: a batch entry, a packed sequence or a document. Rows and
// keys count from 0 inside the segment; keys outside it do not exist for these rows.
struct Segment {
    int batch;  // index in memory of q, out and, unless paged, k and v
    int entry;  // batch entry or packed sequence: indexes mask, bias, slopes, dropout, pages
    int q_begin, kv_begin;  // first row and key in memory
    int row0, key0;         // first row and key as mask, bias and dropout count them
    Band band;              // q_len, kv_len and the diagonal, in segment coordinates
};

// [entries, Hq, rows] in memory; strides in elements, 0 where broadcast.
struct RowNumbers {
    const int* data = nullptr;  // null: absent
    int64_t batch = 0, head = 0, row = 0;

    int at(int64_t b, int64_t h, int64_t r) const { return data[b * batch + h * head + r * row]; }
};

// Each row's own range of keys: none before `begin` and none from `end` on, on top of all else.
// Rows and keys count as mask's do, and neither end decreases along the rows.
struct KeyRanges {
    RowNumbers begin, end;  // both or neither

    bool given() const { return begin.data != nullptr; }
    // In the segment's coordinates, and perhaps outside [0, kv_len].
    int first(const Segment& s, int head, int row) const {
        return imax(0, begin.at(s.entry, head, s.row0 + row)) - s.key0;
    }
    int past(const Segment& s, int head, int row) const {
        return imax(0, end.at(s.entry, head, s.row0 + row)) - s.key0;
    }
};

struct Params {
    // what
    double scale;
    double softcap;  // 0: off
    bool dropout;
    DropoutKey dropout_key;
    uint32_t first_head, total_heads;  // dropout counts entry * total_heads + first_head + head
    // where
    Dtype dtype;           // of q, k, v, out and their gradients
    Tensor4 q, k, v, out;  // [B, Hq, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], [B, Hq, Sq, Dv]
    Tensor4 mask, bias;    // [entries, Hq, rows, keys]
    KeyRanges key_ranges;
    const float* slopes;  // ALiBi; null: none
    int64_t slopes_batch;
    Tensor4 sinks;          // [Hq] through the head stride
    Tensor4 lse;            // [B, Hq, Sq] (the column is unused), fp32 (fp64 for fp64)
    const int* page_table;  // [entries, max_pages]; null: not paged
    int64_t page_table_row;
    int page_size;
    int heads, kv_heads, head_dim, v_dim;
    const Segment* segments;
    // statistics of the forward pass, as lse (argmax is int64); absent: not wanted
    Tensor4 max_logit, entropy, argmax;
    // backward
    Tensor4 dout, dq, dk, dv;
    Tensor4 dlse;      // as lse; absent: zero
    Tensor4 dbias;     // accumulated in fp32 (fp64 for fp64); absent: not wanted
    bool dbias_unset;  // dbias holds nothing yet: the first entry and head that share it set it
    Tensor4 delta;     // as lse: rowsum(dout * out) - dlse, for dsinks; absent: not wanted
    Tensor4 dentropy;  // as lse; absent: zero
    // forward mode
    Tensor4 tq, tk, tv, tbias, tsinks;  // tangents, as q, k, v, bias and sinks; absent: zero
    Tensor4 tout, tlse;                 // as out and lse; in its backward, what it was given
    uint64_t call;  // a number of its own, by which threads know what they have packed for it

    int group() const { return heads / kv_heads; }
};

// Query rows of one tile: `heads` consecutive q heads of one kv head x `rows` rows each. More than
// one head only where every head's rows fit one tile together (short queries under GQA).
struct ForwardItem {
    int segment, head, heads, row, rows;
    int key_begin, key_end;  // the part of the segment's keys to look at (split-KV)
    int64_t split_row;       // first row of the split's result; -1: there is one, which writes out
};

// Unnormalised results of splits, merged in order by `combine`.
struct SplitResults {
    void* row_max;  // [rows], in base 2
    void* row_sum;  // [rows]
    void* acc;      // [rows][v_dim]
    // statistics.inl's, [rows]; null: not wanted
    void* weighted;
    int64_t* argmax;
};

struct BackwardItem {
    int segment, kv_head;
    int row_begin, row_end;  // query rows of the segment
    int key_begin, key_end;  // keys that they see, from the start of a block of keys
    // fp32 (fp64) sums over those rows, [keys][padded D] and [keys][padded Dv]; null: this item is
    // all there is, and writes dk and dv itself
    void* dk_sum;
    void* dv_sum;
};

// What the second pass makes of the probabilities: [B, Hq, ...] in memory, fp32 (fp64).
struct MapsResults {
    int topk, pooled;        // how many of a row, and bins of a map
    int64_t rows, keys;      // of a whole sequence, which the bins divide
    Tensor4 probs, largest;  // topk's [B, Hq, Sq, topk], and their keys, int64; absent: not wanted
};

// A run of rows of one head. Its sums over these rows are added up over the items, in order.
struct MapsItem {
    int segment, head, row_begin, row_end;
    void* col_mass;  // [the segment's keys]; null: not wanted
    void* pooled;    // [bins of these rows, from the first one's][bins]; null: not wanted
};

// The probabilities themselves, in q's dtype.
struct WeightsResult {
    Tensor4 to;         // [B, Hq or 1, rows, Skv]
    int64_t keys;       // of a row of `to`
    const int* rows;    // rows of their segments, one run after the other
    const int* places;  // where each goes: the row of `to`
};

// Rows [begin, end) of WeightsResult's lists, of the heads from `head` on, whose mean is wanted.
struct WeightsItem {
    int segment, head, heads, begin, end;
};

struct Kernels {
    int block_q, block_kv;  // rows and keys of a tile
    void (*forward)(const Params&, const ForwardItem&, const SplitResults&);
    void (*forward_statistics)(const Params&, const ForwardItem&, const SplitResults&);
    void (*maps)(const Params&, const MapsItem&, const MapsResults&);
    void (*weights)(const Params&, const WeightsItem&, const WeightsResult&);
    void (*combine)(const Params&, const ForwardItem&, int splits, const SplitResults&);
    void (*backward)(const Params&, const BackwardItem&);
    void (*reduce)(const Params&, const BackwardItem*, int count);
    void (*jvp)(const Params&, const ForwardItem&);  // of items without splits
    void (*jvp_bwd)(const Params&, const BackwardItem&);
    int64_t (*padded)(int columns);  // row length of dk_sum and dv_sum
    FusedKernels fused;
};

// fp32 arithmetic (fp32, bf16, fp16 tensors) and fp64.
struct IsaKernels {
    Kernels f32, f64;
};

// One per row of isas(); null where the compiler does not target this architecture.
extern const IsaKernels* const avx512_bf16_kernels;
extern const IsaKernels* const avx512_kernels;
extern const IsaKernels* const avx2_kernels;
extern const IsaKernels* const portable_kernels;
extern const IsaKernels* const portable_bf16_kernels;

}  // namespace fastattn::cpu
