// The second pass: what needs all of the probabilities, which are made again from lse as in the
// backward, with the scores' product alone. Col mass and pooled maps are sums over rows, which the
// items of a head keep apart; topk and the weights themselves are rows of their own.
// next: rows.inl

// --- probabilities ------------------------------------------------------------------------------

// Of BackwardTile, the second pass needs the tile, lse and what makes P.
template <class A>
static void allocate_probabilities(const Params& p, BackwardTile<A>& t, Arena& arena) {
    t.q_transposed = new_transposed<A>(p, BLOCK_Q, p.head_dim, A(p.scale * LOG2E), arena);
    t.p = arena.take<A>(BLOCK_KV * TILE_LD);
    t.buffer = arena.take<A>(8 * p.head_dim);
    t.exact_keys = nullptr;
}

// The tile's rows of q and lse. Where lse is so large that its rounding is felt, the rows' sums are
// made again; lse may count more keys than these (merged calls), of which these have their share.
template <class A> static void load_probabilities(const Params& p, const Segment& s,
                                                  const KeyRows& keys, BackwardTile<A>& t,
                                                  Arena& arena) {
    const QueryTile<A>& tile = t.tile;
    transpose_rows(
        p, [&](int i) { return p.q.bytes_at(s.batch, tile.head[i], s.q_begin + tile.row[i]); },
        tile.count, t.q_transposed, t.buffer);
    auto lse_of = [&](int i) {
        return *p.lse.at<A>(s.batch, tile.head[i], s.q_begin + tile.row[i]);
    };
    t.exact = false;
    for (int i = 0; i < tile.padded; i++) {
        A lse = i < tile.count ? lse_of(i) : A(NEG_INF);
        bool dead = lse == A(NEG_INF);
        t.lse[i] = dead ? -A(NEG_INF) : to_base2<A>(lse);
        t.exact |= !dead && !(t.lse[i] < EXACT_FROM<A> && t.lse[i] > -EXACT_FROM<A>);
        t.inverse_sum[i] = 1;
    }
    if (!t.exact) return;
    row_statistics(p, keys, tile.range(0, tile.count), t, arena);
    constexpr double EPSILON = sizeof(A) == 4 ? 0x1p-23 : 0x1p-52;
    for (int i = 0; i < tile.count; i++) {
        double lse = lse_of(i), own = from_base2<A>(t.lse[i]) - __builtin_log(t.inverse_sum[i]);
        double rounding = 8 * EPSILON * __builtin_fabs(lse);
        if (lse == NEG_INF) t.inverse_sum[i] = 0;
        if (lse != lse) t.lse[i] = A(lse);
        if (lse - own > rounding) t.inverse_sum[i] = A(t.inverse_sum[i] * __builtin_exp(own - lse));
    }
}

// Scores to probabilities, 0 for keys of the block outside `own`. A row with a NaN score is NaN for
// the keys that it sees.
template <class A>
INLINE void panel_probabilities(BackwardTile<A>& t, int panel, BlockKeys own, int n) {
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> lse = load<A>(t.lse + tile_row), factor = load<A>(t.inverse_sum + tile_row);
        A* x = t.p + tile_row;
        auto keys = [&](int j, auto count) INLINE_LAMBDA {
            constexpr int N = decltype(count)::value;
            Vec<A> e[N];
            for (int u = 0; u < N; u++) e[u] = load<A>(x + (j + u) * TILE_LD) - lse;
            vexp2<A, N>(e);
            for (int u = 0; u < N; u++) store<A>(x + (j + u) * TILE_LD, e[u] * factor);
        };
        int j = own.begin;
        if (lanes_of<A>(lse != lse) != 0)
            for (; j < own.end; j++) {
                Vec<A> score = load<A>(x + j * TILE_LD), e = vexp2<A>(score - lse) * factor;
                store<A>(x + j * TILE_LD, score == A(NEG_INF) ? Vec<A>{} : e);
            }
        for (; j + 4 <= own.end; j += 4) keys(j, std::integral_constant<int, 4>{});
        for (; j < own.end; j++) keys(j, std::integral_constant<int, 1>{});
        for (j = 0; j < own.begin; j++) store<A>(x + j * TILE_LD, Vec<A>{});
        for (j = own.end; j < n; j++) store<A>(x + j * TILE_LD, Vec<A>{});
    }
}

