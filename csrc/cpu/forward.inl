// The forward kernel: one tile of query rows against its keys, block by block, with the softmax
// kept online (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022).
// next: backward.inl, jvp.inl

// Fewer rows than this are decoding: keys are read once, as dot products, without transposing q.
constexpr int DOT_ROWS = 8;

template <class A> struct ForwardTile {
    QueryTile<A> tile;
    alignas(64) A row_max[BLOCK_Q];  // in base 2
    alignas(64) A row_sum[BLOCK_Q];
    alignas(64) A rescale[BLOCK_Q];
    Transposed<A> q;  // unless decoding
    A* q_rows;        // decoding: the tile's rows, scaled, dot_ld apart
    Blocks<A> blocks;
    A* scores;  // [BLOCK_KV][ld], then probabilities
    A* acc;     // [rows][acc_ld], unnormalised output
    DropoutTile keep[2];
    int ld, acc_ld, dot_ld;
};

// --- load ---------------------------------------------------------------------------------------

template <class A>
static void load_queries(const Params& p, const Segment& s, ForwardTile<A>& t, Arena& arena) {
    A factor = A(p.scale * LOG2E);
    auto row_of = [&](int i) {
        return p.q.bytes_at(s.batch, t.tile.head[i], s.q_begin + t.tile.row[i]);
    };
    if (t.dot_ld == 0) {
        t.q = new_transposed<A>(p, t.tile.padded, p.head_dim, factor, arena);
        return transpose_rows(p, row_of, t.tile.count, t.q, arena.take<A>(8 * p.head_dim));
    }
    t.q_rows = arena.take<A>(DOT_ROWS * t.dot_ld);
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int i = 0; i < t.tile.count; i++) {
            A* row = t.q_rows + i * t.dot_ld;
            convert_row(reinterpret_cast<const T*>(row_of(i)), row, p.head_dim);
            for (int d = 0; d < p.head_dim; d++) row[d] *= factor;
            for (int d = p.head_dim; d < t.dot_ld; d++) row[d] = 0;
        }
    });
}

// --- scores -------------------------------------------------------------------------------------

// Dot products of N keys with all rows, in steps of a vector; the last step reads a padded copy.
template <int N, class A, class T> INLINE void dot_scores(const T* const* keys, int columns,
                                                          const A* q, int rows, int64_t q_ld, A* to,
                                                          int64_t ld) {
    constexpr int W = SIMD_WIDTH<A>;
    int whole = columns / W * W;
    alignas(64) A tail[N][W] = {};
    for (int j = 0; j < N; j++)
        for (int d = whole; d < columns; d++) tail[j][d - whole] = to_float(keys[j][d]);
    int tile_row = 0;
    auto step = [&](auto count) {
        constexpr int L = decltype(count)::value;
        Vec<A> acc[N][L] = {};
        for (int d = 0; d <= whole; d += W) {
            if (d == whole && whole == columns) break;
            Vec<A> key[N];
            for (int j = 0; j < N; j++)
                key[j] = d < whole ? load_as<A>(keys[j] + d) : load<A>(tail[j]);
            for (int l = 0; l < L; l++) {
                Vec<A> x = load<A>(q + (tile_row + l) * q_ld + d);
                for (int j = 0; j < N; j++) acc[j][l] += key[j] * x;
            }
        }
        for (int j = 0; j < N; j++)
            for (int l = 0; l < L; l++) to[j * ld + tile_row + l] = reduce_sum<A>(acc[j][l]);
        tile_row += L;
    };
    while (tile_row + 4 <= rows) step(std::integral_constant<int, 4>{});
    while (tile_row < rows) step(std::integral_constant<int, 1>{});
}

// Scores of keys [key, key + n), key by key. The values are asked for from memory meanwhile: they
// are read next, column by column, which no hardware prefetcher follows.
template <class A> static void decode_scores(const Params& p, const ForwardTile<A>& t,
                                             const KeyRows& keys, const KeyRows& values, int key,
                                             int n) {
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        int value_bytes = p.v_dim * static_cast<int>(sizeof(T));
        for (int j = 0; j < n; j += 2) {
            const T* rows[2];
            for (int i = 0; i < imin(2, n - j); i++) {
                rows[i] = reinterpret_cast<const T*>(keys.row(key + j + i));
                const char* value = values.row(key + j + i);
                for (int b = 0; b < value_bytes; b += 64) __builtin_prefetch(value + b, 0, 2);
            }
            A* to = t.scores + j * t.ld;
            if (j + 2 <= n)
                dot_scores<2>(rows, p.head_dim, t.q_rows, t.tile.count, t.dot_ld, to, t.ld);
            else
                dot_scores<1>(rows, p.head_dim, t.q_rows, t.tile.count, t.dot_ld, to, t.ld);
        }
    });
}

