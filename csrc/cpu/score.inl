// From raw products to scores: everything that stands between q.k and the softmax, for one panel of
// a tile. A tile is [keys][lanes]: a lane is a query row, so a row's maximum, sum and bounds are
// plain vertical vector operations.
// next: forward.inl
//
// Scores are in base 2: the factor scale * LOG2E is in q (or is applied after the bf16 dot
// product), and to_base2() brings biases there: only -inf masks, and a finite sum stays finite.

// The query rows of a tile, lane by lane.
template <class A> struct Lanes {
    int count;  // in use; the rest, up to `padded`, see no key
    int padded;
    alignas(64) IntOf<A> lo[BLOCK_Q];  // visible keys [lo, hi), in segment coordinates
    alignas(64) IntOf<A> hi[BLOCK_Q];
    alignas(64) A diagonal[BLOCK_Q];  // key on the row's diagonal
    alignas(64) A slope[BLOCK_Q];     // ALiBi, in base 2
    const char* mask[BLOCK_Q];        // at the segment's first key
    const char* bias[BLOCK_Q];
    bool one_mask, one_bias;          // every lane reads the same row (padding masks, for one)
    bool ranged;                      // key ranges: a tile may have keys that no lane sees
    int row[BLOCK_Q], head[BLOCK_Q];  // row of the segment, query head

    Range range(int begin, int end) const {  // of lanes [begin, end)
        Range r{INT32_MAX, 0, INT32_MAX, 0};
        for (int i = begin; i < end; i++) {
            r.begin = imin(r.begin, static_cast<int>(lo[i]));
            r.full_begin = imax(r.full_begin, static_cast<int>(lo[i]));
            r.full_end = imin(r.full_end, static_cast<int>(hi[i]));
            r.end = imax(r.end, static_cast<int>(hi[i]));
        }
        return r;
    }
    // Whether some lane sees one of keys [begin, end).
    bool sees(int begin, int end) const {
        for (int i = 0; i < count; i++)
            if (lo[i] < end && hi[i] > begin) return true;
        return false;
    }
    // How many lanes from `first` on, at most `most`, make one product: each sees a key that those
    // before it see, so some lane sees each key of their range, or they see nothing at all.
    int overlapping(int first, int most) const {
        int end = imin(count, first + most);
        if (!ranged) return end - first;
        Range seen = range(first, first + 1);
        for (int i = first + 1; i < end; i++) {
            bool any = seen.begin < seen.end && lo[i] < hi[i];
            if (any && (lo[i] >= seen.end || hi[i] <= seen.begin)) return i - first;
            seen.begin = imin(seen.begin, static_cast<int>(lo[i]));
            seen.end = imax(seen.end, static_cast<int>(hi[i]));
        }
        return end - first;
    }
};

template <class A> INLINE A slope_in_base2(float slope) {
    double x = slope * LOG2E;
    if (x - x != 0) return A(x);  // infinite or NaN
    return A(x > MAX_SLOPE ? MAX_SLOPE : x < -MAX_SLOPE ? -MAX_SLOPE : x);
}

// Each lane's bounds within its row's key range. A lane that sees nothing widens no range.
template <class A>
static void narrow_lanes(const KeyRanges& ranges, const Segment& s, Lanes<A>& lanes) {
    for (int i = 0; i < lanes.count; i++) {
        int lo = imax(static_cast<int>(lanes.lo[i]), ranges.first(s, lanes.head[i], lanes.row[i]));
        int hi = imin(static_cast<int>(lanes.hi[i]), ranges.past(s, lanes.head[i], lanes.row[i]));
        lanes.lo[i] = lo < hi ? lo : s.band.kv_len;
        lanes.hi[i] = lo < hi ? hi : 0;
    }
}

