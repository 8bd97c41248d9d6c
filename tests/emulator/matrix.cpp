// ldmatrix, stmatrix, mma.sync and wgmma. README.md describes the layouts. next: self_test.cpp
#include <algorithm>
#include <cmath>

#include "state.h"

namespace fastattn::emulator {

namespace {

// A signalling NaN: arithmetic with it changes its bits, so that a use can be told.
float poison() {
    uint32_t bits = 0x7fa0dead;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
bool is_poison(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits == 0x7fa0dead;
}

// Element i of a row, as a float.
float element(const uint8_t* row, int i, Format format) {
    if (format == Format::E4M3) return cuda::widen_e4m3(row[i]);
    uint16_t bits;
    std::memcpy(&bits, row + 2 * i, 2);
    return cuda::widen_bits(bits, format == Format::BF16);
}

}  // namespace

// ---- matrices of 8 x 8 in a warp ---------------------------------------------------------------

void ldmatrix(uint32_t* r, uint32_t row, bool transpose) {
    uint32_t site = SITE;
    int lane = cta->current->index % 32;
    Meeting& m = cta->warps[cta->current->index / 32];
    check_range(row, 16, 16, site, "ldmatrix");
    uint16_t mine[8];
    std::memcpy(mine, read_cells(row, 16, self(site)), 16);
    std::memcpy(m.values[lane], mine, 16);
    meet(m, 32, Op::LDMATRIX, transpose, site, [&] {
        uint16_t rows[32][8];
        for (int i = 0; i < 32; i++) std::memcpy(rows[i], m.values[i], 16);
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int a = l / 4, b = 2 * (l % 4);
                uint32_t low = transpose ? rows[8 * i + b][a] : rows[8 * i + a][b];
                uint32_t high = transpose ? rows[8 * i + b + 1][a] : rows[8 * i + a][b + 1];
                m.values[l][i] = low | high << 16;
            }
    });
    std::memcpy(r, m.values[lane], 16);
}

void stmatrix(uint32_t row, const uint32_t* r, bool transpose) {
    uint32_t site = SITE;
    int lane = cta->current->index % 32;
    Meeting& m = cta->warps[cta->current->index / 32];
    check_range(row, 16, 16, site, "stmatrix");
    std::memcpy(m.values[lane], r, 16);
    meet(m, 32, Op::STMATRIX, transpose, site, [&] {
        uint16_t rows[32][8];
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int a = l / 4, b = 2 * (l % 4);
                uint16_t low = m.values[l][i] & 0xffff, high = m.values[l][i] >> 16;
                (transpose ? rows[8 * i + b][a] : rows[8 * i + a][b]) = low;
                (transpose ? rows[8 * i + b + 1][a] : rows[8 * i + a][b + 1]) = high;
            }
        for (int i = 0; i < 32; i++) std::memcpy(m.values[i], rows[i], 16);
    });
    std::memcpy(write_cells(row, 16, self(site)), m.values[lane], 16);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16) {
    int lane = cta->current->index % 32;
    Meeting& m = cta->warps[cta->current->index / 32];
    std::memcpy(m.values[lane], a, 16);
    m.in[2 * lane] = b0;
    m.in[2 * lane + 1] = b1;
    m.pointers[lane] = d;
    meet(m, 32, Op::MMA, bf16, SITE, [&] {
        float x[16][16], y[16][8];
        auto half = [&](uint32_t bits) {
            return cuda::widen_bits(static_cast<uint16_t>(bits), bf16);
        };
        for (int l = 0; l < 32; l++)
            for (int e = 0; e < 2; e++) {
                int r = l / 4, c = 2 * (l % 4) + e, shift = 16 * e;
                for (int i = 0; i < 4; i++)
                    x[r + 8 * (i & 1)][c + 8 * (i >> 1)] = half(m.values[l][i] >> shift);
                for (int i = 0; i < 2; i++) y[c + 8 * i][r] = half(m.in[2 * l + i] >> shift);
            }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                int r = l / 4 + 8 * (i / 2), c = 2 * (l % 4) + i % 2;
                float sum = static_cast<float*>(m.pointers[l])[i];
                for (int k = 0; k < 16; k++) sum += x[r][k] * y[k][c];
                static_cast<float*>(m.pointers[l])[i] = sum;
            }
    });
}

// ---- wgmma -------------------------------------------------------------------------------------

namespace {

Warpgroup& my_matrix() { return cta->matrix[cta->current->index / 128]; }
Meeting& my_warpgroup() { return cta->warpgroups[cta->current->index / 128]; }

// A wgmma descriptor, and where it says that 16 bytes lie: of row mn from k on (K-major), or of row
// k from mn on.
struct Descriptor {
    uint32_t start, lead, stride;
    Swizzle swizzle;

