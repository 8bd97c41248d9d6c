// Where threads meet and wait: warps, named barriers, mbarriers, register reallocation.
// next: copies.cpp
#include "state.h"

namespace fastattn::emulator {

namespace {

Meeting& my_warp() { return cta->warps[cta->current->index / 32]; }

Mbarrier& mbarrier_at(uint32_t bar, uint32_t site) {
    check_range(bar, 8, 8, site, "an mbarrier");
    auto found = cta->mbarriers.find(bar);
    if (found == cta->mbarriers.end()) fail(site, "there is no mbarrier at " + std::to_string(bar));
    Mbarrier& b = found->second;
    const Thread& t = *cta->current;
    if (b.owner != t.index && t.clock->at[b.owner] < b.init_epoch)
        fail(site, "this mbarrier's initialisation is not ordered before this use of it");
    return b;
}

void complete_phase_if_due(Mbarrier& b) {
    if (b.pending != 0 || b.bytes != 0) return;
    b.completed = b.release.take();
    b.phase++;
    b.pending = b.arrivals;
    for (Thread* t : b.waiting) wake(t);
    b.waiting.clear();
}

}  // namespace

// ---- warps -------------------------------------------------------------------------------------

uint32_t shuffle(uint32_t x, int from_lane) {
    Meeting& m = my_warp();
    int lane = cta->current->index % 32;
    m.in[lane] = x;
    m.values[lane][0] = from_lane & 31;
    meet(m, 32, Op::SHUFFLE, 0, SITE, [&] {
        for (int i = 0; i < 32; i++) m.out[i] = m.in[m.values[i][0]];
    });
    return m.out[lane];
}

void sync_warp() {
    Meeting& m = my_warp();
    meet(m, 32, Op::SYNC_WARP, 0, SITE, [&] {
        Release all;
        int first = cta->current->index / 32 * 32;
        for (int i = first; i < first + 32; i++) {
            all.add(cta->threads[i].clock);
            all.add(i, cta->threads[i].epoch++);
        }
        Clock clock = all.take();
        for (int i = first; i < first + 32; i++) cta->threads[i].clock = clock;
    });
}

// ---- named barriers ----------------------------------------------------------------------------

void barrier(int id, int threads, bool wait) {
    uint32_t site = SITE;
    if (id == 0 && threads == 0) threads = cta->how.threads;
    if (id < 0 || id > 15) fail(site, "named barriers are 0 to 15, this is " + std::to_string(id));
    if (threads % 32 || threads <= 0 || threads > cta->how.threads)
        fail(site, "a named barrier cannot have " + std::to_string(threads) + " threads");
    NamedBarrier& b = cta->named[id];
    if (b.arrived == 0) b.expected = threads;
    if (b.expected != threads)
        fail(site, "named barrier " + std::to_string(id) + " is entered with " +
                       std::to_string(threads) + " threads, by others with " +
                       std::to_string(b.expected));
    Thread& me = *cta->current;
    b.release.add(me.clock);
    b.release.add(me.index, released());
    if (wait) b.waiting.push_back(&me);
    if (++b.arrived < threads) {
        if (wait)
            block(
                "bar.sync", site,
                " of barrier " + std::to_string(id) + ", " + std::to_string(threads) + " threads");
        return;
    }
    Clock clock = b.release.take();
    std::vector<Thread*> waiting;
    waiting.swap(b.waiting);
    b.arrived = 0;
    for (Thread* t : waiting) {
        acquire(*t, clock);
        if (t != &me) wake(t);
    }
}

// ---- mbarriers ---------------------------------------------------------------------------------

void mbarrier_init(uint32_t bar, int arrivals) {
    uint32_t site = SITE;
    check_range(bar, 8, 8, site, "an mbarrier");
    if (arrivals < 1) fail(site, "an mbarrier needs at least one arrival");
    write_cells(bar, 8, self(site));
    Mbarrier& b = cta->mbarriers[bar];
    b = {};
    b.arrivals = b.pending = arrivals;
    b.owner = cta->current->index;
    b.init_epoch = cta->current->epoch;
    b.completed = std::make_shared<ClockValue>();
}

void fence_mbarrier_init() {
    for (auto& [address, b] : cta->mbarriers)
        if (b.owner == cta->current->index) b.fenced = true;
}

void mbarrier_arrive(uint32_t bar, int expect_bytes) {
    uint32_t site = SITE;
    Mbarrier& b = mbarrier_at(bar, site);
    Thread& me = *cta->current;
    if (b.pending == 0)
        fail(site, "one arrival more than the " + std::to_string(b.arrivals) +
                       " of this mbarrier's phase");
    if (expect_bytes < 0 || expect_bytes >= 1 << 20)
        fail(site, "an mbarrier counts up to 2^20 - 1 bytes");
    b.release.add(me.clock);
    b.release.add(me.index, released());
    b.bytes += expect_bytes;
    b.pending--;
    complete_phase_if_due(b);
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
    uint32_t site = SITE;
    Mbarrier& b = mbarrier_at(bar, site);
    while ((b.phase & 1) == (parity & 1)) {
        b.waiting.push_back(cta->current);
        block("mbarrier.try_wait", site,
              " of the mbarrier at " + std::to_string(bar) + ", parity " + std::to_string(parity));
    }
    acquire(*cta->current, b.completed);
}

// A copy has brought `bytes` bytes, for which the mbarrier waited.
void complete_bytes(uint32_t bar, int bytes, const Async& a) {
    Mbarrier& b = cta->mbarriers.at(bar);
    b.release.add(a.clock);
    b.release.add(a.slot, a.epoch);
    b.bytes -= bytes;
    complete_phase_if_due(b);
}

void check_async_use(uint32_t bar, uint32_t site) {
    if (!mbarrier_at(bar, site).fenced)
        fail(site,
             "no fence.mbarrier_init between the mbarrier's initialisation and its use by a "
             "copy");
}

void fence_proxy_async() {
    Thread& t = *cta->current;
    t.fences.push_back(t.epoch++);
}

// ---- registers ---------------------------------------------------------------------------------

void set_registers(int count, bool increase) {
    uint32_t site = SITE;
    int g = cta->current->index / 128;
    if (count % 8 || count < 24 || count > 256)
        fail(site, "setmaxnreg takes multiples of 8 from 24 to 256");
    meet(cta->warpgroups[g], 128, Op::SETMAXNREG, count * 2 + increase, site, [&] {
        Warpgroup& w = cta->matrix[g];
        if (increase ? count < w.registers : count > w.registers)
            fail(site, "setmaxnreg goes from " + std::to_string(w.registers) + " to " +
                           std::to_string(count) + " in the wrong direction");
        int more = (count - w.registers) * 128;
        while (more > cta->register_pool) {  // the warpgroup's other threads wait in meet()
            cta->register_waiters.push_back({cta->current, more});
            block("setmaxnreg.inc", site,
                  ": " + std::to_string(more) + " registers wanted, " +
                      std::to_string(cta->register_pool) + " free");
        }
        cta->register_pool -= more;
        w.registers = count;
        for (auto& [thread, wanted] : cta->register_waiters) wake(thread);
        cta->register_waiters.clear();
    });
}

}  // namespace fastattn::emulator
