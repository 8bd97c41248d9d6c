// What one emulated CTA is made of. next: scheduler.cpp
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace fastattn::emulator {

constexpr int MAX_THREADS = 512, AGENTS = 64, SLOTS = MAX_THREADS + AGENTS;
constexpr int SHARED_LIMIT = 232448, SHARED_BASE = 1024;  // 227 KB; addresses start at 1024

// ---- happens-before: vector clocks over threads and asynchronous operations (agents) -----------

struct ClockValue {
    uint32_t at[SLOTS] = {};
};
using Clock = std::shared_ptr<const ClockValue>;  // shared by all threads that met at a barrier

// A set of events that someone later waits for.
struct Release {
    ClockValue value;
    const ClockValue* merged = nullptr;  // the last one added, so that it is not added again
    Clock keep;

    void add(const Clock& clock);
    void add(int slot, uint32_t epoch);
    Clock take();  // returns what was added, and starts again with nothing
};
Clock join(const Clock& a, const Clock& b);

// What accesses memory: a thread, or a kind of asynchronous operation.
enum class Kind : uint8_t {
    THREAD,
    TENSOR_LOAD,
    TENSOR_STORE,
    BULK_LOAD,
    BULK_REDUCTION,
    CP_ASYNC,
    WGMMA
};

// One access to four bytes of shared memory. site: the address of the calling instruction, from the
// start of this library.
struct Access {
    uint32_t epoch = 0, site = 0;
    uint16_t slot = 0;
    Kind kind = Kind::THREAD;
};
struct Cell {
    Access write, reads[3];
};

// An access being made: by a thread, with its clock, or by an asynchronous operation, with the
// clock of its issue.
struct Accessor {
    const ClockValue* clock;
    int slot;
    uint32_t epoch, site;
    Kind kind;
};

// ---- asynchronous operations -------------------------------------------------------------------

struct Async {
    Kind kind;
    int thread;  // the issuer
    uint32_t site;
    int slot;  // agent
    uint32_t epoch;
    Clock clock;                           // of the issue, the issuer's own epoch included
    std::function<void(Async&)> steps[2];  // to be run in order, each at a moment of its own
    int next = 0, count = 1;
    bool done() const { return next == count; }
    Accessor accessor() const { return {clock.get(), slot, epoch, site, kind}; }
};
using AsyncPtr = std::shared_ptr<Async>;

struct Group {  // bulk or cp.async: operations of one thread, committed together
    std::vector<AsyncPtr> operations;
    bool read = false;  // waited for as far as shared memory goes
};

struct Multiply {  // one wgmma in flight
    Wgmma call;
    float* d[128];
    const uint32_t* a[128];
    std::vector<uint32_t> a_values;           // at issue: must be the same at completion
    std::shared_ptr<std::vector<float>> sum;  // [64 x n], shared along a chain on one accumulator
    AsyncPtr async;
    int group = -1;  // number of its commit group, -1 until committed
};

// ---- threads and where they meet ---------------------------------------------------------------

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
};

struct Thread {
    Fiber fiber;
    int index = 0;
    Clock clock;
    uint32_t epoch = 1;
    std::vector<uint32_t> fences;  // epochs of this thread's fence.proxy.async
    bool exited = false;
    const char* waiting = nullptr;  // what it is blocked in
    uint32_t site = 0;              // and where
    std::string detail;
    Group bulk, copies;  // not committed yet
    std::deque<Group> bulk_groups, copy_groups;
};

struct Meeting {  // a warp or warpgroup at an .aligned instruction
    int arrived = 0;
    Op op{};
    uint64_t key = 0;  // immediate operands: must agree
    uint32_t site = 0;
    uint32_t in[128], out[128];
    uint32_t values[128][4];
    void* pointers[128];
    const void* sources[128];
    uint64_t a = 0, b = 0;
};

struct NamedBarrier {
    int expected = 0, arrived = 0;
    std::vector<Thread*> waiting;
    Release release;
};

struct Mbarrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    int owner = 0;
    uint32_t init_epoch = 0;
    bool fenced = false;
    Release release;
    Clock completed;
    std::vector<Thread*> waiting;
};

struct Warpgroup {
    std::deque<Multiply> queue;
    int committed = 0;    // groups so far
    bool fenced = false;  // wgmma.fence since the last wait
    int registers = 0;
};

struct Cta {
    Launch how;
    int block = 0;
    uint64_t random = 0;
    int haste = 0;  // asynchronous operations are done 0 at issue, 1 as late as allowed, 2 randomly
    std::vector<uint8_t> shared;
    std::vector<Cell> cells;
    std::vector<Thread> threads;
    std::vector<Meeting> warps, warpgroups;
    std::vector<Warpgroup> matrix;
    NamedBarrier named[16];
    std::unordered_map<uint32_t, Mbarrier> mbarriers;
    std::vector<AsyncPtr> pending;
    std::vector<std::vector<Thread*>> ready;  // of each warp
    int ready_count = 0, alive = 0;
    int looks = 0;  // reads of flags in global memory, by pause(), since anything else happened
    uint32_t agent_epochs[AGENTS] = {};
    int next_agent = 0;
    int register_pool = 0;  // what warpgroups gave up
    std::vector<std::pair<Thread*, int>> register_waiters;
    std::string error;
    Fiber main;
    Thread* current = nullptr;

    uint32_t draw(uint32_t below);
};

extern Cta* cta;

// ---- scheduler.cpp -----------------------------------------------------------------------------

[[noreturn]] void fail(uint32_t site, const std::string& what);
void block(const char* what, uint32_t site, std::string detail = "");
void wake(Thread* t);
uint32_t site_of(void* return_address);
std::string lines_of(uint32_t site);
Accessor self(uint32_t site);
uint32_t released();  // the current epoch, which ends here
AsyncPtr start(Kind kind, uint32_t site, const Clock& clock, int count = 1);
void submit(const AsyncPtr& a);  // may run it at once
void run_step(const AsyncPtr& a);
void finish(const AsyncPtr& a);  // all its steps, now
void acquire(Thread& t, const Clock& clock);
Clock clock_of(const Thread& t);
// The last to arrive runs action; all leave together.
void meet(Meeting& m, int size, Op op, uint64_t key, uint32_t site,
          const std::function<void()>& action);
std::string name_of(int slot, Kind kind);

// ---- memory.cpp --------------------------------------------------------------------------------

void check_range(uint32_t address, int bytes, int alignment, uint32_t site, const char* what);
uint8_t* read_cells(uint32_t address, int bytes, const Accessor& who);
uint8_t* write_cells(uint32_t address, int bytes, const Accessor& who);
void check_global(const void* p, size_t bytes, int alignment, uint32_t site, const char* what);
uint32_t swizzled(uint32_t address, Swizzle swizzle);

// ---- matrix.cpp --------------------------------------------------------------------------------

bool run_one_multiply(Warpgroup& w);  // the oldest in flight, if there is one

#define SITE site_of(__builtin_return_address(0))

}  // namespace fastattn::emulator
