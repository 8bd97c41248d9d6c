// The backward kernel. Probabilities are made again from lse (Dao et al., FlashAttention, 2022):
//   P = exp(S - lse),  dP = dO V',  dS = P * (dP - delta),  delta = rowsum(dO * O) - dlse
//   dV = P' dO,  dK = scale * dS' Q,  dQ = scale * dS K,  dbias = dS
// With the gradient of the rows' entropy, dS = P * (dP - delta - dentropy * log P); the rest of it,
// -dentropy * entropy, the caller has added to dlse.
// One tile of query rows runs over its keys; dQ stays in the tile, dK and dV are summed in fp32
// (fp64) over all tiles of the item, always in the same order: the same bits at every run.
// next: jvp_bwd.inl

template <class A> struct BackwardTile {
    QueryTile<A> tile;
    alignas(64) A lse[BLOCK_Q];  // in base 2; +inf for a row that saw no key
    alignas(64) A delta[BLOCK_Q];
    // Where some lse is so large that its rounding is felt (exact): the largest score of each row
    // is in place of lse, and this is one over the sum of exponentials below it.
    alignas(64) A inverse_sum[BLOCK_Q];
    bool exact;
    alignas(64) A dentropy[BLOCK_Q];          // times log(2), where P's logarithm is in base 2
    alignas(64) A log2_inverse_sum[BLOCK_Q];  // 0 where not exact
    A* exact_keys;                            // rows of keys, converted; taken when first wanted
    Transposed<A> q_transposed, dout_transposed;
    A *q, *dout;  // panels: [columns / PANEL][BLOCK_Q][PANEL]
    Blocks<A> blocks;
    A *p, *ds, *softcap_tanh;  // [BLOCK_KV][BLOCK_Q]
    A* dq;                     // [BLOCK_Q][padded head_dim]
    A* buffer;                 // 8 rows of any operand
    DropoutTile keep[2];
    int k_ld, v_ld;     // padded head_dim and v_dim
    int panel_columns;  // of all that `blocks` has as panels
};
constexpr int TILE_LD = BLOCK_Q;
// exp(score - lse) has the rounding of lse: 2^-12 of a weight from here on (in base 2).
template <class A> constexpr A EXACT_FROM = sizeof(A) == 4 ? A(0x1p12) : A(0x1p41);

// --- load ---------------------------------------------------------------------------------------

template <class A> static void allocate(const Params& p, BackwardTile<A>& t, Arena& arena) {
    t.k_ld = t.panel_columns = round_up_panel<A>(p.head_dim);
    t.v_ld = round_up_panel<A>(p.v_dim);
    t.q_transposed = new_transposed<A>(p, BLOCK_Q, p.head_dim, A(p.scale * LOG2E), arena);
    t.dout_transposed = new_transposed<A>(p, BLOCK_Q, p.v_dim, A(1), arena);
    t.q = arena.take<A>(BLOCK_Q * t.k_ld);
    t.dout = arena.take<A>(BLOCK_Q * t.v_ld);
    t.p = arena.take<A>(BLOCK_KV * TILE_LD);
    t.ds = arena.take<A>(BLOCK_KV * TILE_LD);
    t.softcap_tanh = p.softcap > 0 ? arena.take<A>(BLOCK_KV * TILE_LD) : nullptr;
    t.dq = arena.take<A>(BLOCK_Q * t.k_ld);
    t.buffer = arena.take<A>(8 * imax(p.head_dim, p.v_dim));
    t.exact_keys = nullptr;
    for (DropoutTile& keep : t.keep)
        keep = p.dropout
                   ? reinterpret_cast<DropoutTile>(arena.take<float>(DROPOUT_ROWS * DROPOUT_LD))
                   : nullptr;
}

template <class A, class T> INLINE A dot(const T* x, const T* y, int n) {
    Vec<A> sum = {};
    int d = 0;
    for (; d + SIMD_WIDTH<A> <= n; d += SIMD_WIDTH<A>) sum += load_as<A>(x + d) * load_as<A>(y + d);
    A total = reduce_sum<A>(sum);
    for (; d < n; d++) total += A(to_float(x[d])) * A(to_float(y[d]));
    return total;
}

