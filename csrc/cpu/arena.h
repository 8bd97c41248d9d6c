// Memory for the kernels' own use. A thread keeps its scratch memory between calls: O(head_dim) for
// the forward kernel and O(keys of an item * head_dim) for the backward.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../poison.h"

namespace fastattn::cpu {

using Bytes = std::unique_ptr<char[]>;

// Uninitialised; throws one sentence where the system refuses.
inline Bytes new_bytes(size_t bytes) {
    Bytes memory(new (std::nothrow) char[bytes]);
    if (memory == nullptr)
        throw std::runtime_error("fastattn: the system refused " + std::to_string(bytes) +
                                 " bytes of scratch memory; free some, or attend with fewer keys, "
                                 "heads or batch entries at a time");
    poison(memory.get(), bytes);
    return memory;
}

inline char* cache_line(char* p) { return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64; }

// Every change of state follows the allocation that it counts on: after a refusal the arena is as
// it was, and the thread's next item finds it usable.
class Arena {
  public:
    // n values of T, uninitialised, at a cache line's start.
    template <class T> T* take(int64_t n) {
        return static_cast<T*>(take_bytes(static_cast<size_t>(n) * sizeof(T)));
    }

  private:
    friend class ArenaLease;
    static constexpr size_t KEEP = size_t(64) << 20;  // a larger arena is given back
    static constexpr size_t FIRST = size_t(1) << 18;  // the smallest chunk

    void* take_bytes(size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > capacity_ - used_) grow(bytes);
        char* p = start_ + used_;
        used_ += bytes;
        total_ += bytes;
        poison(p, bytes);
        return p;
    }

    void grow(size_t bytes) {
        size_t capacity = std::max(bytes, FIRST);
        chunks_.push_back(new_bytes(capacity + 64));
        start_ = cache_line(chunks_.back().get());
        capacity_ = capacity;
        used_ = 0;
    }

    void clear() {
        chunks_.clear();
        start_ = nullptr;
        capacity_ = used_ = total_ = 0;
    }

    // Several chunks become one that would have held them all, so that a repeated item finds it.
    void begin() {
        size_t wanted = total_;
        if (chunks_.size() > 1) clear();
        used_ = total_ = 0;
        if (chunks_.empty() && wanted > 0) grow(wanted);
    }
    void end() {
        if (total_ > KEEP) clear();
    }

    std::vector<Bytes> chunks_;
    char* start_ = nullptr;  // of the last chunk
    size_t capacity_ = 0, used_ = 0, total_ = 0;
};

// The calling thread's arena for one work item, empty at first. One at a time on a thread.
class ArenaLease {
  public:
    ArenaLease() : arena_(of_thread()) { arena_.begin(); }
    ~ArenaLease() { arena_.end(); }
    ArenaLease(const ArenaLease&) = delete;
    ArenaLease& operator=(const ArenaLease&) = delete;

    Arena& operator*() const { return arena_; }
    Arena* operator->() const { return &arena_; }

  private:
    static Arena& of_thread() {
        thread_local Arena arena;
        return arena;
    }
    Arena& arena_;
};

// Keys and values that a thread has packed, kept for its next tiles of the same head: else every
// tile of 96 rows would pack all of them again (3 % of the time in fp32, twice that in bf16).
class PanelCache {
  public:
    static constexpr size_t BYTES = size_t(4) << 20;  // at most

    // The calling thread's cache for one kv head of one call. What lay there for another is gone.
    static PanelCache& of(uint64_t call, int segment, int kv_head, size_t bytes, int blocks) {
        thread_local PanelCache cache;
        if (cache.call_ != call || cache.segment_ != segment || cache.kv_head_ != kv_head)
            cache.clear(call, segment, kv_head, bytes, blocks);
        return cache;
    }

    void* memory() { return cache_line(memory_.get()); }
    // Whether the block must be packed now; from then on it is.
    bool claim(int block) {
        bool first = !packed_[block];
        packed_[block] = 1;
        return first;
    }

  private:
    void clear(uint64_t call, int segment, int kv_head, size_t bytes, int blocks) {
        call_ = 0;  // until there is memory for it, the cache is nobody's
        packed_.assign(blocks, 0);
        if (size_ < bytes) {
            size_ = 0;
            memory_ = nullptr;
            memory_ = new_bytes(bytes + 64);
            size_ = bytes;
        }
        poison(memory(), bytes);
        call_ = call;
        segment_ = segment;
        kv_head_ = kv_head;
    }

    uint64_t call_ = 0;  // no call has the number 0
    int segment_ = 0, kv_head_ = 0;
    std::vector<char> packed_;
    size_t size_ = 0;
    Bytes memory_;
};

}  // namespace fastattn::cpu
