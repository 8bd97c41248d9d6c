// Which rows and keys may meet: those of a segment, which is a batch entry, a sequence of a varlen
// call, or a document.
//
// Varlen sequences lie one after the other in the rows of one tensor with batch 1, number n from
// row cu[n] on. Documents are sequences within a batch entry, which all have the entry's lengths
// and diagonal.
//
// Tiles of sequences are numbered by slots, so that no tile has rows of two sequences: those of
// sequence n begin with slot cu[n] / block + n, and slots past its last tile stay empty. So the
// slot of a sequence is known without a sum over those before it. Rows past the last sequence form
// one more, with number `sequences`. Where tiles pack pack_gqa query heads, each row counts
// pack_gqa times. next: work.cuh, backward_tile.cuh
#pragma once
#include "../spec.h"
#include "ptx.cuh"

namespace fastattn::cuda {

// The rows of one sequence in q, or its keys in k.
struct SequenceRows {
    int number, begin, end;  // rows [begin, end) of the tensor
    int first_slot;

    FASTATTN_DEVICE SequenceRows(const int* cu, int sequences, int rows, int number, int block,
                                 int pack_gqa = 1)
        : number(number),
          begin(ld_global(cu + number)),
          end(number == sequences ? rows : ld_global(cu + number + 1)),
          first_slot(begin * pack_gqa / block + number) {}

    // The sequence that a slot belongs to, by bisection.
    FASTATTN_DEVICE static SequenceRows of_slot(const int* cu, int sequences, int rows, int slot,
                                                int block, int pack_gqa = 1) {
        int low = 0, high = sequences;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (ld_global(cu + middle) * pack_gqa / block + middle <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        return {cu, sequences, rows, low, block, pack_gqa};
    }
};

// The row of cu_q or cu_k that belongs to a batch entry; varlen calls have one row, and batch 0.
template <class Params>
FASTATTN_DEVICE const int* cu_of(const int* cu, const Params& p, int batch) {
    return cu + static_cast<int64_t>(batch) * (p.sequences + 1);
}

struct Segment {
    int lengths_index;      // into kv_lens, kv_starts, page_table and descales
    int first_row, rows;    // in q
    int first_key, places;  // in k and v: of these keys,
    int begin, end;         // only [begin, end) exist
    int offset;             // the diagonal of row i is key i + offset

    // sequence: the number of a varlen sequence or of a document; 0 where there are neither.
    template <class Params> FASTATTN_DEVICE Segment(const Params& p, int batch, int sequence) {
        lengths_index = batch;
        first_row = first_key = begin = 0;
        rows = p.q_len;
        places = end = p.kv_len;
        bool varlen = p.cu_q && !p.documents, none = varlen && sequence == p.sequences;
        if (varlen) {
            lengths_index = sequence;
            place(p, batch, sequence);
            end = none ? 0 : places;  // keys past the last sequence are nobody's
        }
        if (p.kv_lens && !none) end = imax(0, imin(ld_global(p.kv_lens + lengths_index), end));
        if (p.kv_starts && !none)
            begin = imax(0, imin(ld_global(p.kv_starts + lengths_index), end));
        offset = p.align_end ? end - rows : 0;
        if (p.documents) {  // its rows and keys begin at the same index: the diagonal stays
            place(p, batch, sequence);
            end = imax(0, imin(end - first_key, places));
            begin = imax(0, imin(begin - first_key, end));
        }
    }

    template <class Params> FASTATTN_DEVICE void place(const Params& p, int batch, int sequence) {
        SequenceRows q(cu_of(p.cu_q, p, batch), p.sequences, p.q_len, sequence, 1);
        SequenceRows k(cu_of(p.cu_k, p, batch), p.sequences, p.kv_len, sequence, 1);
        first_row = q.begin;
        rows = q.end - q.begin;
        first_key = k.begin;
        places = k.end - k.begin;
    }
};

}  // namespace fastattn::cuda