// Rows [row, row + rows) of `heads` heads from `head` on.
template <class A> static void set_lanes(const Params& p, const Segment& s, int head, int heads,
                                         int row, int rows, Lanes<A>& lanes) {
    lanes.count = heads * rows;
    lanes.padded = round_up_panel<A>(lanes.count);
    int lane = 0;
    for (int h = head; h < head + heads; h++)
        for (int i = row; i < row + rows; i++, lane++) {
            lanes.lo[lane] = s.band.lo(i);
            lanes.hi[lane] = s.band.hi(i);
            lanes.diagonal[lane] = A(i) + A(s.band.offset);
            lanes.row[lane] = i;
            lanes.head[lane] = h;
            if (p.slopes)
                lanes.slope[lane] = slope_in_base2<A>(p.slopes[s.entry * p.slopes_batch + h]);
            if (p.mask.data)
                lanes.mask[lane] = p.mask.bytes_at(s.entry, h, s.row0 + i) + s.key0 * p.mask.col;
            if (p.bias.data)
                lanes.bias[lane] = p.bias.bytes_at(s.entry, h, s.row0 + i) +
                                   s.key0 * p.bias.col * size_of(p.bias.dtype);
        }
    for (; lane < lanes.padded; lane++) {
        lanes.lo[lane] = s.band.kv_len;  // sees nothing, and keeps lo and hi from decreasing
        lanes.hi[lane] = s.band.kv_len;
        lanes.diagonal[lane] = lanes.slope[lane] = 0;
    }
    lanes.ranged = p.key_ranges.given();
    if (lanes.ranged) narrow_lanes(p.key_ranges, s, lanes);
    lanes.one_mask = lanes.one_bias = true;
    for (int i = 1; i < lanes.count; i++) {
        lanes.one_mask &= p.mask.data == nullptr || lanes.mask[i] == lanes.mask[0];
        lanes.one_bias &= p.bias.data == nullptr || lanes.bias[i] == lanes.bias[0];
    }
}

// --- the bool mask ---------------------------------------------------------------------------

enum class Seen { NONE, SOME, ALL };

// What the mask lets through of keys [key, key + n): NONE skips the tile, ALL skips the test.
template <class A>
INLINE Seen mask_summary(const Params& p, const Lanes<A>& lanes, int key, int n) {
    constexpr uint64_t ONES = 0x0101010101010101ull;
    uint64_t any = 0, all = ONES;
    for (int lane = 0; lane < (lanes.one_mask ? 1 : lanes.count); lane++) {
        const char* row = lanes.mask[lane] + key * p.mask.col;
        int j = 0;
        if (p.mask.col == 1)
            for (; j + 8 <= n; j += 8) {
                uint64_t eight;
                __builtin_memcpy(&eight, row + j, 8);
                any |= eight;
                all &= eight;
            }
        for (; j < n; j++) {
            any |= row[j * p.mask.col] ? 1 : 0;
            all &= row[j * p.mask.col] ? ONES : 0;
        }
    }
    return any == 0 ? Seen::NONE : all == ONES ? Seen::ALL : Seen::SOME;
}

// 8x8 bytes: byte i of to[j] = byte j of from[i].
INLINE void transpose_bytes8(const uint64_t* from, uint64_t* to) {
    uint64_t x[8], y[8];
    for (int i = 0; i < 8; i += 2) {
        x[i] = (from[i] & 0x00ff00ff00ff00ffull) | (from[i + 1] & 0x00ff00ff00ff00ffull) << 8;
        x[i + 1] = (from[i] >> 8 & 0x00ff00ff00ff00ffull) | (from[i + 1] & 0xff00ff00ff00ff00ull);
    }
    for (int i = 0; i < 8; i++) {  // pairs of rows 2 apart, units of 2 bytes
        if (i & 2) continue;
        y[i] = (x[i] & 0x0000ffff0000ffffull) | (x[i + 2] & 0x0000ffff0000ffffull) << 16;
        y[i + 2] = (x[i] >> 16 & 0x0000ffff0000ffffull) | (x[i + 2] & 0xffff0000ffff0000ull);
    }
    for (int i = 0; i < 4; i++) {
        to[i] = (y[i] & 0xffffffffull) | y[i + 4] << 32;
        to[i + 4] = y[i] >> 32 | (y[i + 4] & 0xffffffff00000000ull);
    }
}

template <class A> struct Bytes {
    typedef uint8_t V __attribute__((vector_size(LANES<A>)));
};

