// The work of a CTA of a forward kernel: a tile of query rows, the tiles of keys that they see, and
// which of those need no mask. next: forward_sm90.cuh, forward_sm80.cuh
#pragma once
#include "varlen.cuh"
#include "params.h"

namespace fastattn::cuda {

// The tile of query rows with number `index`, and the keys that its rows see. The last rows come
// first: under a causal mask they see the most keys, and the longest work is best begun first. With
// p.pack_gqa > 1, that many query heads which share a kv head count as one, and row r of a tile is
// row r / p.pack_gqa of head r % p.pack_gqa among them.
struct Work {
    int batch, head, row;  // head: the first that is packed; row: the tile's first in its segment
    int lengths_index;
    int first_row,
        first_key;  // where row 0 of the segment and key 0 of the band lie in the tensors
    int rows;       // of the segment, as tiles count them: times pack_gqa
    Band band;

    template <class Params> FASTATTN_DEVICE Work(const Params& p, int index, int block_q) {
        int heads = p.heads / p.pack_gqa, all = p.batch * heads;
        int per_section = p.heads_per_section * p.q_tiles;
        int section = index / per_section, rest = index % per_section;
        int first = section * p.heads_per_section;
        int width = imin(p.heads_per_section, all - first);
        int which = first + rest % width, slot = p.q_tiles - 1 - rest / width;
        batch = which / heads;
        head = which % heads * p.pack_gqa;
        int sequence = 0;
        if (p.cu_q) {
            SequenceRows own = SequenceRows::of_slot(cu_of(p.cu_q, p, batch), p.sequences, p.q_len,
                                                     slot, block_q, p.pack_gqa);
            sequence = own.number;
            slot -= own.first_slot;
        }
        Segment segment(p, batch, sequence);
        lengths_index = segment.lengths_index;
        first_row = segment.first_row;
        first_key = segment.begin + (p.page_table ? 0 : segment.first_key);
        row = slot * block_q;
        rows = segment.rows * p.pack_gqa;
        band = {p.left, p.right, segment.offset - segment.begin, segment.rows,
                segment.end - segment.begin};
    }

    FASTATTN_DEVICE bool empty() const { return row >= rows; }
};

// Tiles of keys [begin, end), of which every row sees all of [full_begin, full_end).
struct KeyTiles {
    int begin, full_begin, full_end, end;

    FASTATTN_DEVICE KeyTiles(const Band& band, int row_begin, int row_end, int block_kv) {
        Range keys = band.kv_range(imin(row_begin, band.q_len - 1), imin(row_end, band.q_len));
        begin = keys.begin / block_kv;
        end = imax(begin, (keys.end + block_kv - 1) / block_kv);
        full_begin = imin(end, (keys.full_begin + block_kv - 1) / block_kv);
        full_end = imax(full_begin, keys.full_end / block_kv);
    }
};

}  // namespace fastattn::cuda