template <class A>
static void load_rows_of_tile(const Params& p, const Segment& s, BackwardTile<A>& t) {
    const QueryTile<A>& tile = t.tile;
    t.exact = false;
    auto rows_of = [&](const Tensor4& x) {
        return [&](int i) { return x.bytes_at(s.batch, tile.head[i], s.q_begin + tile.row[i]); };
    };
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto q_row = rows_of(p.q), dout_row = rows_of(p.dout);
        int n = tile.count;
        transpose_rows(p, q_row, n, t.q_transposed, t.buffer);
        transpose_rows(p, dout_row, n, t.dout_transposed, t.buffer);
        pack_panels<A, T>(q_row, n, p.head_dim, BLOCK_Q, t.q);
        pack_panels<A, T>(dout_row, n, p.v_dim, BLOCK_Q, t.dout);
        for (int i = 0; i < n; i++) {
            const T* out = p.out.at<T>(s.batch, tile.head[i], s.q_begin + tile.row[i]);
            A delta = dot<A>(out, reinterpret_cast<const T*>(dout_row(i)), p.v_dim);
            int head = tile.head[i], row = s.q_begin + tile.row[i];
            if (p.dlse.data) delta -= *p.dlse.at<A>(s.batch, head, row);
            A lse = *p.lse.at<A>(s.batch, head, row);
            bool dead = lse == A(NEG_INF);
            t.lse[i] = dead ? -A(NEG_INF) : to_base2<A>(lse);
            t.exact |= !dead && !(t.lse[i] < EXACT_FROM<A> && t.lse[i] > -EXACT_FROM<A>);
            t.delta[i] = dead ? A(0) : delta;
            t.dentropy[i] = p.dentropy.data ? A(*p.dentropy.at<A>(s.batch, head, row) * LN2) : A(0);
            if (p.delta.data) *p.delta.at<A>(s.batch, head, row) = t.delta[i];
        }
    });
    for (int i = tile.count; i < tile.padded; i++) {
        t.lse[i] = -A(NEG_INF);
        t.delta[i] = t.dentropy[i] = 0;
    }
}

// --- rows whose lse is too large for its rounding -----------------------------------------------

// Adds the scores [begin, end) of one panel to the rows' maxima (in lse) and sums of exponentials.
template <class A>
static void panel_statistics(BackwardTile<A>& t, int panel, int begin, int end, const A* scores) {
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> old_max = load<A>(t.lse + tile_row), row_max = old_max;
        const A* x = scores + v * SIMD_WIDTH<A>;
        for (int j = begin; j < end; j++) row_max = vmax<A>(load<A>(x + j * TILE_LD), row_max);
        Vec<A> base = row_max == A(NEG_INF) ? Vec<A>{} : row_max;
        Vec<A> sum = load<A>(t.inverse_sum + tile_row) * vexp2<A>(old_max - base);
        for (int j = begin; j < end; j++) sum += vexp2<A>(load<A>(x + j * TILE_LD) - base);
        store<A>(t.lse + tile_row, row_max);
        store<A>(t.inverse_sum + tile_row, sum);
    }
}

// The largest score of each row and one over its sum, by one more pass over the keys: the same
// operations as backward_tile's, so the same scores, and no weight is above 1.
template <class A> static void row_statistics(const Params& p, const KeyRows& keys, const Range& r,
                                              BackwardTile<A>& t, Arena& arena) {
    const QueryTile<A>& tile = t.tile;
    if (t.exact_keys == nullptr) t.exact_keys = arena.take<A>(BLOCK_KV * p.head_dim);
    for (int i = 0; i < tile.padded; i++) {
        t.lse[i] = A(NEG_INF);
        t.inverse_sum[i] = 0;
    }
    for (int key = r.begin / BLOCK_KV * BLOCK_KV; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < r.full_begin || key + n > r.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        RowBlock<A> k = load_rows(p, keys, key, n, p.head_dim, t.exact_keys);
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            int first = panel * PANEL<A>;
            auto [begin, end] = tile.of_panel(panel, edge, key, n);
            panel_product(t.q_transposed, panel, k, begin, end, t.p + first, TILE_LD);
            finish_scores(p, tile, panel, key + begin, end - begin, seen == Seen::SOME, edge,
                          t.p + begin * TILE_LD + first, TILE_LD, static_cast<A*>(nullptr));
            panel_statistics(t, panel, begin, end, t.p + first);
        }
    }
    for (int i = 0; i < tile.padded; i++) {
        // no row, or one that saw no key: weights are 0
        bool none = i >= tile.count || t.inverse_sum[i] == 0;
        WithSink<A> whole(p, tile.head[none ? 0 : i], t.lse[i], t.inverse_sum[i]);
        t.lse[i] = none ? -A(NEG_INF) : whole.row_max;
        t.inverse_sum[i] = none ? A(1) : 1 / whole.row_sum;
    }
}

// --- one tile -----------------------------------------------------------------------------------

