// Packed sequences lie one after the other in the rows of a tensor, number n from row cu[n] on.
// Their tiles are counted in slots, of which no two sequences share one: those of number n begin
// with slot cu[n] / block + n, which is more than enough; slots past its end are empty. Rows past
// all sequences have a number too, the last. next: forward_sm90.cuh, backward_tile.cuh
#pragma once
#include "ptx.cuh"

namespace fastattn::cuda {

struct Sequence {
    int number, begin, end;  // rows [begin, end) of the tensor
    int first_slot;

    FASTATTN_DEVICE Sequence(const int* cu, int sequences, int rows, int number, int block)
        : number(number),
          begin(ld_global(cu + number)),
          end(number == sequences ? rows : ld_global(cu + number + 1)),
          first_slot(begin / block + number) {}

    FASTATTN_DEVICE static Sequence of_slot(const int* cu, int sequences, int rows, int slot,
                                            int block) {
        int low = 0, high = sequences;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (ld_global(cu + middle) / block + middle <= slot)
                low = middle;
            else
                high = middle - 1;
        }
        return {cu, sequences, rows, low, block};
    }
};

}  // namespace fastattn::cuda
