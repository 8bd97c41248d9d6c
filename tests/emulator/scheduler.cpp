// Fibers, their scheduling, and the report when they cannot go on. next: memory.cpp
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <sstream>

#include "state.h"

// Saves the registers that the ABI says a call preserves, switches stacks, and restores them there.
asm(R"(
.text
.type fastattn_switch,@function
fastattn_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
extern "C" void fastattn_switch(void** save, void* to) asm("fastattn_switch");

namespace fastattn::emulator {

Cta* cta = nullptr;

namespace {

constexpr size_t STACK_BYTES = 256 << 10;  // only the pages that a kernel's frame reaches are used
const std::function<void()>* kernel_body = nullptr;

// Each thread's stack, kept for the next launch. Its lowest page is protected, so that an overflow
// faults.
char* stack_of(int thread) {
    static std::vector<char*> stacks;
    while (static_cast<int>(stacks.size()) <= thread) {
        void* p = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        mprotect(p, 4096, PROT_NONE);
        stacks.push_back(static_cast<char*>(p));
    }
    return stacks[thread];
}

void leave() {  // back to the scheduler
    Thread* t = cta->current;
    fastattn_switch(&t->fiber.stack_pointer, cta->main.stack_pointer);
}

void check_exit(Thread& t) {
    for (const Group& g : t.bulk_groups)
        if (!g.operations.empty() && !g.read)
            fail(g.operations[0]->site, "the thread exits before it waited for this bulk group");
    if (!t.bulk.operations.empty())
        fail(t.bulk.operations[0]->site, "a bulk operation was never committed");
    if (t.index % 128 == 0 && t.index / 128 < static_cast<int>(cta->matrix.size()) &&
        !cta->matrix[t.index / 128].queue.empty())
        fail(cta->matrix[t.index / 128].queue[0].async->site,
             "the warpgroup exits with this wgmma in flight");
}

void thread_main() {
    (*kernel_body)();
    Thread& t = *cta->current;
    check_exit(t);
    t.exited = true;
    cta->alive--;
    leave();
    __builtin_unreachable();
}

void prepare(Thread& t) {
    t.fiber.stack = stack_of(t.index);
    void** top = reinterpret_cast<void**>(t.fiber.stack + STACK_BYTES - 64);
    *--top = nullptr;  // thread_main's return address
    *--top = reinterpret_cast<void*>(&thread_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t.fiber.stack_pointer = top;
}

std::string deadlock() {
    std::map<std::string, std::vector<int>> groups;
    for (const Thread& t : cta->threads)
        if (!t.exited)
            groups[std::string(t.waiting ? t.waiting : "running") + t.detail + "\n" +
                   lines_of(t.site)]
                .push_back(t.index);
    std::ostringstream text;
    text << "deadlock in block " << cta->block << ": nobody can go on";
    for (const auto& [where, who] : groups)
        text << "\n  " << who.size() << " threads (" << who.front() << " to " << who.back()
             << ") wait in " << where;
    for (const auto& [address, bar] : cta->mbarriers)
        text << "\n  mbarrier at " << address << ": phase " << bar.phase << ", " << bar.pending
             << " of " << bar.arrivals << " arrivals and " << bar.bytes << " bytes missing";
    return text.str();
}

void run_ready() {
    int warps = static_cast<int>(cta->ready.size()), w = cta->draw(warps);
    while (cta->ready[w].empty()) w = (w + 1) % warps;
    std::vector<Thread*> now;
    now.swap(cta->ready[w]);
    cta->ready_count -= static_cast<int>(now.size());
    if (cta->draw(2)) std::reverse(now.begin(), now.end());
    for (Thread* t : now) {
        cta->current = t;
        t->waiting = nullptr;
        fastattn_switch(&cta->main.stack_pointer, t->fiber.stack_pointer);
        cta->current = nullptr;
        if (!cta->error.empty()) return;
    }
}

void run_cta() {
    while (cta->alive > 0 && cta->error.empty()) {
        if (cta->haste == 2 && !cta->pending.empty() && cta->draw(4) == 0)
            run_step(cta->pending[cta->draw(static_cast<uint32_t>(cta->pending.size()))]);
        if (cta->haste == 2 && !cta->matrix.empty() && cta->draw(4) == 0)
            run_one_multiply(cta->matrix[cta->draw(static_cast<uint32_t>(cta->matrix.size()))]);
        if (!cta->error.empty()) return;
        if (cta->ready_count > 0) {
            run_ready();
        } else if (!cta->pending.empty()) {
            run_step(cta->pending[cta->draw(static_cast<uint32_t>(cta->pending.size()))]);
        } else {
            cta->error = deadlock();
        }
    }
}

void check_end() {
    if (cta->error.empty() && !cta->pending.empty()) {
        // Stores may outlive their CTA once they have read its memory.
        std::vector<AsyncPtr> left = cta->pending;
        for (const AsyncPtr& a : left) {
            if (a->count == 1) {
                cta->error =
                    "block ends with " + name_of(0, a->kind) + " in flight\n" + lines_of(a->site);
                return;
            }
            finish(a);
        }
    }
    for (const auto& [address, bar] : cta->mbarriers)
        if (cta->error.empty() && bar.bytes != 0)
            cta->error = "mbarrier at " + std::to_string(address) + " ends with " +
                         std::to_string(bar.bytes) + " bytes outstanding";
}

}  // namespace

// ---- errors ------------------------------------------------------------------------------------

uint32_t site_of(void* return_address) {
    static const uintptr_t base = [] {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&thread_main), &info);
        return reinterpret_cast<uintptr_t>(info.dli_fbase);
    }();
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - base);
}