// Calls for each block of keys that some row sees begin(key), which may move t.p; for each panel
// scored(panel, keys, key), when t.p has its scores; and made(key, n), when it has probabilities.
template <class A, class Begin, class Scored, class Made>
INLINE void for_each_block(const Params& p, const KeyRows& keys, Range r, BackwardTile<A>& t,
                           Arena& arena, const Begin& begin, const Scored& scored,
                           const Made& made) {
    const QueryTile<A>& tile = t.tile;
    if (t.exact_keys == nullptr) t.exact_keys = arena.take<A>(BLOCK_KV * p.head_dim);
    for (int key = r.begin / BLOCK_KV * BLOCK_KV; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < r.full_begin || key + n > r.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        RowBlock<A> k = load_rows(p, keys, key, n, p.head_dim, t.exact_keys);
        begin(key);
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            BlockKeys own = tile.of_panel(panel, edge, key, n);
            A* scores = t.p + panel * PANEL<A>;
            panel_product(t.q_transposed, panel, k, own.begin, own.end, scores, TILE_LD);
            finish_scores(p, tile, panel, key + own.begin, own.end - own.begin, seen == Seen::SOME,
                          edge, scores + own.begin * TILE_LD, TILE_LD, static_cast<A*>(nullptr));
            scored(panel, own, key);
            panel_probabilities(t, panel, own, n);
        }
        made(key, n);
    }
}

// --- topk ---------------------------------------------------------------------------------------

// x moved up by a lane, and the last lane of `before` in the first.
template <class V, int... LANE>
INLINE V moved_up(V before, V x, std::integer_sequence<int, LANE...>) {
    constexpr int W = sizeof...(LANE);
    return __builtin_shufflevector(before, x, W - 1 + LANE...);
}

// The largest scores of each row, in falling order, [BLOCK_Q][ld]; of equal ones the first keys.
template <class A> struct Largest {
    int topk, ld;  // ld: topk in whole vectors
    A* scores;
    IntOf<A>* keys;
    A* buffer;  // [8][BLOCK_KV]

    INLINE_MEMBER void begin(int rows) {
        for (int i = 0; i < rows * ld; i++) {
            scores[i] = A(NEG_INF);
            keys[i] = -1;
        }
    }
    // A score goes before the first that is smaller, and those from there on move up by one. There
    // is no branch, since one that is predicted wrongly costs more than all of this.
    INLINE_MEMBER void insert(A* score_of, IntOf<A>* key_of, A score, IntOf<A> key) {
        constexpr auto lanes = std::make_integer_sequence<int, SIMD_WIDTH<A>>{};
        Vec<A> own = splat(score), before = splat(-A(NEG_INF));
        VecI<A> own_key = splat_int<A>(key), before_key = {};
        for (int u = 0; u < ld; u += SIMD_WIDTH<A>) {
            Vec<A> x = load<A>(score_of + u), up = moved_up(before, x, lanes);
            VecI<A> x_key = load_int<A>(key_of + u), up_key = moved_up(before_key, x_key, lanes);
            store<A>(score_of + u, x >= own ? x : up >= own ? own : up);
            store_int<A>(key_of + u, x >= own ? x_key : up >= own ? own_key : up_key);
            before = x;
            before_key = x_key;
        }
    }
    // A row's scores x of keys [key, key + n). A vector of them at a time is compared with the last
    // of the largest: most are below it.
    INLINE_MEMBER void add_row(int row, A* x, int key, int n) {
        A* score_of = scores + static_cast<int64_t>(row) * ld;
        IntOf<A>* key_of = keys + static_cast<int64_t>(row) * ld;
        for (int j = n; j % SIMD_WIDTH<A> != 0; j++) x[j] = A(NEG_INF);
        for (int j = 0; j < n; j += SIMD_WIDTH<A>) {
            uint32_t lanes = lanes_of<A>(load<A>(x + j) > splat(score_of[topk - 1]));
            for (; lanes != 0; lanes &= lanes - 1) {
                int at = j + __builtin_ctz(lanes);
                insert(score_of, key_of, x[at], key + at);
            }
        }
    }
    // Scores of the first `count` rows of a panel, of a block that begins with key `key`. Eight
    // rows at a time are transposed, and then looked at one by one.
    INLINE_MEMBER void add(int panel, int count, BlockKeys own, int key, const A* s) {
        const int n = own.end - own.begin;
        for (int r = 0; r < count && n > 0; r += 8) {
            int rows = imin(8, count - r);
            transpose<false>([&](int j) { return s + (own.begin + j) * TILE_LD + r; }, n, rows,
                             buffer, BLOCK_KV, A(1));
            for (int i = 0; i < rows; i++)
                add_row(panel * PANEL<A> + r + i, buffer + i * BLOCK_KV, key + own.begin, n);
        }
    }
};

