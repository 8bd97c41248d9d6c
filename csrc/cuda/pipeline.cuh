// A ring of buffers between one producer and the consumers. Phase bits appear in this file only.
// next: softmax.cuh
#pragma once
#include "ptx.cuh"

namespace fastattn::cuda {

// Each side has its own Ring object, which knows where that side is. Two mbarriers a stage.
template <int STAGES> struct Ring {
    static constexpr int BYTES = 2 * STAGES * 8;

    SharedAddress barriers;
    int stage = 0;
    uint32_t phase = 0;

    FASTATTN_DEVICE SharedAddress full() const { return barriers + 8 * stage; }
    FASTATTN_DEVICE SharedAddress empty() const { return barriers + 8 * (STAGES + stage); }

    // One thread; then fence_mbarrier_init() and sync_block().
    FASTATTN_DEVICE void init(int releases) const {
#pragma unroll
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(barriers + 8 * i, 1);
            mbarrier_init(barriers + 8 * (STAGES + i), releases);
        }
    }
    FASTATTN_DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }

    // Producer: waits until the stage is free (at first all are), then announces what will come.
    FASTATTN_DEVICE void acquire(int bytes) const {
        mbarrier_wait(empty(), phase ^ 1);
        mbarrier_arrive_expect(full(), bytes);
    }
    // Consumer: waits until all bytes are there.
    FASTATTN_DEVICE void wait() const { mbarrier_wait(full(), phase); }
    FASTATTN_DEVICE void release() const { mbarrier_arrive(empty()); }
};

// A ring whose buffers are worked on in place between the producer and the consumers, by warps that
// wait with wait_loaded() and pass on with signal_transposed().
template <int STAGES> struct TransposedRing : Ring<STAGES> {
    static constexpr int BYTES = 3 * STAGES * 8;

    FASTATTN_DEVICE SharedAddress transposed() const {
        return this->barriers + 8 * (2 * STAGES + this->stage);
    }
    FASTATTN_DEVICE void init(int releases, int transposes) const {
        Ring<STAGES>::init(releases);
#pragma unroll
        for (int i = 0; i < STAGES; i++)
            mbarrier_init(this->barriers + 8 * (2 * STAGES + i), transposes);
    }
    FASTATTN_DEVICE void wait_loaded() const { Ring<STAGES>::wait(); }
    FASTATTN_DEVICE void signal_transposed() const { mbarrier_arrive(transposed()); }
    FASTATTN_DEVICE void wait() const { mbarrier_wait(transposed(), this->phase); }
};

}  // namespace fastattn::cuda
