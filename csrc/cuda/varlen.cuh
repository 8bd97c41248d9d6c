// Which rows and keys may meet: an entry's of the batch, a packed sequence's, or a document's.
// Packed sequences lie one after the other in the rows of a tensor, number n from row cu[n] on;
// documents are the sequences of one entry, which all have its lengths and its diagonal.
//
// Their tiles are counted in slots, of which no two sequences share one: those of number n begin
// with slot cu[n] / block + n, which is more than enough; slots past its end are empty. Rows past
// all sequences have a number too, the last. Where a tile has `pack` heads, each row counts pack
// times. next: work.cuh, backward_tile.cuh
#pragma once
#include "../spec.h"
#include "ptx.cuh"

namespace fastattn::cuda {

struct SequenceRows {
    int number, begin, end;  // rows [begin, end) of the tensor
    int first_slot;

    FASTATTN_DEVICE SequenceRows(const int* cu, int sequences, int rows, int number, int block,
                                 int pack_gqa = 1)
        : number(number),
          begin(ld_global(cu + number)),
          end(number == sequences ? rows : ld_global(cu + number + 1)),
          first_slot(begin * pack_gqa / block + number) {}

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

// Of one entry's documents; packed sequences are in entry 0.
template <class Params>
FASTATTN_DEVICE const int* cu_of(const int* cu, const Params& p, int batch) {
    return cu + static_cast<int64_t>(batch) * (p.sequences + 1);
}

struct Segment {
    int lengths_index;
    int first_row, rows;    // of q
    int first_key, places;  // of k and v; of these
    int begin, end;         // the keys that exist
    int offset;             // the diagonal of row i is key i + offset

    // sequence: the number of a packed sequence or of a document, where there are such.
    template <class Params> FASTATTN_DEVICE Segment(const Params& p, int batch, int sequence) {
        lengths_index = batch;
        first_row = first_key = begin = 0;
        rows = p.q_len;
        places = end = p.kv_len;
        bool varlen = p.cu_q && !p.documents, none = varlen && sequence == p.sequences;
        if (varlen) {
            lengths_index = sequence;
            place(p, batch, sequence);
            end = none ? 0 : places;  // keys of no sequence
        }
        if (p.kv_lens && !none) end = imax(0, imin(ld_global(p.kv_lens + lengths_index), end));
        if (p.kv_starts && !none)
            begin = imax(0, imin(ld_global(p.kv_starts + lengths_index), end));
        offset = p.align_end ? end - rows : 0;
        if (p.documents) {  // rows and keys from the same one on, so the diagonal stays
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