template <class A> static void write_largest(const Params& p, const Segment& s,
                                             const BackwardTile<A>& t, const Largest<A>& x,
                                             const MapsResults& results) {
    const QueryTile<A>& tile = t.tile;
    for (int i = 0; i < tile.count; i++) {
        int row = s.q_begin + tile.row[i], head = tile.head[i];
        A* probs = results.probs.at<A>(s.batch, head, row);
        int64_t* keys = results.largest.at<int64_t>(s.batch, head, row);
        A lse = *p.lse.at<A>(s.batch, head, row);
        for (int u = 0; u < x.topk; u++) {
            int64_t key = x.keys[i * x.ld + u];
            bool broken = lse != lse, none = key < 0 || lse == A(NEG_INF);
            Vec<A> e = vexp2<A>(splat(A(x.scores[i * x.ld + u] - t.lse[i])));
            probs[u] = broken ? lse : none ? A(0) : A(e[0] * t.inverse_sum[i]);
            keys[u] = none || broken ? -1 : s.key0 + key;
        }
    }
}

// --- sums over rows -----------------------------------------------------------------------------

template <class A> INLINE void add_col_mass(const BackwardTile<A>& t, int n, A* sums) {
    for (int j = 0; j < n; j++) {
        const A* x = t.p + j * TILE_LD;
        Vec<A> sum[2] = {};
        for (int i = 0; i < t.tile.padded; i += PANEL<A>) {
            sum[0] += load<A>(x + i);
            sum[1] += load<A>(x + i + SIMD_WIDTH<A>);
        }
        sums[j] += reduce_sum<A>(sum[0] + sum[1]);
    }
}

// The bin of a position of `size`, and the first position of a bin.
INLINE int bin_of(int64_t at, int64_t bins, int64_t size) {
    return static_cast<int>(at * bins / size);
}
INLINE int64_t first_of_bin(int64_t bin, int64_t bins, int64_t size) {
    return (bin * size + bins - 1) / bins;
}

// acc [bins][BLOCK_Q] += the rows' sums over the keys of each bin; `key` counts in the sequence.
template <class A> INLINE void add_to_bins(const BackwardTile<A>& t, int64_t key, int n,
                                           const MapsResults& results, A* acc) {
    for (int j = 0, end; j < n; j = end) {
        int bin = bin_of(key + j, results.pooled, results.keys);
        int64_t next = first_of_bin(bin + 1, results.pooled, results.keys) - key;
        end = next < n ? static_cast<int>(next) : n;
        for (int i = 0; i < t.tile.padded; i += SIMD_WIDTH<A>) {
            Vec<A> sum = load<A>(acc + bin * BLOCK_Q + i);
            for (int u = j; u < end; u++) sum += load<A>(t.p + u * TILE_LD + i);
            store<A>(acc + bin * BLOCK_Q + i, sum);
        }
    }
}

// --- the kernels --------------------------------------------------------------------------------