// p, ds of one panel from scores and dP; rows outside [begin, end) become 0.
template <bool EXACT, bool ENTROPY = false, class A>
INLINE void panel_gradients(const Params& p, BackwardTile<A>& t, int panel, int begin, int end,
                            int n, const float* z) {
    A inverse_keep = p.dropout ? A(1 / p.dropout_key.keep_probability()) : A(1);
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> lse = load<A>(t.lse + tile_row), delta = load<A>(t.delta + tile_row);
        for (int j = 0; j < begin; j++) {
            store<A>(t.p + j * TILE_LD + tile_row, Vec<A>{});
            store<A>(t.ds + j * TILE_LD + tile_row, Vec<A>{});
        }
        auto rows = [&](int j, auto count) {
            constexpr int N = decltype(count)::value;
            A *to_p = t.p + j * TILE_LD + tile_row, *to_ds = t.ds + j * TILE_LD + tile_row;
            Vec<A> x[N];
            for (int u = 0; u < N; u++) x[u] = load<A>(to_p + u * TILE_LD) - lse;
            Vec<A> log_p[N] = {};
            if constexpr (ENTROPY)
                for (int u = 0; u < N; u++)
                    log_p[u] = finite_exponent<A>(x[u]) + load<A>(t.log2_inverse_sum + tile_row);
            vexp2<A, N>(x);
            if constexpr (EXACT)
                for (int u = 0; u < N; u++) x[u] *= load<A>(t.inverse_sum + tile_row);
            for (int u = 0; u < N; u++) {
                Vec<A> dp = load<A>(to_ds + u * TILE_LD), dropped = x[u];
                if (z) {
                    Vec<A> factor = load_dropout<A>(z + (j + u) * DROPOUT_LD + tile_row);
                    dp = dp * factor * inverse_keep;
                    dropped = x[u] * factor;
                }
                if constexpr (ENTROPY) dp -= load<A>(t.dentropy + tile_row) * log_p[u];
                Vec<A> ds = x[u] * (dp - delta);
                store<A>(to_p + u * TILE_LD, dropped);
                // not 0 * NaN where a masked value is NaN
                store<A>(to_ds + u * TILE_LD, x[u] == 0 ? Vec<A>{} : ds);
            }
        };
        int j = begin;
        for (; j + 4 <= end; j += 4) rows(j, std::integral_constant<int, 4>{});
        for (; j < end; j++) rows(j, std::integral_constant<int, 1>{});
        for (int j = end; j < n; j++) {
            store<A>(t.p + j * TILE_LD + tile_row, Vec<A>{});
            store<A>(t.ds + j * TILE_LD + tile_row, Vec<A>{});
        }
    }
}

// dbias += ds, summed over whatever dimensions the bias is broadcast along.
template <class A> static void add_bias_gradient(const Params& p, const Segment& s,
                                                 const BackwardTile<A>& t, int key, int n) {
    const QueryTile<A>& tile = t.tile;
    const Tensor4& g = p.dbias;
    A* first = g.at<A>(s.entry, tile.head[0], s.row0 + tile.row[0]) + (s.key0 + key) * g.col;
    if (g.row == 0 || g.col == 0) {
        for (int j = 0; j < n; j++)
            for (int i = 0; i < tile.count; i++)
                first[i * g.row + j * g.col] += t.ds[j * TILE_LD + i];
        return;
    }
    // Eight rows of dbias at a time: they lie a multiple of 4 KB apart where kv_len is one of 1024,
    // and more of them would evict each other from the L1 cache.
    bool set =
        p.dbias_unset && (g.batch != 0 || s.entry == 0) && (g.head != 0 || tile.head[0] == 0);
    for (int i = 0; i < tile.count; i += 8) {
        auto row = [&](int j) { return t.ds + j * TILE_LD + i; };
        int rows = imin(8, tile.count - i);
        if (set)
            transpose<false>(row, n, rows, first + i * g.row, g.row, A(1));
        else
            transpose<true>(row, n, rows, first + i * g.row, g.row, A(1));
    }
}

// sum[key][column] += X'[key][row] * rows[row][column], for the rows that see the keys.
template <class A> INLINE void add_to_keys(const BackwardTile<A>& t, bool edge, const A* x, int key,
                                           int n, const A* rows, int columns, A* sum) {
    for (int j = 0; j < n; j += GEMM_ROWS) {
        int count = imin(GEMM_ROWS, n - j), begin = 0, end = t.tile.count;
        if (edge) {
            while (begin < end && t.tile.hi[begin] <= key + j) begin++;
            while (begin < end && t.tile.lo[end - 1] >= key + j + count) end--;
            if (begin == end) continue;
        }
        for (int c = 0; c < columns; c += PANEL<A>)
            micro_rows<Order::ROWS, Store::ADD>(
                count, end - begin, x + j * TILE_LD + begin, TILE_LD,
                rows + static_cast<int64_t>(c) * BLOCK_Q + begin * PANEL<A>, PANEL<A>,
                sum + static_cast<int64_t>(j) * columns + c, columns,
                static_cast<const A*>(nullptr));
    }
}

