// Times variants of the AVX2 kernels against each other and against the core's FMA peak. They run
// interleaved and are measured in the CPU time of one thread, so that a busy machine affects all
// alike. Run by tune.py:
//   tune forward|backward|jvp|jvp_bwd|all full|quick NAME=LIBRARY ...
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include "cpu/params.h"
#include "cpu/schedule.h"

using namespace fastattn;
using namespace fastattn::cpu;

static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// GFLOP/s of 12 independent chains of 8-wide FMAs: the core's peak at this moment.
__attribute__((target("avx2,fma"), noinline)) static double peak() {
    constexpr int STEPS = 200000;
    // What a kernel left in the registers may be subnormal, which takes a hundred times as long.
    asm volatile("vzeroall" ::
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    double start = now();
    for (int k = 0; k < STEPS; k++)
        asm volatile(
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm0\n vfmadd231ps %%ymm14, %%ymm15, %%ymm1\n"
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm2\n vfmadd231ps %%ymm14, %%ymm15, %%ymm3\n"
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm4\n vfmadd231ps %%ymm14, %%ymm15, %%ymm5\n"
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm6\n vfmadd231ps %%ymm14, %%ymm15, %%ymm7\n"
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm8\n vfmadd231ps %%ymm14, %%ymm15, %%ymm9\n"
            "vfmadd231ps %%ymm14, %%ymm15, %%ymm10\n vfmadd231ps %%ymm14, %%ymm15, %%ymm11\n" ::
                : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                  "xmm10", "xmm11");
    return STEPS * 12.0 * 16 / (now() - start) * 1e-9;
}

static double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

struct Shape {
    int heads, length, dim;
    bool causal;
};

struct Variant {
    std::string name;
    const Kernels* kernels;
};

// One shape's tensors, [heads, length, dim] each, and its Params.
struct Problem {
    Shape shape;
    std::vector<std::vector<float>> memory;
    std::vector<Segment> segments{1};
    Params p{};

    explicit Problem(const Shape& s) : shape(s) {
        int64_t plane = int64_t(s.length) * s.dim, all = s.heads * plane;
        segments[0].band = {-1, s.causal ? 0 : -1, 0, s.length, s.length};
        p.scale = 1 / std::sqrt(double(s.dim));
        p.heads = p.kv_heads = s.heads;
        p.head_dim = p.v_dim = s.dim;
        p.segments = segments.data();
        for (Tensor4* t : {&p.q, &p.k, &p.v, &p.out, &p.dout, &p.dq, &p.dk, &p.dv, &p.lse, &p.tq,
                           &p.tk, &p.tv, &p.tout, &p.tlse}) {
            memory.emplace_back(all);
            for (float& x : memory.back()) x = float(drand48() * 2 - 1);
            bool number = t == &p.lse || t == &p.tlse;
            t->data = reinterpret_cast<char*>(memory.back().data());
            t->head = number ? s.length : plane;
            t->row = number ? 1 : s.dim;
        }
    }

    void new_call() {  // or a thread would reuse the panels that it packed for the last call
        static uint64_t calls = 0;
        p.call = ++calls;
    }

    template <class Run> double rows(const Kernels& kernels, Run run) {
        new_call();
        ForwardPlan plan =
            plan_forward(segments, p, kernels.block_q, 1, sizeof(float) * (shape.dim + 2));
        double start = now();
        for (const ForwardItem& item : plan.items) run(item);
        return now() - start;
    }

    double heads(void (*run)(const Params&, const BackwardItem&)) {
        new_call();
        double start = now();
        for (int head = 0; head < shape.heads; head++)
            run(p, {0, head, 0, shape.length, 0, shape.length, nullptr, nullptr});
        return now() - start;
    }

    double pairs() const {
        return shape.causal ? shape.length * (shape.length + 1.0) / 2
                            : double(shape.length) * shape.length;
    }
};

struct Pass {
    const char* name;
    int products;
    double (*seconds)(Problem&, const Kernels&);
};
static const Pass PASSES[] = {
    {"forward", 2,
     [](Problem& x, const Kernels& k) {
         return x.rows(k, [&](const ForwardItem& item) { k.forward(x.p, item, {}); });
     }},
    {"backward", 5, [](Problem& x, const Kernels& k) { return x.heads(k.backward); }},
    {"jvp", 6,
     [](Problem& x, const Kernels& k) {
         return x.rows(k, [&](const ForwardItem& item) { k.jvp(x.p, item); });
     }},
    {"jvp_bwd", 10, [](Problem& x, const Kernels& k) { return x.heads(k.jvp_bwd); }},
};

// Prints a line: the first variant's share of the peak, and the speed of the others relative to it.
static void race(Problem& problem, const std::vector<Variant>& variants, const Pass& pass,
                 int rounds) {
    const Shape& shape = problem.shape;
    const double flops = 2 * pass.products * problem.pairs() * shape.heads * shape.dim;
    std::vector<double> of_peak;
    std::vector<std::vector<double>> ratios(variants.size());
    for (int round = 0; round < rounds; round++) {
        double roof = peak(), first = 0;
        for (size_t i = 0; i < variants.size(); i++) {
            double seconds = pass.seconds(problem, *variants[i].kernels);
            if (i == 0) of_peak.push_back(flops / seconds * 1e-9 / roof);
            if (i == 0) first = seconds;
            ratios[i].push_back(first / seconds);
        }
    }
    std::printf("%-8s S %-5d D %-4d %-7s %3.0f %% of peak", pass.name, shape.length, shape.dim,
                shape.causal ? "causal" : "full", 100 * median(of_peak));
    for (size_t i = 1; i < variants.size(); i++)
        std::printf("   %s x%.3f", variants[i].name.c_str(), median(ratios[i]));
    std::printf("\n");
    std::fflush(stdout);
}

int main(int count, char** words) {
    const std::string mode = words[1];
    const bool quick = std::string(words[2]) == "quick";
    std::vector<Variant> variants;
    for (int i = 3; i < count; i++) {
        std::string word = words[i];
        size_t equals = word.find('=');
        void* library = dlopen(word.substr(equals + 1).c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return std::fprintf(stderr, "%s\n", dlerror()), 1;
        void* symbol = dlsym(library, "_ZN8fastattn3cpu12avx2_kernelsE");
        variants.push_back(
            {word.substr(0, equals), &(*static_cast<const IsaKernels* const*>(symbol))->f32});
    }
    std::vector<Shape> shapes{{64, 64, 64, false}};
    if (!quick)
        shapes = {{8, 512, 64, false}, {2, 1024, 64, false}, {1, 2048, 64, false},
                  {8, 512, 64, true},  {1, 2048, 64, true},  {2, 1024, 128, false},
                  {4, 512, 32, false}, {64, 64, 64, false}};
    const int rounds = quick ? 1 : 15;
    for (const Shape& shape : shapes) {
        Problem problem(shape);
        for (const Pass& pass : {PASSES[0], PASSES[2]})  // what the backward passes read
            pass.seconds(problem, *variants[0].kernels);
        for (const Pass& pass : PASSES)
            if (mode == pass.name || mode == "all") race(problem, variants, pass, rounds);
    }
}