template <class A>
static void maps(const Params& p, const MapsItem& item, const MapsResults& results) {
    const Segment& s = p.segments[item.segment];
    ArenaLease lease;
    Arena& arena = *lease;
    BackwardTile<A>& t = *arena.take<BackwardTile<A>>(1);
    allocate_probabilities(p, t, arena);
    const int bins = item.pooled ? results.pooled : 0;
    Largest<A>& largest = *arena.take<Largest<A>>(1);
    largest.topk = results.probs.data ? results.topk : 0;
    largest.ld = (largest.topk + SIMD_WIDTH<A> - 1) / SIMD_WIDTH<A> * SIMD_WIDTH<A>;
    largest.scores = arena.take<A>(static_cast<int64_t>(largest.ld) * BLOCK_Q);
    largest.keys = arena.take<IntOf<A>>(static_cast<int64_t>(largest.ld) * BLOCK_Q);
    largest.buffer = arena.take<A>(8 * BLOCK_KV);
    A* acc = bins > 0 ? arena.take<A>(static_cast<int64_t>(bins) * BLOCK_Q) : nullptr;
    A* sums = static_cast<A*>(item.col_mass);
    KeyRows keys = key_rows(p, p.k, s, item.head / p.group());
    const int first_bin = bins > 0 ? bin_of(s.row0 + item.row_begin, bins, results.rows) : 0;
    for (int row = item.row_begin; row < item.row_end; row += BLOCK_Q) {
        set_query_tile(p, s, item.head, 1, row, imin(BLOCK_Q, item.row_end - row), t.tile);
        load_probabilities(p, s, keys, t, arena);
        largest.begin(t.tile.padded);
        if (acc) __builtin_memset(acc, 0, sizeof(A) * bins * BLOCK_Q);
        for_each_block(
            p, keys, t.tile.range(0, t.tile.count), t, arena, [](int) INLINE_LAMBDA {},
            [&](int panel, BlockKeys own, int key) INLINE_LAMBDA {
                if (largest.topk > 0)
                    largest.add(panel, imin(PANEL<A>, t.tile.count - panel * PANEL<A>), own, key,
                                t.p + panel * PANEL<A>);
            },
            [&](int key, int n) INLINE_LAMBDA {
                if (sums) add_col_mass(t, n, sums + key);
                if (acc) add_to_bins(t, s.key0 + key, n, results, acc);
            });
        if (largest.topk > 0) write_largest(p, s, t, largest, results);
        for (int i = 0; acc && i < t.tile.count; i++) {
            int bin = bin_of(s.row0 + row + i, bins, results.rows);
            A* to = static_cast<A*>(item.pooled) + static_cast<int64_t>(bin - first_bin) * bins;
            for (int b = 0; b < bins; b++) to[b] += acc[b * BLOCK_Q + i];
        }
    }
}

constexpr int WEIGHTS_KEYS = 4 * BLOCK_KV;  // of a chunk, which all heads of a mean add to

// Columns [begin, begin + n) of the tile's rows: `factor` times chunk [n][BLOCK_Q]. Where rows of
// the result follow each other in the type of arithmetic, eight at a time are transposed into it.
template <class A> static void write_weights(const Params& p, const WeightsItem& item,
                                             const WeightsResult& result, const A* chunk,
                                             int64_t begin, int n, A factor, A* buffer) {
    const Segment& s = p.segments[item.segment];
    int rows = item.end - item.begin;
    for (int i = 0; i < rows; i += 8) {
        int count = imin(8, rows - i);
        auto from = [&](int j) { return chunk + j * BLOCK_Q + i; };
        const int* places = result.places + item.begin + i;
        if (size_of(p.dtype) == sizeof(A) && places[count - 1] - places[0] == count - 1) {
            char* to = result.to.bytes_at(s.batch, item.heads > 1 ? 0 : item.head, places[0]);
            transpose<false>(from, n, count, reinterpret_cast<A*>(to) + begin, result.to.row,
                             factor);
            continue;
        }
        transpose<false>(from, n, count, buffer, WEIGHTS_KEYS, A(1));
        for (int r = 0; r < count; r++) {
            char* to = result.to.bytes_at(s.batch, item.heads > 1 ? 0 : item.head,
                                          result.places[item.begin + i + r]);
            store_row(buffer + r * WEIGHTS_KEYS, factor, p.dtype, to + begin * size_of(p.dtype), n);
        }
    }
}

template <class A> static void write_zeros(const Params& p, const WeightsItem& item,
                                           const WeightsResult& result, int64_t begin,
                                           int64_t end) {
    const Segment& s = p.segments[item.segment];
    for (int i = item.begin; i < item.end && begin < end; i++) {
        char* to = result.to.bytes_at(s.batch, item.heads > 1 ? 0 : item.head, result.places[i]);
        __builtin_memset(to + begin * size_of(p.dtype), 0,
                         static_cast<size_t>(end - begin) * size_of(p.dtype));
    }
}