// --- softmax ------------------------------------------------------------------------------------

// Scores to probabilities for rows [begin, end) of a panel, 0 elsewhere in [0, n). `key` is the
// block's first key, and `statistics` are a RowStatistics or none.
template <class A, class Statistics> INLINE void panel_softmax(ForwardTile<A>& t, int panel,
                                                               int begin, int end, int n, A* s,
                                                               int key, Statistics& statistics) {
    int64_t ld = t.ld;
    for (int v = 0; v < 2; v++, s += SIMD_WIDTH<A>) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> old_max = load<A>(t.row_max + tile_row);
        Vec<A> m[2] = {old_max, old_max};
        A *first = s + begin * ld, *last = s + end * ld, *x = first;
        for (; x + ld < last; x += 2 * ld) {
            m[0] = vmax<A>(load<A>(x), m[0]);
            m[1] = vmax<A>(load<A>(x + ld), m[1]);
        }
        if (x < last) m[0] = vmax<A>(load<A>(x), m[0]);
        Vec<A> row_max = vmax<A>(m[0], m[1]);
        // A row that has seen nothing yet stays at -inf; -inf - 0 gives it probabilities of 0.
        Vec<A> base = row_max == A(NEG_INF) ? Vec<A>{} : row_max;
        Vec<A> rescale = vexp2<A>(old_max - base);
        if constexpr (Statistics::ON)
            find_largest(statistics, tile_row, s, ld, begin, end, key, old_max, row_max);
        Vec<A> sum = {}, weighted = {};
        for (x = first; x + ld < last; x += 2 * ld) {
            Vec<A> e[2] = {load<A>(x) - base, load<A>(x + ld) - base};
            Vec<A> below[2] = {e[0], e[1]};
            vexp2<A, 2>(e);
            store<A>(x, e[0]);
            store<A>(x + ld, e[1]);
            sum += e[0] + e[1];
            if constexpr (Statistics::ON)
                weighted +=
                    e[0] * finite_exponent<A>(below[0]) + e[1] * finite_exponent<A>(below[1]);
        }
        if (x < last) {
            Vec<A> below = load<A>(x) - base, e = vexp2<A>(below);
            store<A>(x, e);
            sum += e;
            if constexpr (Statistics::ON) weighted += e * finite_exponent<A>(below);
        }
        if constexpr (Statistics::ON)
            add_weighted(statistics, tile_row, load<A>(t.row_sum + tile_row), base - old_max,
                         rescale, weighted);
        for (int j = 0; j < begin; j++) store<A>(s + j * ld, Vec<A>{});
        for (int j = end; j < n; j++) store<A>(s + j * ld, Vec<A>{});
        store<A>(t.row_sum + tile_row, load<A>(t.row_sum + tile_row) * rescale + sum);
        store<A>(t.row_max + tile_row, row_max);
        store<A>(t.rescale + tile_row, rescale);
    }
}

template <class A>
INLINE void panel_softmax(ForwardTile<A>& t, int panel, int begin, int end, int n, A* s) {
    NoStatistics none;
    panel_softmax(t, panel, begin, end, n, s, 0, none);
}

// x [key][row] *= dropout's factors z.
template <class A> static void drop(const ForwardTile<A>& t, const float* z, int n, A* x) {
    for (int j = 0; j < n; j++)
        for (int i = 0; i < t.tile.padded; i += SIMD_WIDTH<A>) {
            A* to = x + j * t.ld + i;
            store<A>(to, load<A>(to) * load_dropout<A>(z + j * DROPOUT_LD + i));
        }
}

template <class A> static void apply_dropout(const Params& p, const Segment& s,
                                             const ForwardTile<A>& t, int key, int n) {
    drop(t, dropout_tile(p, s, t.tile, key, n, t.keep[0], t.keep[1]), n, t.scores);
}

