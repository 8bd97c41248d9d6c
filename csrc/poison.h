// Under test, memory that nobody has written reads as NaN, so that a value never written shows.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace fastattn {

// FASTATTN_POISON, read once: unset, empty and 0 mean no.
inline bool poison_on() {
    static const bool on = [] {
        const char* value = std::getenv("FASTATTN_POISON");
        return value != nullptr && *value != 0 && std::strcmp(value, "0") != 0;
    }();
    return on;
}

// All bits set are NaN in every floating-point type and -1 in integers.
inline void poison(void* memory, size_t bytes) {
    if (poison_on()) std::memset(memory, 0xff, bytes);
}

}  // namespace fastattn