// chunk = or += the block's probabilities, times dropout's factors z where there are any. The
// probabilities may be in the chunk already.
template <bool ADD, class A>
INLINE void take_block(const BackwardTile<A>& t, int n, const float* z, A* chunk) {
    if (!ADD && z == nullptr) return;
    for (int j = 0; j < n; j++)
        for (int i = 0; i < t.tile.padded; i += SIMD_WIDTH<A>) {
            Vec<A> x = load<A>(t.p + j * TILE_LD + i);
            if (z) x *= load_dropout<A>(z + j * DROPOUT_LD + i);
            A* to = chunk + j * TILE_LD + i;
            store<A>(to, ADD ? load<A>(to) + x : x);
        }
}

template <class A>
static void weights(const Params& p, const WeightsItem& item, const WeightsResult& result) {
    const Segment& s = p.segments[item.segment];
    ArenaLease lease;
    Arena& arena = *lease;
    BackwardTile<A>& t = *arena.take<BackwardTile<A>>(1);
    allocate_probabilities(p, t, arena);
    A* chunk = arena.take<A>(WEIGHTS_KEYS * BLOCK_Q);
    A *buffer = arena.take<A>(8 * WEIGHTS_KEYS), *block = t.p;
    for (DropoutTile& keep : t.keep)
        keep = p.dropout
                   ? reinterpret_cast<DropoutTile>(arena.take<float>(DROPOUT_ROWS * DROPOUT_LD))
                   : nullptr;
    const int rows = item.end - item.begin, last_head = item.head + item.heads;
    const A factor = A((p.dropout ? 1 / p.dropout_key.keep_probability() : 1.0) / item.heads);
    auto range_of = [&](int head) {
        set_query_rows(
            p, s, head, 1, rows, [&](int n) { return result.rows[item.begin + n]; }, t.tile);
        t.tile.ranged = true;  // rows of a list may see keys far apart
        return t.tile.range(0, rows);
    };
    Range all{s.band.kv_len, 0, 0, 0};
    for (int head = item.head; head < last_head; head++) {
        Range own = range_of(head);
        all.begin = imin(all.begin, own.begin / BLOCK_KV * BLOCK_KV);
        all.end = imax(all.end, own.end);
        if (!p.key_ranges.given()) break;  // the band is the same for all heads
    }
    all.end = imax(all.begin, all.end);
    write_zeros<A>(p, item, result, 0, s.key0 + all.begin);
    write_zeros<A>(p, item, result, s.key0 + all.end, result.keys);
    for (int begin = all.begin; begin < all.end; begin += WEIGHTS_KEYS) {
        int n = imin(WEIGHTS_KEYS, all.end - begin), done = begin;
        auto zero_until = [&](int key) {  // of the first head, where it sees nothing
            if (key > done)
                __builtin_memset(chunk + static_cast<int64_t>(done - begin) * TILE_LD, 0,
                                 sizeof(A) * (key - done) * TILE_LD);
        };
        for (int head = item.head; head < last_head; head++) {
            Range own = range_of(head);
            own.begin = imax(own.begin, begin);
            own.end = imin(own.end, begin + n);
            KeyRows keys = key_rows(p, p.k, s, head / p.group());
            load_probabilities(p, s, keys, t, arena);
            const bool first = head == item.head;
            for_each_block(
                p, keys, own, t, arena,
                [&](int key) INLINE_LAMBDA {
                    t.p = first ? chunk + static_cast<int64_t>(key - begin) * TILE_LD : block;
                },
                [](int, BlockKeys, int) INLINE_LAMBDA {},
                [&](int key, int count) INLINE_LAMBDA {
                    const float* z =
                        p.dropout ? dropout_tile(p, s, t.tile, key, count, t.keep[0], t.keep[1])
                                  : nullptr;
                    A* to = chunk + static_cast<int64_t>(key - begin) * TILE_LD;
                    if (!first) return take_block<true>(t, count, z, to);
                    zero_until(key);
                    done = key + count;
                    take_block<false>(t, count, z, to);
                });
            if (first) zero_until(begin + n);
            t.p = block;
        }
        write_weights(p, item, result, chunk, s.key0 + begin, n, factor, buffer);
    }
}