// --- output -------------------------------------------------------------------------------------

// The B operand of the product with the values: packed panels, or (decoding) the values where they
// lie.
template <class T> struct ValuePanels {
    const T* data;
    int columns;
    int64_t step, ld;  // from panel to panel, from key to key
};

// acc = acc * rescale + W V (or acc + W V) for keys [key, key + n), a group of rows at a time. W is
// [key][row], as the scores.
template <Store STORE = Store::RESCALE, class A, class T>
INLINE void accumulate(const ForwardTile<A>& t, bool edge, const Range& r, int key, int n,
                       const ValuePanels<T>& values, const A* weights, A* acc) {
    for (int i = 0, rows; i < t.tile.count; i += rows) {
        rows = imin(GEMM_ROWS, t.tile.count - i);
        int begin = 0, end = n;
        if (edge) {
            rows = t.tile.overlapping(i, rows);
            Range seen = t.tile.range(i, i + rows);
            begin = imax(0, imax(seen.begin, r.begin) - key);
            end = imin(n, imin(seen.end, r.end) - key);
        }
        const T* panel = values.data + begin * values.ld;
        if (begin < end)
            for (int c = 0; c < values.columns; c += PANEL<A>, panel += values.step)
                micro_rows<Order::COLUMNS, STORE>(rows, end - begin, weights + begin * t.ld + i,
                                                  t.ld, panel, values.ld, acc + i * t.acc_ld + c,
                                                  t.acc_ld, t.rescale + i);
    }
}

template <class A> static void accumulate_block(const Params& p, const ForwardTile<A>& t, bool edge,
                                                const Range& r, const KeyRows& values, int key,
                                                int n, const Block<A>& block) {
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        bool in_place = t.dot_ld > 0 && values.pages == nullptr && p.v_dim % PANEL<A> == 0;
        if (in_place) {
            ValuePanels<T> rows{reinterpret_cast<const T*>(values.row(key)), p.v_dim, PANEL<A>,
                                values.row_bytes / static_cast<int64_t>(sizeof(T))};
            return accumulate(t, edge, r, key, n, rows, t.scores, t.acc);
        }
        if (!block.done)
            pack_panels<A, T>([&](int j) { return values.row(key + j); }, block.n, p.v_dim,
                              BLOCK_KV, block.panels);
        ValuePanels<A> panels{block.panels, t.acc_ld, BLOCK_KV * PANEL<A>, PANEL<A>};
        accumulate(t, edge, r, key, n, panels, t.scores, t.acc);
    });
}

// A row's maximum and sum with its head's sink in them.
template <class A> struct WithSink {
    A row_max, row_sum;
    A keys;   // what the sums over the keys are multiplied by
    A sink;   // the sink's part of row_sum
    A logit;  // the sink, in base 2

    INLINE_MEMBER WithSink(const Params& p, int head, A max_of_keys, A sum_of_keys)
        : row_max(max_of_keys), row_sum(sum_of_keys), keys(1), sink(0), logit(A(NEG_INF)) {
        if (p.sinks.data == nullptr) return;
        logit = to_base2<A>(bias_at<A>(p.sinks.dtype, p.sinks.bytes_at(0, head, 0)));
        row_max = logit > max_of_keys ? logit : max_of_keys;
        keys = A(__builtin_exp2(max_of_keys - row_max));
        sink = A(__builtin_exp2(logit - row_max));
        row_sum = sum_of_keys * keys + sink;
    }
};

// One row's result. A row whose sum is 0 has seen no key (a NaN score makes the sum NaN).
template <class A> static void write_row(const Params& p, const Segment& s, int head, int row,
                                         A row_max, A row_sum, const A* acc) {
    A lse = A(NEG_INF), factor = 0;
    if (!(row_sum == 0)) {
        WithSink<A> whole(p, head, row_max, row_sum);
        row_sum = whole.row_sum;
        lse = A(from_base2<A>(whole.row_max) + __builtin_log(row_sum));
        factor = whole.keys / row_sum;
        if (p.dropout) factor = A(factor / p.dropout_key.keep_probability());
    }
    char* to = p.out.bytes_at(s.batch, head, s.q_begin + row);
    if (factor == 0 && row_sum == 0)
        __builtin_memset(to, 0, static_cast<size_t>(p.v_dim) * size_of(p.dtype));
    else
        store_row(acc, factor, p.dtype, to, p.v_dim);
    *p.lse.at<A>(s.batch, head, s.q_begin + row) = lse;
}

