// The CPU kernels of one instruction set in a program without torch, for compilers and platforms
// that torch is not here for. Run by tests/support/kernels_alone.py, which names KERNELS:
//   facts      prints what csrc/cpu/machine.cpp tells
//   attention  reads Attention and its tensors; writes out, lse, dq, dk and dv
//   rotate     reads Rotation and its tensors; writes the rotated rows
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/params.h"
#include "cpu/schedule.h"

using namespace fastattn;
using namespace fastattn::cpu;

extern "C" const char* fastattn_cpu_facts();
extern "C" const char* fastattn_cpu_isa();

struct Attention {
    int64_t dtype, heads, kv_heads, q_len, kv_len, head_dim, v_dim, left, right;
    int64_t has_bias, has_slopes, dropout, seed, offset;
    double scale, softcap, dropout_p;
};

struct Rotation {
    int64_t dtype, length, dim, interleaved;
};

static void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(2);
}
static void write(const std::vector<char>& x) { std::fwrite(x.data(), 1, x.size(), stdout); }

// [heads, rows, columns], dense, in memory of its own, which `keep` owns.
static Tensor4 tensor(std::vector<std::vector<char>>& keep, Dtype dtype, int64_t heads,
                      int64_t rows, int64_t columns, bool given) {
    keep.emplace_back(heads * rows * columns * size_of(dtype));
    if (given) read(keep.back().data(), keep.back().size());
    Tensor4 t;
    t.data = keep.back().data();
    t.dtype = dtype;
    t.head = rows * columns;
    t.row = columns;
    return t;
}

static void attention() {
    Attention a;
    read(&a, sizeof a);
    const Dtype dtype = static_cast<Dtype>(a.dtype),
                wide = dtype == Dtype::F64 ? dtype : Dtype::F32;
    const Kernels& kernels = dtype == Dtype::F64 ? KERNELS->f64 : KERNELS->f32;
    std::vector<std::vector<char>> keep;
    keep.reserve(16);
    std::vector<Segment> segments(1);
    segments[0].band = {static_cast<int>(a.left), static_cast<int>(a.right),
                        static_cast<int>(a.kv_len - a.q_len), static_cast<int>(a.q_len),
                        static_cast<int>(a.kv_len)};
    Params p{};
    p.scale = a.scale;
    p.softcap = a.softcap;
    p.dropout = a.dropout != 0;
    p.dropout_key = DropoutKey::make(a.seed, a.offset, a.dropout_p);
    p.total_heads = a.heads;
    p.dtype = dtype;
    p.heads = a.heads;
    p.kv_heads = a.kv_heads;
    p.head_dim = a.head_dim;
    p.v_dim = a.v_dim;
    p.segments = segments.data();
    p.q = tensor(keep, dtype, a.heads, a.q_len, a.head_dim, true);
    p.k = tensor(keep, dtype, a.kv_heads, a.kv_len, a.head_dim, true);
    p.v = tensor(keep, dtype, a.kv_heads, a.kv_len, a.v_dim, true);
    p.dout = tensor(keep, dtype, a.heads, a.q_len, a.v_dim, true);
    if (a.has_bias) p.bias = tensor(keep, dtype, a.heads, a.q_len, a.kv_len, true);
    if (a.has_slopes)
        p.slopes =
            reinterpret_cast<const float*>(tensor(keep, Dtype::F32, 1, 1, a.heads, true).data);
    size_t results = keep.size();
    p.out = tensor(keep, dtype, a.heads, a.q_len, a.v_dim, false);
    p.lse = tensor(keep, wide, a.heads, a.q_len, 1, false);
    p.dq = tensor(keep, dtype, a.heads, a.q_len, a.head_dim, false);
    p.dk = tensor(keep, dtype, a.kv_heads, a.kv_len, a.head_dim, false);
    p.dv = tensor(keep, dtype, a.kv_heads, a.kv_len, a.v_dim, false);

    p.call = 1;
    ForwardPlan plan = plan_forward(segments, p, kernels.block_q, 1, 1);
    for (const ForwardItem& item : plan.items) kernels.forward(p, item, {});
    p.call = 2;
    for (int head = 0; head < p.kv_heads; head++)
        kernels.backward(p, {0, head, 0, static_cast<int>(a.q_len), 0, static_cast<int>(a.kv_len),
                             nullptr, nullptr});
    for (size_t i = results; i < keep.size(); i++) write(keep[i]);
}

static void rotate() {
    Rotation r;
    read(&r, sizeof r);
    const Dtype dtype = static_cast<Dtype>(r.dtype),
                wide = dtype == Dtype::F64 ? dtype : Dtype::F32;
    const Kernels& kernels = dtype == Dtype::F64 ? KERNELS->f64 : KERNELS->f32;
    std::vector<std::vector<char>> keep;
    keep.reserve(4);
    RotateCall c{};
    c.dtype = dtype;
    c.batch = c.heads = 1;
    c.length = r.length;
    c.dim = r.dim;
    c.pairs = r.dim / 2;
    c.x_stride[2] = c.out_stride[2] = r.dim;
    c.x = tensor(keep, dtype, 1, r.length, r.dim, true).data;
    c.cos = tensor(keep, wide, 1, r.length, c.pairs, true).data;
    c.sin = tensor(keep, wide, 1, r.length, c.pairs, true).data;
    c.cos_stride = c.sin_stride = c.pairs;
    c.interleaved = r.interleaved != 0;
    c.out = tensor(keep, dtype, 1, r.length, r.dim, false).data;
    kernels.fused.rotate(c, 0, r.length);
    write(keep.back());
}

int main(int, char** words) {
    const std::string what = words[1];
    if (what == "facts") std::printf("%s\n%s\n", fastattn_cpu_facts(), fastattn_cpu_isa());
    if (what == "attention") attention();
    if (what == "rotate") rotate();
}