// The source lines of a site, with those of the functions that it is inlined into, up to the
// kernel.
std::string lines_of(uint32_t site) {
    static std::map<uint32_t, std::string> known;
    if (auto found = known.find(site); found != known.end()) return found->second;
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&thread_main), &info);
    char command[600];
    std::snprintf(command, sizeof command, "addr2line -C -i -s -e '%s' 0x%x", info.dli_fname,
                  site - 1);
    std::string text;
    if (FILE* pipe = popen(command, "r")) {
        char line[256];
        while (std::fgets(line, sizeof line, pipe))
            if (!std::strstr(line, "emulator.h:") && !std::strstr(line, "invoke.h:") &&
                !std::strstr(line, "std_function.h:"))
                text += std::string("      at ") + line;
        pclose(pipe);
    }
    if (!text.empty()) text.pop_back();
    return known[site] = text;
}

void fail(uint32_t site, const std::string& what) {
    if (cta->error.empty()) {
        cta->error = "block " + std::to_string(cta->block);
        if (cta->current) cta->error += ", thread " + std::to_string(cta->current->index);
        cta->error += ": " + what + "\n" + lines_of(site);
    }
    if (cta->current) leave();
    throw cta->error;  // an asynchronous operation, run by the scheduler
}

std::string name_of(int slot, Kind kind) {
    static const char* const names[] = {"thread ",     "a tensor load",    "a tensor store",
                                        "a bulk load", "a bulk reduction", "a cp.async",
                                        "a wgmma"};
    return names[static_cast<int>(kind)] + (kind == Kind::THREAD ? std::to_string(slot) : "");
}

// ---- clocks ------------------------------------------------------------------------------------

void Release::add(const Clock& clock) {
    if (clock.get() == merged) return;
    for (int i = 0; i < SLOTS; i++) value.at[i] = std::max(value.at[i], clock->at[i]);
    merged = clock.get();
    keep = clock;
}
void Release::add(int slot, uint32_t epoch) { value.at[slot] = std::max(value.at[slot], epoch); }
Clock Release::take() {
    Clock result = std::make_shared<ClockValue>(value);
    value = {};
    merged = nullptr;
    keep.reset();
    return result;
}

Clock join(const Clock& a, const Clock& b) {
    if (a == b) return a;
    static Clock last_a, last_b, last;  // whole warpgroups ask the same question
    if (a == last_a && b == last_b) return last;
    auto value = std::make_shared<ClockValue>();
    bool new_in_b = false;
    for (int i = 0; i < SLOTS; i++) {
        value->at[i] = std::max(a->at[i], b->at[i]);
        new_in_b |= b->at[i] > a->at[i];
    }
    last_a = a;
    last_b = b;
    return last = new_in_b ? Clock(value) : a;
}

void acquire(Thread& t, const Clock& clock) { t.clock = join(t.clock, clock); }

Clock clock_of(const Thread& t) {
    auto value = std::make_shared<ClockValue>(*t.clock);
    value->at[t.index] = t.epoch;
    return value;
}

Accessor self(uint32_t site) {
    const Thread& t = *cta->current;
    return {t.clock.get(), t.index, t.epoch, site, Kind::THREAD};
}

uint32_t released() { return cta->current->epoch++; }

// ---- blocking and waking -----------------------------------------------------------------------

void block(const char* what, uint32_t site, std::string detail) {
    Thread* t = cta->current;
    t->waiting = what;
    t->site = site;
    t->detail = std::move(detail);
    leave();
}

void wake(Thread* t) {
    cta->ready[t->index / 32].push_back(t);
    cta->ready_count++;
    cta->looks = 0;
}