// One row's statistics from its maximum and sums over all keys; `key` is its argmax.
template <class A> static void write_statistics(const Params& p, const Segment& s, int head,
                                                int row, A row_max, A row_sum, A weighted,
                                                int64_t key) {
    int at = s.q_begin + row;
    const bool none = row_sum == 0;                                    // no key seen
    const bool broken = row_sum != row_sum && row_max != -A(NEG_INF);  // a NaN score
    if (p.max_logit.data) {
        A largest = broken ? row_sum : A(from_base2<A>(row_max));
        *p.max_logit.at<A>(s.batch, head, at) = none ? A(NEG_INF) : largest;
    }
    if (p.argmax.data)
        *p.argmax.at<int64_t>(s.batch, head, at) = none || broken ? -1 : s.key0 + key;
    if (p.entropy.data == nullptr) return;
    A entropy = 0;
    if (!none) {
        WithSink<A> whole(p, head, row_max, row_sum);
        A moved = (weighted - row_sum * (whole.row_max - row_max)) * whole.keys;
        if (whole.sink != 0) moved += whole.sink * (whole.logit - whole.row_max);
        entropy = A(__builtin_log(whole.row_sum) - LN2 * (moved / whole.row_sum));
    }
    *p.entropy.at<A>(s.batch, head, at) = entropy;
}

// --- the kernel ---------------------------------------------------------------------------------

template <class A, class Statistics>
INLINE void run_forward(const Params& p, const ForwardItem& item, const SplitResults& results) {
    const Segment& s = p.segments[item.segment];
    ArenaLease lease;
    Arena& arena = *lease;
    ForwardTile<A>& t = *arena.take<ForwardTile<A>>(1);
    set_query_tile(p, s, item.head, item.heads, item.row, item.rows, t.tile);
    const QueryTile<A>& tile = t.tile;

    int kv_head = item.head / p.group();
    KeyRows keys = key_rows(p, p.k, s, kv_head), values = key_rows(p, p.v, s, kv_head);
    Range all = tile.range(0, tile.count);
    Range r{imax(all.begin, item.key_begin), 0, 0, imin(all.end, item.key_end)};

    bool decoding = tile.count <= DOT_ROWS;
    // Whole blocks, so that tiles whose key ranges begin elsewhere share what is packed.
    if (tile.ranged && !decoding && item.split_row < 0) r.begin = r.begin / BLOCK_KV * BLOCK_KV;
    t.ld = tile.padded;
    t.acc_ld = round_up_panel<A>(p.v_dim);
    t.dot_ld = decoding ? round_up_panel<A>(p.head_dim) : 0;
    load_queries(p, s, t, arena);
    bool more_tiles = tile.count < s.band.q_len * p.group() && r.begin % BLOCK_KV == 0;
    t.blocks =
        new_blocks<A>(p, item.segment, kv_head, false, t.acc_ld, !decoding && more_tiles, arena);
    t.scores = arena.take<A>(BLOCK_KV * t.ld);
    t.acc = arena.take<A>(static_cast<int64_t>(tile.count) * t.acc_ld);
    if (p.dropout)
        for (DropoutTile& keep : t.keep)
            keep = reinterpret_cast<DropoutTile>(arena.take<float>(DROPOUT_ROWS * DROPOUT_LD));
    __builtin_memset(t.acc, 0, sizeof(A) * tile.count * t.acc_ld);
    for (int i = 0; i < tile.padded; i++) {
        t.row_max[i] = A(NEG_INF);
        t.row_sum[i] = 0;
    }
    if (decoding) __builtin_memset(t.scores, 0, sizeof(A) * BLOCK_KV * t.ld);
    Statistics& statistics = *arena.take<Statistics>(1);
    if constexpr (Statistics::ON) begin_statistics(p, tile.padded, statistics);

    for (int key = r.begin; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < all.full_begin || key + n > all.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        Block<A> block = t.blocks.at(key, n);
        RowBlock<A> rows{};
        if (decoding)
            decode_scores(p, t, keys, values, key, n);
        else
            rows = load_rows(p, keys, key, block.n, p.head_dim, block.keys, block.done);
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            auto [begin, end] = tile.of_panel(panel, edge, key, n);
            A* scores = t.scores + panel * PANEL<A>;
            if (!decoding) panel_product(t.q, panel, rows, begin, end, scores, t.ld);
            finish_scores(p, tile, panel, key + begin, end - begin, seen == Seen::SOME, edge,
                          scores + begin * t.ld, t.ld, static_cast<A*>(nullptr));
            panel_softmax(t, panel, begin, end, n, scores, key, statistics);
        }
        if (p.dropout) apply_dropout(p, s, t, key, n);
        accumulate_block(p, t, edge, r, values, key, n, block);
    }

    for (int i = 0; i < tile.count; i++) {
        const A* acc = t.acc + static_cast<int64_t>(i) * t.acc_ld;
        if (item.split_row < 0) {
            write_row(p, s, tile.head[i], tile.row[i], t.row_max[i], t.row_sum[i], acc);
            if constexpr (Statistics::ON)
                write_statistics(p, s, tile.head[i], tile.row[i], t.row_max[i], t.row_sum[i],
                                 statistics.weighted[i], statistics.argmax[i]);
            else if (p.max_logit.data)
                write_statistics(p, s, tile.head[i], tile.row[i], t.row_max[i], t.row_sum[i], A(0),
                                 0);
        } else {
            static_cast<A*>(results.row_max)[item.split_row + i] = t.row_max[i];
            static_cast<A*>(results.row_sum)[item.split_row + i] = t.row_sum[i];
            if constexpr (Statistics::ON) {
                static_cast<A*>(results.weighted)[item.split_row + i] = statistics.weighted[i];
                results.argmax[item.split_row + i] = statistics.argmax[i];
            }
            __builtin_memcpy(static_cast<A*>(results.acc) + (item.split_row + i) * p.v_dim, acc,
                             sizeof(A) * p.v_dim);
        }
    }
}