// s[key][lane] = -inf where the mask is false, for one panel.
template <class A> INLINE void apply_mask(const Params& p, const Lanes<A>& lanes, int panel,
                                          int key, int n, A* s, int64_t ld) {
    constexpr int W = LANES<A>;
    if (lanes.one_mask) {
        const char* row = lanes.mask[0] + key * p.mask.col;
        for (int j = 0; j < n; j++)
            if (!row[j * p.mask.col]) {
                store<A>(s + j * ld, splat(A(NEG_INF)));
                store<A>(s + j * ld + W, splat(A(NEG_INF)));
            }
        return;
    }
    alignas(64) uint8_t seen[BLOCK_KV][imax(8, PANEL<A>)] = {};
    for (int lane = 0; lane < PANEL<A>; lane++) {
        const char* const* rows = lanes.mask + panel * PANEL<A> + lane;
        int left = lanes.count - panel * PANEL<A> - lane;
        if (PANEL<A> >= 8 && p.mask.col == 1 && left >= 8 && lane + 8 <= PANEL<A>) {
            int j = 0;
            for (; j + 8 <= n; j += 8) {
                uint64_t from[8], to[8];
                for (int i = 0; i < 8; i++) __builtin_memcpy(from + i, rows[i] + key + j, 8);
                transpose_bytes8(from, to);
                for (int i = 0; i < 8; i++) __builtin_memcpy(&seen[j + i][lane], to + i, 8);
            }
            for (; j < n; j++)
                for (int i = 0; i < 8; i++) seen[j][lane + i] = rows[i][key + j];
            lane += 7;
        } else if (left > 0) {
            for (int j = 0; j < n; j++) seen[j][lane] = rows[0][(key + j) * p.mask.col];
        }
    }
    for (int j = 0; j < n; j++)
        for (int v = 0; v < 2; v++) {
            typename Bytes<A>::V bytes;
            __builtin_memcpy(&bytes, &seen[j][v * W], W);
            VecI<A> visible = __builtin_convertvector(bytes, VecI<A>) != 0;
            A* x = s + j * ld + v * W;
            store<A>(x, visible ? load<A>(x) : splat(A(NEG_INF)));
        }
}

// --- softcap, bias, ALiBi, bounds ------------------------------------------------------------

// s = cap * tanh(s / cap); `slope`, if wanted, receives the derivative 1 - tanh^2.
template <class A> INLINE void apply_softcap(A cap, int n, A* s, int64_t ld, A* slope) {
    A inverse = 1 / cap;
    for (int j = 0; j < n; j++)
        for (int v = 0; v < 2; v++) {
            A* x = s + j * ld + v * LANES<A>;
            Vec<A> t = vtanh(load<A>(x) * inverse);
            store<A>(x, t * cap);
            if (slope) store<A>(slope + j * ld + v * LANES<A>, 1 - t * t);
        }
}

template <class A> INLINE A bias_at(Dtype dtype, const char* p) {
    switch (dtype) {
        case Dtype::F32:
            return A(*reinterpret_cast<const float*>(p));
        case Dtype::F64: {  // finite stays finite
            double x = *reinterpret_cast<const double*>(p);
            if (sizeof(A) == 8 || x - x != 0) return A(x);
            constexpr double MAX = 0x1.fffffep127;
            return A(x > MAX ? MAX : x < -MAX ? -MAX : x);
        }
        case Dtype::BF16:
            return A(to_float(*reinterpret_cast<const bf16*>(p)));
        default:
            return A(to_float(*reinterpret_cast<const f16*>(p)));
    }
}

template <class A> INLINE void apply_bias(const Params& p, const Lanes<A>& lanes, int panel,
                                          int key, int n, A* s, int64_t ld) {
    constexpr int W = LANES<A>;
    int64_t step = p.bias.col * size_of(p.bias.dtype);
    if (lanes.one_bias) {
        for (int j = 0; j < n; j++) {
            A b = to_base2<A>(bias_at<A>(p.bias.dtype, lanes.bias[0] + (key + j) * step));
            store<A>(s + j * ld, load<A>(s + j * ld) + b);
            store<A>(s + j * ld + W, load<A>(s + j * ld + W) + b);
        }
        return;
    }
    // Eight rows at a time, turned into lanes; where they are not plain A, converted first.
    constexpr int STEP = imin(8, PANEL<A>);
    alignas(64) A converted[STEP][BLOCK_KV];
    bool in_place = p.bias.col == 1 && (sizeof(A) == 8 ? Dtype::F64 : Dtype::F32) == p.bias.dtype;
    for (int lane = 0; lane < PANEL<A>; lane += STEP) {
        int first = panel * PANEL<A> + lane, count = imin(STEP, lanes.count - first);
        if (!in_place)
            for (int i = 0; i < count; i++) {
                const char* from = lanes.bias[first + i] + key * step;
                if (p.bias.col == 1 && p.bias.dtype == p.dtype)
                    with_type<A>(p.dtype, [&](auto* type) {
                        using T = std::remove_pointer_t<decltype(type)>;
                        convert_row(reinterpret_cast<const T*>(from), converted[i], n);
                    });
                else
                    for (int j = 0; j < n; j++)
                        converted[i][j] = bias_at<A>(p.bias.dtype, from + j * step);
            }
        auto row = [&](int i) {
            return in_place ? reinterpret_cast<const A*>(lanes.bias[first + i]) + key
                            : converted[i];
        };
        if (count > 0)
            transpose_mapped<true>(row, count, n, s + lane, ld,
                                   [](auto x) INLINE_LAMBDA { return to_base2<A>(x); });
    }
}