    explicit Descriptor(uint64_t bits, uint32_t site)
        : start((bits & 0x3fff) << 4),
          lead(((bits >> 16) & 0x3fff) << 4),
          stride(((bits >> 32) & 0x3fff) << 4) {
        static const Swizzle modes[] = {Swizzle::NONE, Swizzle::B128, Swizzle::B64, Swizzle::B32};
        swizzle = modes[bits >> 62];
        if ((bits >> 49) & 7) fail(site, "descriptor base offsets other than 0 are not emulated");
    }
    int span() const {
        return swizzle == Swizzle::B128  ? 128
               : swizzle == Swizzle::B64 ? 64
               : swizzle == Swizzle::B32 ? 32
                                         : 16;
    }
    uint32_t k_major(int mn, int chunk) const {
        uint32_t along = chunk * (swizzle == Swizzle::NONE ? lead : 16);
        return swizzled(start + mn % 8 * span() + mn / 8 * stride + along, swizzle);
    }
    uint32_t mn_major(int mn, int k) const {
        int wide = span() / 2;  // elements in a panel
        uint32_t panels = mn / wide, inside = mn % wide * 2;
        if (swizzle == Swizzle::NONE) return start + panels * stride + k % 8 * 16 + k / 8 * lead;
        return swizzled(start + panels * lead + inside + k % 8 * span() + k / 8 * stride, swizzle);
    }
};

// [k][count], then the M or N index.
std::vector<float> load_operand(uint64_t bits, int count, bool mn_major, const Wgmma& call,
                                const Accessor& who) {
    Descriptor d(bits, who.site);
    std::vector<float> x(call.k() * count);
    auto chunk = [&](uint32_t address) {
        check_range(address, 16, 16, who.site, "a wgmma operand");
        return read_cells(address, 16, who);
    };
    if (mn_major) {
        for (int k = 0; k < 16; k++)
            for (int mn = 0; mn < count; mn += 8) {
                const uint8_t* p = chunk(d.mn_major(mn, k));
                for (int i = 0; i < 8; i++) x[k * count + mn + i] = element(p, i, call.format);
            }
    } else {
        int wide = call.k() / 2;
        for (int mn = 0; mn < count; mn++)
            for (int c = 0; c < 2; c++) {
                const uint8_t* p = chunk(d.k_major(mn, c));
                for (int i = 0; i < wide; i++)
                    x[(wide * c + i) * count + mn] = element(p, i, call.format);
            }
    }
    return x;
}

std::vector<float> registers_as_a(const Multiply& m) {
    std::vector<float> x(m.call.k() * 64);
    int each = m.call.k() / 8;  // elements of a register
    for (int t = 0; t < 128; t++)
        for (int i = 0; i < 4; i++) {
            uint32_t value = m.a_values[4 * t + i];
            if (std::memcmp(&m.a[t][i], &value, 4) != 0)
                fail(m.async->site, "the A registers of this wgmma were written while it ran");
            int r = t / 32 * 16 + t % 32 / 4 + 8 * (i & 1), k = each * (t % 4 + 4 * (i >> 1));
            for (int e = 0; e < each; e++)
                x[(k + e) * 64 + r] =
                    element(reinterpret_cast<const uint8_t*>(&value), e, m.call.format);
        }
    return x;
}

// Element i of thread t's accumulator: row and column of the [64 x n] result.
int place(int t, int i, int n) {
    int r = t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), c = i / 4 * 8 + 2 * (t % 4) + i % 2;
    return r * n + c;
}

void execute(const Multiply& m) {
    int n = m.call.n;
    Accessor who = m.async->accessor();
    std::vector<float> a = m.call.a_registers
                               ? registers_as_a(m)
                               : load_operand(m.call.a, 64, m.call.a_mn, m.call, who);
    std::vector<float> b = load_operand(m.call.b, n, m.call.b_mn, m.call, who);
    std::vector<float>& sum = *m.sum;
    if (!m.call.accumulate) std::fill(sum.begin(), sum.end(), 0.0f);
    for (int r = 0; r < 64; r++)
        for (int k = 0; k < m.call.k(); k++) {
            float x = a[k * 64 + r];
            const float* row = &b[k * n];
            float* out = &sum[r * n];
            for (int c = 0; c < n; c++) out[c] += x * row[c];
        }
}

void issue(const Wgmma& w, Meeting& meeting, uint32_t site) {
    int first = cta->current->index / 128 * 128;
    Warpgroup& group = cta->matrix[first / 128];
    if (!group.fenced)
        fail(site,
             "no wgmma.fence between the last wgmma.wait_group, after which registers may "
             "change, and this wgmma");
    Multiply m;
    m.call = w;
    Release all;
    for (int t = 0; t < 128; t++) {
        Thread& thread = cta->threads[first + t];
        m.d[t] = static_cast<float*>(meeting.pointers[t]);
        m.a[t] = static_cast<const uint32_t*>(meeting.sources[t]);
        if (w.a_registers) m.a_values.insert(m.a_values.end(), m.a[t], m.a[t] + 4);
        all.add(thread.clock);
        all.add(thread.index, thread.epoch++);
    }
    m.async = start(Kind::WGMMA, site, all.take());
    for (const Multiply& earlier : group.queue)
        if (earlier.sum && earlier.d[0] == m.d[0]) m.sum = earlier.sum;
    if (!m.sum) {
        m.sum = std::make_shared<std::vector<float>>(64 * w.n);
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < w.n / 2; i++) {
                if (w.accumulate) (*m.sum)[place(t, i, w.n)] = m.d[t][i];
                m.d[t][i] = poison();
            }
    }
    group.queue.push_back(std::move(m));
    if (cta->haste == 0)
        while (run_one_multiply(group)) {
        }
}

}  // namespace