// dq[row][column] += X[row][key] * K[key][column], where X is ds, say.
template <class A> INLINE void add_to_queries(const BackwardTile<A>& t, bool edge, const A* x,
                                              int key, int n, const A* panels) {
    for (int c = 0; c < t.k_ld; c += PANEL<A>)
        for (int i = 0, rows; i < t.tile.count; i += rows) {
            int begin = 0, end = n;
            rows = imin(GEMM_ROWS, t.tile.count - i);
            if (edge) {
                rows = t.tile.overlapping(i, rows);
                Range seen = t.tile.range(i, i + rows);
                begin = imax(0, seen.begin - key);
                end = imin(n, seen.end - key);
                if (begin >= end) continue;
            }
            micro_rows<Order::COLUMNS, Store::ADD>(
                rows, end - begin, x + begin * TILE_LD + i, TILE_LD,
                panels + c * BLOCK_KV + begin * PANEL<A>, PANEL<A>, t.dq + i * t.k_ld + c, t.k_ld,
                static_cast<const A*>(nullptr));
        }
}

// All keys of one tile of query rows.
template <class A> static void backward_tile(const Params& p, const Segment& s, const KeyRows& keys,
                                             const KeyRows& values, const BackwardItem& item,
                                             BackwardTile<A>& t, Arena& arena) {
    const QueryTile<A>& tile = t.tile;
    Range r = tile.range(0, tile.count);
    if (t.exact) row_statistics(p, keys, r, t, arena);
    for (int i = 0; i < tile.padded; i++)
        t.log2_inverse_sum[i] = t.exact ? A(__builtin_log2(t.inverse_sum[i])) : A(0);
    for (int key = r.begin / BLOCK_KV * BLOCK_KV; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < r.full_begin || key + n > r.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        Block<A> block = t.blocks.at(key, n);
        RowBlock<A> k = load_rows(p, keys, key, block.n, p.head_dim, block.keys, block.done);
        RowBlock<A> v = load_rows(p, values, key, block.n, p.v_dim, block.values, block.done);
        const float* z =
            p.dropout ? dropout_tile(p, s, tile, key, n, t.keep[0], t.keep[1]) : nullptr;
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            int first = panel * PANEL<A>;
            auto [begin, end] = tile.of_panel(panel, edge, key, n);
            panel_product(t.q_transposed, panel, k, begin, end, t.p + first, TILE_LD);
            panel_product(t.dout_transposed, panel, v, begin, end, t.ds + first, TILE_LD);
            finish_scores(p, tile, panel, key + begin, end - begin, seen == Seen::SOME, edge,
                          t.p + begin * TILE_LD + first, TILE_LD,
                          t.softcap_tanh ? t.softcap_tanh + begin * TILE_LD + first : nullptr);
            if (p.dentropy.data && t.exact)
                panel_gradients<true, true>(p, t, panel, begin, end, n, z);
            else if (p.dentropy.data)
                panel_gradients<false, true>(p, t, panel, begin, end, n, z);
            else if (t.exact)
                panel_gradients<true>(p, t, panel, begin, end, n, z);
            else
                panel_gradients<false>(p, t, panel, begin, end, n, z);
        }
        if (p.dbias.data) add_bias_gradient(p, s, t, key, n);
        if (t.softcap_tanh)
            for (int j = 0; j < n; j++)
                for (int i = 0; i < tile.padded; i += SIMD_WIDTH<A>) {
                    A* x = t.ds + j * TILE_LD + i;
                    Vec<A> ds = load<A>(x), tanh = load<A>(t.softcap_tanh + j * TILE_LD + i);
                    store<A>(x, ds == 0 ? ds : ds * (1 - tanh * tanh));
                }
        int64_t at = key - item.key_begin;
        add_to_keys(t, edge, t.p, key, n, t.dout, t.v_ld,
                    static_cast<A*>(item.dv_sum) + at * t.v_ld);
        add_to_keys(t, edge, t.ds, key, n, t.q, t.k_ld, static_cast<A*>(item.dk_sum) + at * t.k_ld);
        if (!block.done)
            with_type<A>(p.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                pack_panels<A, T>([&](int j) { return keys.row(key + j); }, block.n, p.head_dim,
                                  BLOCK_KV, block.panels);
            });
        add_to_queries(t, edge, t.ds, key, n, block.panels);
    }
}