template <class A>
INLINE void apply_alibi(const Lanes<A>& lanes, int panel, int key, int n, A* s, int64_t ld) {
    for (int v = 0; v < 2; v++) {
        int lane = panel * PANEL<A> + v * LANES<A>;
        Vec<A> diagonal = load<A>(lanes.diagonal + lane), slope = load<A>(lanes.slope + lane);
        for (int j = 0; j < n; j++) {
            Vec<A> distance = diagonal - A(key + j);
            distance = distance < 0 ? -distance : distance;
            A* x = s + j * ld + v * LANES<A>;
            store<A>(x, load<A>(x) - slope * distance);
        }
    }
}

template <class A>
INLINE void apply_bounds(const Lanes<A>& lanes, int panel, int key, int n, A* s, int64_t ld) {
    for (int v = 0; v < 2; v++) {
        int lane = panel * PANEL<A> + v * LANES<A>;
        VecI<A> lo = load_int<A>(lanes.lo + lane), hi = load_int<A>(lanes.hi + lane);
        for (int j = 0; j < n; j++) {
            VecI<A> at = splat_int<A>(key + j);
            A* x = s + j * ld + v * LANES<A>;
            Vec<A> inside = at >= lo ? load<A>(x) : splat(A(NEG_INF));
            store<A>(x, at < hi ? inside : splat(A(NEG_INF)));
        }
    }
}

// Everything, for keys [key, key + n) of one panel. `edge`: some lane does not see all of them.
template <class A> INLINE void finish_scores(const Params& p, const Lanes<A>& lanes, int panel,
                                             int key, int n, bool masked, bool edge, A* s,
                                             int64_t ld, A* softcap_slope) {
    if (p.softcap > 0) apply_softcap<A>(A(p.softcap * LOG2E), n, s, ld, softcap_slope);
    if (p.bias.data) apply_bias<A>(p, lanes, panel, key, n, s, ld);
    if (p.slopes) apply_alibi<A>(lanes, panel, key, n, s, ld);
    if (masked) apply_mask<A>(p, lanes, panel, key, n, s, ld);
    if (edge) apply_bounds<A>(lanes, panel, key, n, s, ld);
}

// --- dropout ----------------------------------------------------------------------------------

typedef uint32_t Philox8 __attribute__((vector_size(32)));
typedef uint64_t Wide4 __attribute__((vector_size(32)));

// The two halves of eight 64-bit products. AVX2 is spelled out: the compiler makes three products
// of each and no blends (1.8 ns a score of dropout against 0.8).
INLINE void multiply(Philox8 x, uint32_t by, Philox8& high, Philox8& low) {
#if defined(FASTATTN_AVX2)
    __m256i factor = _mm256_set1_epi32(static_cast<int>(by));
    __m256i even = _mm256_mul_epu32((__m256i)x, factor);
    __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), factor);
    low = (Philox8)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high = (Philox8)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    Wide4 even = ((Wide4)x & 0xffffffffull) * by, odd = ((Wide4)x >> 32) * by;
    low = (Philox8)((even & 0xffffffffull) | (odd << 32));
    high = (Philox8)((even >> 32) | (odd & 0xffffffff00000000ull));
#endif
}

