// Rings of buffers in shared memory between one producer and its consumers. Phase bits of mbarriers
// appear in this file only. next: softmax.cuh
#pragma once
#include "ptx.cuh"

namespace fastattn::cuda {

// Each side has a Ring object of its own, which knows the stage that side is at. A stage has two
// mbarriers: full, which the producer's copies complete, and empty, which consumers arrive at.
template <int STAGES> struct Ring {
    static constexpr int BYTES = 2 * STAGES * 8;

    SharedAddress barriers;
    int stage = 0;
    uint32_t phase = 0;

    FASTATTN_DEVICE SharedAddress full() const { return barriers + 8 * stage; }
    FASTATTN_DEVICE SharedAddress empty() const { return barriers + 8 * (STAGES + stage); }

    // One thread calls this, then fence_mbarrier_init(), and then all sync_block(). releases: how
    // many threads release each stage.
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

    // Producer: waits until the stage is free, as all are at first, and announces how many bytes
    // its copies will bring.
    FASTATTN_DEVICE void acquire(int bytes) const {
        mbarrier_wait(empty(), phase ^ 1);
        mbarrier_arrive_expect(full(), bytes);
    }
    // Consumer: waits until all bytes have come.
    FASTATTN_DEVICE void wait() const { mbarrier_wait(full(), phase); }
    FASTATTN_DEVICE void release() const { mbarrier_arrive(empty()); }
};

// A ring of FP8 values, which other warps transpose in place between the producer and the
// consumers. They wait with wait_loaded(), and pass each stage on with signal_transposed() at a
// third mbarrier, which is the one that consumers wait for.
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