// --- the kernel ---------------------------------------------------------------------------------

// dk and dv of one (segment, kv head): the sums of its items, added in their order. A key that no
// item sees has a gradient of 0.
template <class A> static void write_key_gradients(const Params& p, const BackwardItem* items,
                                                   int count, Arena& arena) {
    const Segment& s = p.segments[items[0].segment];
    A inverse_keep = p.dropout ? A(1 / p.dropout_key.keep_probability()) : A(1);
    A* total = arena.take<A>(round_up_panel<A>(imax(p.head_dim, p.v_dim)));
    auto write = [&](void* BackwardItem::* sums, int columns, A factor, const Tensor4& to) {
        int ld = round_up_panel<A>(columns);
        for (int j = 0; j < s.band.kv_len; j++) {
            const A* row = nullptr;
            for (int i = 0; i < count; i++) {
                const BackwardItem& item = items[i];
                if (j < item.key_begin || j >= item.key_end) continue;
                const A* next = static_cast<const A*>(item.*sums) +
                                static_cast<int64_t>(j - item.key_begin) * ld;
                if (row != nullptr)
                    for (int c = 0; c < columns; c++) total[c] = row[c] + next[c];
                row = row == nullptr ? next : total;
            }
            char* at = to.bytes_at(s.batch, items[0].kv_head, s.kv_begin + j);
            if (row == nullptr)
                __builtin_memset(at, 0, static_cast<size_t>(columns) * size_of(p.dtype));
            else
                store_row(row, factor, p.dtype, at, columns);
        }
    };
    write(&BackwardItem::dk_sum, p.head_dim, A(p.scale), p.dk);
    write(&BackwardItem::dv_sum, p.v_dim, inverse_keep, p.dv);
}

// The rows of an item, tile by tile. Tile is BackwardTile, or what jvp_bwd.inl has in its place;
// its own allocate(), load_rows_of_tile() and backward_tile() run.
template <class Tile, class A> INLINE void run_item(const Params& p, const BackwardItem& task) {
    BackwardItem item = task;
    const Segment& s = p.segments[item.segment];
    ArenaLease lease;
    Arena& arena = *lease;
    Tile& t = *arena.take<Tile>(1);
    allocate(p, t, arena);
    // In fp32 keys are read where they lie just before they are packed: packing them again is
    // cheaper than reading panels that have left the cache (3 % at S 2048).
    bool keep = size_of(p.dtype) != sizeof(A);
    t.blocks = new_blocks<A>(p, item.segment, item.kv_head, true, t.panel_columns, keep, arena);
    int64_t seen = item.key_end - item.key_begin;
    if (task.dk_sum == nullptr) {
        item.dk_sum = arena.take<A>(seen * t.k_ld);
        item.dv_sum = arena.take<A>(seen * t.v_ld);
    }
    __builtin_memset(item.dk_sum, 0, sizeof(A) * seen * t.k_ld);
    __builtin_memset(item.dv_sum, 0, sizeof(A) * seen * t.v_ld);

    KeyRows keys = key_rows(p, p.k, s, item.kv_head), values = key_rows(p, p.v, s, item.kv_head);
    for (int head = item.kv_head * p.group(); head < (item.kv_head + 1) * p.group(); head++)
        for (int row = item.row_begin; row < item.row_end; row += BLOCK_Q) {
            set_query_tile(p, s, head, 1, row, imin(BLOCK_Q, item.row_end - row), t.tile);
            load_rows_of_tile(p, s, t);
            __builtin_memset(t.dq, 0, sizeof(A) * t.tile.count * t.k_ld);
            backward_tile(p, s, keys, values, item, t, arena);
            for (int i = 0; i < t.tile.count; i++)
                store_row(t.dq + static_cast<int64_t>(i) * t.k_ld, A(p.scale), p.dtype,
                          p.dq.bytes_at(s.batch, head, s.q_begin + row + i), p.head_dim);
        }
    if (task.dk_sum == nullptr) write_key_gradients<A>(p, &item, 1, arena);
}

template <class A> static void backward(const Params& p, const BackwardItem& task) {
    run_item<BackwardTile<A>, A>(p, task);
}

template <class A> static void reduce(const Params& p, const BackwardItem* items, int count) {
    ArenaLease arena;
    write_key_gradients<A>(p, items, count, *arena);
}