// A thread that polls a flag is always ready to run and would hide a deadlock, so polls are
// counted.
void yield() {
    constexpr int MANY = 1 << 16;
    if (++cta->looks > MANY)
        fail(SITE,
             "deadlock: this thread waits for a change of global memory, and nobody else "
             "does anything");
    int looks = cta->looks;
    wake(cta->current);
    cta->looks = looks;
    leave();
}

void meet(Meeting& m, int size, Op op, uint64_t key, uint32_t site,
          const std::function<void()>& action) {
    static const char* const names[] = {"shuffle", "syncwarp",    "ldmatrix",     "stmatrix",
                                        "mma",     "wgmma.fence", "wgmma.commit", "wgmma.wait",
                                        "wgmma",   "setmaxnreg"};
    const char* name = names[static_cast<int>(op)];
    if (m.arrived == 0) {
        m.op = op;
        m.key = key;
        m.site = site;
    } else if (m.op != op || m.key != key) {
        fail(site, std::string("threads diverge: this one is at ") + name + " and others at " +
                       names[static_cast<int>(m.op)] + " with other operands or elsewhere\n" +
                       lines_of(m.site));
    }
    if (++m.arrived < size) {
        block(name, site);
        return;
    }
    m.arrived = 0;
    action();
    Thread* me = cta->current;
    int first = me->index / size * size;
    for (int i = first; i < first + size; i++)
        if (i != me->index) wake(&cta->threads[i]);
}

// ---- asynchronous operations -------------------------------------------------------------------

AsyncPtr start(Kind kind, uint32_t site, const Clock& clock, int count) {
    auto a = std::make_shared<Async>();
    a->kind = kind;
    a->thread = cta->current->index;
    a->site = site;
    int agent = cta->next_agent++ % AGENTS;
    a->slot = MAX_THREADS + agent;
    a->epoch = ++cta->agent_epochs[agent];
    a->clock = clock;
    a->count = count;
    return a;
}

void submit(const AsyncPtr& a) {
    cta->pending.push_back(a);
    if (cta->haste == 0) finish(a);
}

void run_step(const AsyncPtr& pointer) {
    AsyncPtr a = pointer;  // the list it may be in changes below
    cta->looks = 0;
    a->steps[a->next](*a);
    a->next++;
    if (a->done())
        cta->pending.erase(std::remove(cta->pending.begin(), cta->pending.end(), a),
                           cta->pending.end());
}

void finish(const AsyncPtr& a) {
    while (!a->done()) run_step(a);
}

// ---- launching ---------------------------------------------------------------------------------

uint32_t Cta::draw(uint32_t below) {  // splitmix64
    random += 0x9E3779B97F4A7C15;
    uint64_t z = random;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<uint32_t>((z ^ (z >> 31)) % below);
}

int thread_index() { return cta->current->index; }
int block_index() { return cta->block; }
int grid_size() { return cta->how.grid; }

std::string launch(const Launch& how, const std::function<void()>& kernel) {
    if (how.shared_bytes > SHARED_LIMIT)
        return "the kernel asks for " + std::to_string(how.shared_bytes) +
               " bytes of shared memory; a CTA has " + std::to_string(SHARED_LIMIT);
    if (how.threads % 32 != 0 || how.threads > MAX_THREADS || how.threads <= 0)
        return std::to_string(how.threads) + " threads: a multiple of 32 up to 512 is accepted";
    kernel_body = &kernel;
    static std::vector<Cell> cells;
    auto nothing = std::make_shared<ClockValue>();
    for (int b = 0; b < how.grid; b++) {
        Cta one;
        cta = &one;
        one.how = how;
        one.block = b;
        one.random = how.seed * 1000003 + b;
        one.haste = static_cast<int>(how.seed % 3);
        one.shared.assign(how.shared_bytes, 0xff);  // NaN in every format
        one.cells.swap(cells);
        one.cells.assign(how.shared_bytes / 4 + 1, {});
        one.threads.resize(how.threads);
        one.warps.resize(how.threads / 32);
        one.warpgroups.resize(how.threads / 128);
        one.matrix.resize(how.threads / 128);
        one.ready.resize(how.threads / 32);
        one.alive = how.threads;
        int registers = std::min(255, 65536 / how.threads / 8 * 8);
        for (Warpgroup& w : one.matrix) w.registers = registers;
        for (int i = 0; i < how.threads; i++) {
            one.threads[i].index = i;
            one.threads[i].clock = nothing;
            prepare(one.threads[i]);
            wake(&one.threads[i]);
        }
        try {
            run_cta();
            check_end();
        } catch (const std::string&) {  // thrown by fail(), which left it in error
        }
        one.cells.swap(cells);
        cta = nullptr;
        if (!one.error.empty()) return one.error;
    }
    return "";
}

}  // namespace fastattn::emulator
