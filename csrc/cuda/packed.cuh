// Packed sequences lie one after the other in the rows of a tensor, number n from row cu[n] on.
// Their tiles are counted in slots, of which no two sequences share one: those of number n begin
// with slot cu[n] / block + n, which is more than enough; slots past its end are empty. Rows past
// all sequences have a number too, the last. Where a tile has `pack` heads, each row counts pack
// times. next: work.cuh, backward_tile.cuh
#pragma once
#include "ptx.cuh"

namespace fastattn::cuda {

struct Sequence {
    int number, begin, end;  // rows [begin, end) of the tensor
    int first_slot;

    FASTATTN_DEVICE Sequence(const int* cu, int sequences, int rows, int number, int block,
                             int pack = 1)
        : number(number),
          begin(ld_global(cu + number)),
          end(number == sequences ? rows : ld_global(cu + number + 1)),
          first_slot(begin * pack / block + number) {}

    FASTATTN_DEVICE static Sequence of_slot(const int* cu, int sequences, int rows, int slot,
                                            int block, int pack = 1) {
        int low = 0, high = sequences;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (ld_global(cu + middle) * pack / block + middle <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        return {cu, sequences, rows, low, block, pack};
    }
};

}  // namespace fastattn::cuda