bool run_one_multiply(Warpgroup& w) {
    auto at = std::find_if(w.queue.begin(), w.queue.end(),
                           [](const Multiply& m) { return m.sum != nullptr; });
    if (at == w.queue.end()) return false;
    execute(*at);
    bool last = std::none_of(at + 1, w.queue.end(),
                             [&](const Multiply& later) { return later.sum == at->sum; });
    if (last)
        for (int t = 0; t < 128; t++)
            for (int i = 0; i < at->call.n / 2; i++) {
                if (!is_poison(at->d[t][i]))
                    fail(at->async->site, "an accumulator of this wgmma was written while it ran");
                at->d[t][i] = (*at->sum)[place(t, i, at->call.n)];
            }
    at->sum.reset();  // done; it stays in the queue until somebody has waited for it
    return true;
}

void wgmma(const Wgmma& w) {
    uint32_t site = SITE;
    Meeting& m = my_warpgroup();
    int t = cta->current->index % 128;
    m.pointers[t] = w.d;
    m.sources[t] = w.a_registers;
    if (w.format == Format::E4M3 && (w.a_mn || w.b_mn))
        fail(site, "8-bit operands of wgmma are K-major, both");
    uint64_t key = w.a * 31 + w.b * 17 + w.n * 16 + w.accumulate * 8 + w.a_mn * 2 + w.b_mn +
                   static_cast<uint64_t>(w.format) * 4096 + (w.a_registers ? 1ull << 60 : 0);
    meet(m, 128, Op::WGMMA, key, site, [&] { issue(w, m, site); });
}

void wgmma_fence() {
    meet(my_warpgroup(), 128, Op::FENCE, 0, SITE, [] { my_matrix().fenced = true; });
}

void wgmma_commit() {
    meet(my_warpgroup(), 128, Op::COMMIT, 0, SITE, [] {
        Warpgroup& w = my_matrix();
        for (Multiply& m : w.queue)
            if (m.group < 0) m.group = w.committed;
        w.committed++;
    });
}

void wgmma_wait(int groups) {
    meet(my_warpgroup(), 128, Op::WAIT, groups, SITE, [&] {
        Warpgroup& w = my_matrix();
        Release done;
        int first = cta->current->index / 128 * 128;
        auto covered = [&] {
            return !w.queue.empty() && w.queue.front().group >= 0 &&
                   w.queue.front().group < w.committed - groups;
        };
        bool any = false;
        // An accumulator's chain may go on in a later group: its registers are then still in use.
        for (const Multiply& m : w.queue)
            if (m.group >= 0 && m.group < w.committed - groups)
                while (m.sum && run_one_multiply(w)) {
                }
        for (; covered(); w.queue.pop_front()) {
            // What follows is ordered after this wgmma, but not after what other warps did before
            // it: wgmma is no barrier.
            done.add(w.queue.front().async->slot, w.queue.front().async->epoch);
            any = true;
        }
        w.fenced = false;
        if (!any) return;
        Clock clock = done.take();
        for (int t = first; t < first + 128; t++) acquire(cta->threads[t], clock);
    });
}

}  // namespace fastattn::emulator

// ---- formats -----------------------------------------------------------------------------------

namespace fastattn::cuda {

float widen_bits(uint16_t bits, bool bf16) {
    if (bf16) {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return static_cast<float>(h);
}

uint16_t narrow_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t narrow_fp16(float x) {
    _Float16 h = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}

// e4m3 has four exponent bits with bias 7 and three mantissa bits. It has no infinity; 0x7f and
// 0xff are NaN.
float widen_e4m3(uint8_t bits) {
    struct Table {
        float of[256];
        Table() {
            for (int i = 0; i < 128; i++) {
                int exponent = i >> 3, mantissa = i & 7;
                float x = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
                of[i] = i == 0x7f ? NAN : x;
                of[i + 128] = -of[i];
            }
        }
    };
    static const Table table;
    return table.of[bits];
}

// As cvt.rn.satfinite rounds: to nearest, ties to even, and to 448, the largest, from there on.
uint8_t narrow_e4m3(float x) {
    uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return 0x7f;
    float size = std::fabs(x);
    if (size >= 448) return sign | 0x7e;
    int exponent = std::max(-6, std::ilogb(size));
    int steps = static_cast<int>(std::nearbyint(ldexpf(size, 3 - exponent)));  // of 1/8
    return static_cast<uint8_t>(sign | (steps + 8 * (exponent + 6)));
}

}  // namespace fastattn::cuda