// The rounds' keys, one vector each: a tile makes them once.
struct PhiloxKeys {
    Philox8 k0[PHILOX_ROUNDS], k1[PHILOX_ROUNDS];

    INLINE_MEMBER explicit PhiloxKeys(const DropoutKey& key) {
        for (int round = 0; round < PHILOX_ROUNDS; round++) {
            k0[round] = Philox8{} + (key.key0 + round * PHILOX_KEY_A);
            k1[round] = Philox8{} + (key.key1 + round * PHILOX_KEY_B);
        }
    }
};

// The four words of philox.h for eight consecutive values of counter 0.
INLINE void philox8(const PhiloxKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                    Philox8 w[4]) {
    constexpr Philox8 IOTA = {0, 1, 2, 3, 4, 5, 6, 7};
    w[0] = IOTA + c0;
    w[1] = Philox8{} + c1;
    w[2] = Philox8{} + c2;
    w[3] = Philox8{} + c3;
#pragma GCC unroll 10
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        Philox8 high0, low0, high2, low2;
        multiply(w[0], PHILOX_A, high0, low0);
        multiply(w[2], PHILOX_B, high2, low2);
        w[0] = high2 ^ w[1] ^ keys.k0[round];
        w[2] = high0 ^ w[3] ^ keys.k1[round];
        w[1] = low2;
        w[3] = low0;
    }
}

constexpr int DROPOUT_LD = BLOCK_Q + 32;  // lanes and keys widened to whole blocks of 16
constexpr int DROPOUT_ROWS = BLOCK_KV + 32;
typedef float (*DropoutTile)[DROPOUT_LD];

// Fills keep[j - j16][i - i16] = 0 or 1 for logical rows [i, i + rows) and keys [j, j + n), where
// i16, j16 are i, j rounded down to 16, and returns the tile's first element.
INLINE const float* dropout_block(const DropoutKey& key, uint32_t bh, int i, int rows, int j, int n,
                                  DropoutTile keep) {
    int i16 = i / 16 * 16, j16 = j / 16 * 16;
    PhiloxKeys keys(key);
    Philox8 threshold = Philox8{} + key.threshold;
    for (int jj = j16; jj < j + n; jj += 16)
        for (int column = 0; column < 4; column++)
            for (int ii = i16; ii < i + rows; ii += 16) {
                Philox8 w[4];
                philox8(keys, philox_row(ii), philox_column(jj) + column, bh, key.counter3, w);
                for (int word = 0; word < 4; word++)
                    for (int half = 0; half < 2; half++) {
                        Philox8 bits = half ? w[word] >> 16 : w[word] & 0xffff;
                        Float8 z = bits < threshold ? Float8{} + 1.0f : Float8{};
                        float* to = &keep[jj - j16 + 8 * (word & 1) + 2 * column + half]
                                         [ii - i16 + 8 * (word >> 1)];
                        *reinterpret_cast<Float8Unaligned*>(to) = z;
                    }
            }
    return &keep[j - j16][i - i16];
}

// The tile's factors as [key][lane], DROPOUT_LD apart. One head's lanes are used where they were
// made; those of several heads are gathered in `gathered`.
template <class A> INLINE const float* dropout_tile(const Params& p, const Segment& s,
                                                    const Lanes<A>& lanes, int key, int n,
                                                    DropoutTile scratch, DropoutTile gathered) {
    for (int lane = 0; lane < lanes.count;) {
        int rows = 1;
        while (lane + rows < lanes.count && lanes.head[lane + rows] == lanes.head[lane]) rows++;
        uint32_t bh = s.entry * p.total_heads + p.first_head + lanes.head[lane];
        const float* from = dropout_block(p.dropout_key, bh, s.row0 + lanes.row[lane], rows,
                                          s.key0 + key, n, scratch);
        if (rows == lanes.count) return from;
        for (int j = 0; j < n; j++)
            for (int i = 0; i < rows; i++) gathered[j][lane + i] = from[j * DROPOUT_LD + i];
        lane += rows;
    }
    return gathered[0];
}

template <class A> INLINE Vec<A> load_dropout(const float* z) {
    Vec<A> x = {};
    if constexpr (sizeof(A) == 4)
        x = load<A>(z);
    else
        for (int i = 0; i < LANES<A>; i++) x[i] = z[i];
    return x;
}
