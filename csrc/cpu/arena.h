// Scratch memory of one thread, kept between calls: O(head_dim) for the forward kernel and
// O(kv_len * head_dim) for the backward.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastattn::cpu {

class Arena {
  public:
    // The calling thread's arena, emptied.
    static Arena& fresh() {
        thread_local Arena arena;
        arena.reset();
        return arena;
    }

    // n values of T, uninitialised, at a cache line's start.
    template <class T> T* take(int64_t n) {
        size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
        if (used_ + bytes > capacity_) grow(bytes);
        T* p = reinterpret_cast<T*>(chunks_.back().get() + start_ + used_);
        used_ += bytes;
        total_ += bytes;
        return p;
    }

  private:
    static constexpr size_t KEEP = size_t(64) << 20;  // a larger arena is given back after use

    void grow(size_t bytes) {
        capacity_ = bytes > (size_t(1) << 18) ? bytes : size_t(1) << 18;
        chunks_.emplace_back(new char[capacity_ + 64]);
        start_ = (64 - reinterpret_cast<uintptr_t>(chunks_.back().get()) % 64) % 64;
        used_ = 0;
    }

    // Several chunks become one that would have held them all, so that a repeated call finds it.
    void reset() {
        if (chunks_.size() > 1 || capacity_ > KEEP) {
            size_t wanted = total_;
            chunks_.clear();
            capacity_ = 0;
            if (wanted <= KEEP) grow(wanted);
        }
        used_ = total_ = 0;
    }

    std::vector<std::unique_ptr<char[]>> chunks_;
    size_t capacity_ = 0, start_ = 0, used_ = 0, total_ = 0;
};

// Keys and values that a thread has packed, kept for its next tiles of the same head: else every
// tile of 96 rows would pack all of them again (3 % of the time in fp32, twice that in bf16).
class Shelf {
  public:
    static constexpr size_t BYTES = size_t(4) << 20;  // at most

    // The calling thread's shelf for one kv head of one call. What lay there for another is gone.
    static Shelf& of(uint64_t call, int segment, int kv_head, size_t bytes, int blocks) {
        thread_local Shelf shelf;
        if (shelf.call_ != call || shelf.segment_ != segment || shelf.kv_head_ != kv_head) {
            shelf.call_ = call;
            shelf.segment_ = segment;
            shelf.kv_head_ = kv_head;
            shelf.packed_.assign(blocks, 0);
            if (shelf.memory_.size() < bytes + 64) shelf.memory_.resize(bytes + 64);
        }
        return shelf;
    }

    void* memory() {
        uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data());
        return memory_.data() + (64 - at % 64) % 64;
    }
    // Whether the block must be packed now; from then on it is.
    bool claim(int block) {
        bool first = !packed_[block];
        packed_[block] = 1;
        return first;
    }

  private:
    uint64_t call_ = 0;  // no call has the number 0
    int segment_ = 0, kv_head_ = 0;
    std::vector<char> packed_, memory_;
};

}  // namespace fastattn::cpu
