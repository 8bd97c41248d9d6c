// Shared memory with its race detector, and bounds of global memory. next: barriers.cpp
#include <algorithm>
#include <sstream>

#include "state.h"

namespace fastattn::emulator {

namespace {

struct Block {
    uintptr_t begin, end;
    std::string name;
};
std::vector<Block> blocks;

bool ordered(const Access& before, const Accessor& now) {
    return before.epoch == 0 || before.slot == now.slot ||
           now.clock->at[before.slot] >= before.epoch;
}

[[noreturn]] void race(uint32_t address, const Access& before, const char* did, const Accessor& now,
                       const char* does) {
    fail(now.site, "race on shared memory at " + std::to_string(address) + ": " +
                       name_of(now.slot, now.kind) + " " + does + " what " +
                       name_of(before.slot, before.kind) + " " + did +
                       " with nothing between that orders the two; that was\n" +
                       lines_of(before.site) + "\n    and this is");
}

// A thread's write is visible to an asynchronous operation only after a fence.proxy.async by that
// thread, which must be ordered before the read.
void check_proxy(uint32_t address, const Access& write, const Accessor& now) {
    if (now.kind == Kind::THREAD || write.epoch == 0 || write.kind != Kind::THREAD) return;
    const std::vector<uint32_t>& fences = cta->threads[write.slot].fences;
    auto fence = std::lower_bound(fences.begin(), fences.end(), write.epoch);
    if (fence == fences.end() || now.clock->at[write.slot] < *fence)
        fail(now.site,
             "no fence.proxy.async between this asynchronous access to shared memory at " +
                 std::to_string(address) + " and thread " + std::to_string(write.slot) +
                 "'s write\n" + lines_of(write.site));
}

void note_read(Cell& cell, const Accessor& who, int at) {
    Access* place = &cell.reads[at % 3];
    for (Access& r : cell.reads)
        if (r.slot == who.slot || ordered(r, who)) {
            place = &r;
            break;
        }
    *place = {who.epoch, who.site, static_cast<uint16_t>(who.slot), who.kind};
}

}  // namespace

uint32_t swizzled(uint32_t a, Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::B128:
            return a ^ (((a >> 7) & 7) << 4);
        case Swizzle::B64:
            return a ^ (((a >> 7) & 3) << 4);
        case Swizzle::B32:
            return a ^ (((a >> 7) & 1) << 4);
        default:
            return a;
    }
}

void check_range(uint32_t address, int bytes, int alignment, uint32_t site, const char* what) {
    if (address < SHARED_BASE ||
        address + bytes > SHARED_BASE + static_cast<uint32_t>(cta->how.shared_bytes))
        fail(site, std::string(what) + " of " + std::to_string(bytes) + " bytes at " +
                       std::to_string(address) + " is outside of shared memory, [1024, " +
                       std::to_string(SHARED_BASE + cta->how.shared_bytes) + ")");
    if (address % alignment)
        fail(site, std::string(what) + " at " + std::to_string(address) +
                       " must be a multiple of " + std::to_string(alignment));
}

uint8_t* read_cells(uint32_t address, int bytes, const Accessor& who) {
    for (uint32_t i = (address - SHARED_BASE) / 4; i <= (address - SHARED_BASE + bytes - 1) / 4;
         i++) {
        Cell& cell = cta->cells[i];
        uint32_t at = SHARED_BASE + 4 * i;
        if (cell.write.epoch == 0)
            fail(who.site,
                 "shared memory at " + std::to_string(at) + " is read and nobody has written it");
        if (!ordered(cell.write, who)) race(at, cell.write, "wrote", who, "reads");
        check_proxy(at, cell.write, who);
        note_read(cell, who, who.slot);
    }
    return &cta->shared[address - SHARED_BASE];
}

uint8_t* write_cells(uint32_t address, int bytes, const Accessor& who) {
    for (uint32_t i = (address - SHARED_BASE) / 4; i <= (address - SHARED_BASE + bytes - 1) / 4;
         i++) {
        Cell& cell = cta->cells[i];
        uint32_t at = SHARED_BASE + 4 * i;
        if (!ordered(cell.write, who)) race(at, cell.write, "wrote", who, "writes");
        check_proxy(at, cell.write, who);
        for (Access& r : cell.reads)
            if (!ordered(r, who)) race(at, r, "read", who, "writes");
        cell = {};
        cell.write = {who.epoch, who.site, static_cast<uint16_t>(who.slot), who.kind};
    }
    return &cta->shared[address - SHARED_BASE];
}

void shared_read(uint32_t address, void* to, int bytes) {
    uint32_t site = SITE;
    check_range(address, bytes, bytes, site, "a load");
    std::memcpy(to, read_cells(address, bytes, self(site)), bytes);
}

void shared_write(uint32_t address, const void* from, int bytes) {
    uint32_t site = SITE;
    check_range(address, bytes, bytes, site, "a store");
    std::memcpy(write_cells(address, bytes, self(site)), from, bytes);
}

// ---- global memory -----------------------------------------------------------------------------

void register_memory(const void* begin, size_t bytes, const char* name) {
    uintptr_t at = reinterpret_cast<uintptr_t>(begin);
    blocks.push_back({at, at + bytes, name});
}

void forget_memory() { blocks.clear(); }

void check_global(const void* p, size_t bytes, int alignment, uint32_t site, const char* what) {
    uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (at % alignment)
        fail(site, std::string(what) + " of global memory must be aligned to " +
                       std::to_string(alignment) + " bytes");
    for (const Block& b : blocks)
        if (at >= b.begin && at + bytes <= b.end) return;
    std::ostringstream text;
    text << what << " of " << bytes << " bytes is outside of every buffer";
    for (const Block& b : blocks)
        if (at + 65536 > b.begin && at < b.end + 65536)
            text << ", " << static_cast<int64_t>(at - b.begin) << " bytes into " << b.name
                 << ", which has " << b.end - b.begin;
    fail(site, text.str());
}

void global_read(const void* from, void* to, int bytes) {
    check_global(from, bytes, bytes, SITE, "a load");
    std::memcpy(to, from, bytes);
}

void global_write(void* to, const void* from, int bytes) {
    check_global(to, bytes, bytes, SITE, "a store");
    std::memcpy(to, from, bytes);
}

int global_add(int* p, int x) {
    check_global(p, 4, 4, SITE, "an atomic addition");
    int old = *p;
    *p += x;
    return old;
}

void global_add(float* p, float x) {
    check_global(p, 4, 4, SITE, "an atomic addition");
    *p += x;
}

}  // namespace fastattn::emulator