template <class A>
static void forward(const Params& p, const ForwardItem& item, const SplitResults& results) {
    run_forward<A, NoStatistics>(p, item, results);
}
template <class A> static void forward_statistics(const Params& p, const ForwardItem& item,
                                                  const SplitResults& results) {
    run_forward<A, RowStatistics<A>>(p, item, results);
}

// Merges the results of a tile's splits, in order.
template <class A> static void combine(const Params& p, const ForwardItem& item, int splits,
                                       const SplitResults& results) {
    const Segment& s = p.segments[item.segment];
    int count = item.heads * item.rows;
    ArenaLease arena;
    A* acc = arena->take<A>(p.v_dim);
    const A* maxima = static_cast<A*>(results.row_max) + item.split_row;
    const A* sums = static_cast<A*>(results.row_sum) + item.split_row;
    const A* accs = static_cast<A*>(results.acc) + item.split_row * p.v_dim;
    for (int i = 0; i < count; i++) {
        A row_max = A(NEG_INF), row_sum = 0, weighted = 0;
        int64_t key = 0;
        for (int split = 0; split < splits; split++)
            if (A largest = maxima[split * count + i]; largest > row_max) {
                row_max = largest;
                if (results.argmax) key = results.argmax[item.split_row + split * count + i];
            }
        A base = row_max == A(NEG_INF) ? A(0) : row_max;
        for (int d = 0; d < p.v_dim; d++) acc[d] = 0;
        for (int split = 0; split < splits; split++) {
            int64_t at = split * static_cast<int64_t>(count) + i;
            if (sums[at] == 0) continue;
            A weight = A(__builtin_exp2(maxima[at] - base));
            row_sum += sums[at] * weight;
            if (results.weighted) {
                A own = static_cast<A*>(results.weighted)[item.split_row + at];
                weighted += (own - sums[at] * (base - maxima[at])) * weight;
            }
            for (int d = 0; d < p.v_dim; d++) acc[d] += accs[at * p.v_dim + d] * weight;
        }
        int head = item.head + i / item.rows, row = item.row + i % item.rows;
        write_row(p, s, head, row, row_max, row_sum, acc);
        if (p.max_logit.data || p.entropy.data || p.argmax.data)
            write_statistics(p, s, head, row, row_max, row_sum, weighted, key);
    }
}
