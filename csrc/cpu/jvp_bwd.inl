// The backward of forward mode: gradients of <dtout, tout> + <dtlse, tlse> with respect to q, k, v,
// the bias and the sinks. They are second derivatives of attention. With G = dtout, Z dropout's
// factors, T and x of tangents.inl, the softcap f and the rows' numbers
//   mean = tlse,  delta = rowsum(G out) - dtlse,  nu = rowsum(G tout),
// a tile computes
//   a = Z (G V'),  u = Z (G tV'),  dS = P (a - delta),  gS = P ((a - delta) (T - mean) + u - nu),
//   gS0 = gS f'(x) + dS T0 f''(x),  dS0 = dS f'(x)
// and adds
//   dV = (Z P (T - mean))' G,  dbias = gS,
//   dQ = scale (gS0 K + dS0 tK),  dK = scale (gS0' Q + dS0' tQ).
// The items, the sums and their order are those of backward.inl, whose `p` holds Z P (T - mean) and
// whose `ds` holds gS here.

template <class A> struct JvpBackwardTile : BackwardTile<A> {
    alignas(64) A mean[BLOCK_Q];
    alignas(64) A nu[BLOCK_Q];
    ScoreTangents<A> tangents;        // T, then dS
    A* u;                             // [BLOCK_KV][BLOCK_Q]; null: tv is absent
    A* tq;                            // panels, as q
    bool values_differ;               // dV is not 0
    int tk_panels, tk_rows, tv_rows;  // where they are in a block's panels
};

// --- load ---------------------------------------------------------------------------------------

template <class A> static void allocate(const Params& p, JvpBackwardTile<A>& t, Arena& arena) {
    allocate(p, static_cast<BackwardTile<A>&>(t), arena);
    allocate_tangents(p, BLOCK_Q, true, t.softcap_tanh, t.tangents, arena);
    t.u = p.tv.data ? arena.take<A>(BLOCK_KV * TILE_LD) : nullptr;
    t.tq = p.tq.data ? arena.take<A>(BLOCK_Q * t.k_ld) : nullptr;
    t.values_differ = t.tangents.scores || p.tsinks.data;
    // Panels of k, panels of tk, rows of tk, rows of tv.
    bool rows = !rows_in_place<A>(p);
    int columns = t.panel_columns;
    auto place = [&](bool wanted, int width) {
        int at = columns * BLOCK_KV;
        if (wanted) columns += width;
        return at;
    };
    t.tk_panels = place(p.tk.data, t.k_ld);
    t.tk_rows = place(p.tk.data && rows, p.head_dim);
    t.tv_rows = place(p.tv.data && rows, p.v_dim);
    t.panel_columns = columns;
}

template <class A>
static void load_rows_of_tile(const Params& p, const Segment& s, JvpBackwardTile<A>& t) {
    load_rows_of_tile(p, s, static_cast<BackwardTile<A>&>(t));
    load_tangent_rows(p, s, t.tile, t.tangents, t.buffer);
    const QueryTile<A>& tile = t.tile;
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto row_of = [&](const Tensor4& x, int i) {
            return x.at<T>(s.batch, tile.head[i], s.q_begin + tile.row[i]);
        };
        if (p.tq.data)
            pack_panels<A, T>([&](int i) { return row_of(p.tq, i); }, tile.count, p.head_dim,
                              BLOCK_Q, t.tq);
        for (int i = 0; i < tile.count; i++) {
            int head = tile.head[i], row = s.q_begin + tile.row[i];
            bool dead = *p.lse.at<A>(s.batch, head, row) == A(NEG_INF);
            t.mean[i] = dead ? A(0) : *p.tlse.at<A>(s.batch, head, row);
            t.nu[i] = dead ? A(0) : dot<A>(row_of(p.dout, i), row_of(p.tout, i), p.v_dim);
            if (p.delta.data == nullptr) continue;
            // What the gradient of a sink multiplies its probability by, with the sign of delta.
            A tsink = p.tsinks.data ? bias_at<A>(p.tsinks.dtype, p.tsinks.bytes_at(0, head, 0)) : 0;
            *p.delta.at<A>(s.batch, head, row) = (tsink - t.mean[i]) * t.delta[i] + t.nu[i];
        }
    });
    for (int i = tile.count; i < tile.padded; i++) t.mean[i] = t.nu[i] = 0;
}

// --- one tile -----------------------------------------------------------------------------------

// Of one panel: scores, G V', G tV' and T (in p, ds, u and tangents) to Z P (T - mean), gS and dS
// (in p, ds and tangents). Rows outside `keys` become 0.
template <bool EXACT, class A>
static void panel_second_gradients(const Params& p, JvpBackwardTile<A>& t, int panel,
                                   BlockKeys keys, int n, const float* z) {
    const A inverse_keep = p.dropout ? A(1 / p.dropout_key.keep_probability()) : A(1);
    const A unit = t.tangents.unit;
    A *to_p = t.p, *to_ds = t.ds, *u_of = t.u, *scores = t.tangents.scores;
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> lse = load<A>(t.lse + tile_row), delta = load<A>(t.delta + tile_row);
        Vec<A> mean = load<A>(t.mean + tile_row), nu = load<A>(t.nu + tile_row);
        auto clear = [&](int begin, int end) {
            for (int j = begin; j < end; j++)
                for (A* x : {to_p, to_ds, scores})
                    if (x) store<A>(x + j * TILE_LD + tile_row, Vec<A>{});
        };
        auto rows = [&](int j, auto count) INLINE_LAMBDA {
            constexpr int N = decltype(count)::value;
            int64_t at = j * TILE_LD + tile_row;
            Vec<A> x[N];
            for (int k = 0; k < N; k++) x[k] = load<A>(to_p + at + k * TILE_LD) - lse;
            vexp2<A, N>(x);
            if constexpr (EXACT)
                for (int k = 0; k < N; k++) x[k] *= load<A>(t.inverse_sum + tile_row);
            for (int k = 0; k < N; k++, at += TILE_LD) {
                Vec<A> a = load<A>(to_ds + at), u = u_of ? load<A>(u_of + at) : Vec<A>{};
                Vec<A> centred = (scores ? load<A>(scores + at) * unit : Vec<A>{}) - mean;
                Vec<A> dropped = x[k];
                if (z) {
                    Vec<A> factor = load_dropout<A>(z + (j + k) * DROPOUT_LD + tile_row);
                    dropped *= factor;
                    a *= factor * inverse_keep;
                    u *= factor * inverse_keep;
                }
                Vec<A> ds = x[k] * (a - delta);
                Vec<A> gs = ds * centred + x[k] * (u - nu);
                auto none = x[k] == 0;  // not 0 * NaN where a masked value is NaN
                store<A>(to_p + at, none ? Vec<A>{} : dropped * centred);
                store<A>(to_ds + at, none ? Vec<A>{} : gs);
                if (scores) store<A>(scores + at, none ? Vec<A>{} : ds);
            }
        };
        clear(0, keys.begin);
        int j = keys.begin;
        for (; j + 2 <= keys.end; j += 2) rows(j, std::integral_constant<int, 2>{});
        for (; j < keys.end; j++) rows(j, std::integral_constant<int, 1>{});
        clear(keys.end, n);
    }
}

// gS and dS to gS0 and dS0.
template <class A> static void apply_softcap_slope(const JvpBackwardTile<A>& t, int n) {
    A *scores = t.tangents.scores, *curvature = t.tangents.curvature;
    auto times = [](Vec<A> x, Vec<A> y) INLINE_LAMBDA { return x == 0 ? x : x * y; };
    for (int j = 0; j < n; j++)
        for (int i = 0; i < t.tile.padded; i += SIMD_WIDTH<A>) {
            int64_t at = j * TILE_LD + i;
            Vec<A> tanh = load<A>(t.softcap_tanh + at), slope = 1 - tanh * tanh;
            Vec<A> gs = times(load<A>(t.ds + at), slope);
            if (scores) {
                Vec<A> ds = load<A>(scores + at);
                gs += times(ds, load<A>(curvature + at));
                store<A>(scores + at, times(ds, slope));
            }
            store<A>(t.ds + at, gs);
        }
}

// Compiled once for their several products.
template <class A>
static __attribute__((noinline)) void add_product_to_keys(const JvpBackwardTile<A>& t, bool edge,
                                                          const A* x, int key, int n, const A* rows,
                                                          int columns, A* sum) {
    add_to_keys(t, edge, x, key, n, rows, columns, sum);
}
template <class A>
static __attribute__((noinline)) void add_product_to_queries(const JvpBackwardTile<A>& t, bool edge,
                                                             const A* x, int key, int n,
                                                             const A* panels) {
    add_to_queries(t, edge, x, key, n, panels);
}

// All keys of one tile of query rows.
template <class A> static void backward_tile(const Params& p, const Segment& s, const KeyRows& keys,
                                             const KeyRows& values, const BackwardItem& item,
                                             JvpBackwardTile<A>& t, Arena& arena) {
    const QueryTile<A>& tile = t.tile;
    KeyRows tkeys = tangent_rows(p, p.tk, s, item.kv_head);
    KeyRows tvalues = tangent_rows(p, p.tv, s, item.kv_head);
    Range r = tile.range(0, tile.count);
    if (t.exact) row_statistics(p, keys, r, t, arena);
    for (int key = r.begin / BLOCK_KV * BLOCK_KV; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < r.full_begin || key + n > r.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        Block<A> block = t.blocks.at(key, n);
        auto rows = [&](const KeyRows& from, int columns, A* buffer) {
            if (from.data == nullptr) return RowBlock<A>{};
            return load_rows(p, from, key, block.n, columns, buffer, block.done);
        };
        RowBlock<A> k = rows(keys, p.head_dim, block.keys);
        RowBlock<A> v = rows(values, p.v_dim, block.values);
        RowBlock<A> tk = rows(tkeys, p.head_dim, block.panels + t.tk_rows);
        RowBlock<A> tv = rows(tvalues, p.v_dim, block.panels + t.tv_rows);
        const float* z =
            p.dropout ? dropout_tile(p, s, tile, key, n, t.keep[0], t.keep[1]) : nullptr;
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            BlockKeys part = tile.of_panel(panel, edge, key, n);
            int64_t first = part.begin * TILE_LD + panel * PANEL<A>;
            product<Store::SET>(t.q_transposed, panel, k, part, t.p, TILE_LD);
            product<Store::SET>(t.dout_transposed, panel, v, part, t.ds, TILE_LD);
            if (t.u) product<Store::SET>(t.dout_transposed, panel, tv, part, t.u, TILE_LD);
            tangent_product(p, t.q_transposed, k, tk, t.tangents, panel, part);
            finish_scores(p, tile, panel, key + part.begin, part.end - part.begin,
                          seen == Seen::SOME, edge, t.p + first, TILE_LD,
                          t.softcap_tanh ? t.softcap_tanh + first : nullptr);
            finish_tangents(p, t.tangents, panel, key, part);
            if (t.exact)
                panel_second_gradients<true>(p, t, panel, part, n, z);
            else
                panel_second_gradients<false>(p, t, panel, part, n, z);
        }
        if (p.dbias.data) add_bias_gradient(p, s, t, key, n);
        if (t.softcap_tanh) apply_softcap_slope(t, n);
        int64_t at = key - item.key_begin;
        A* dk = static_cast<A*>(item.dk_sum) + at * t.k_ld;
        A* dv = static_cast<A*>(item.dv_sum) + at * t.v_ld;
        const A* ds = t.tangents.scores;
        if (t.values_differ) add_product_to_keys(t, edge, t.p, key, n, t.dout, t.v_ld, dv);
        add_product_to_keys(t, edge, t.ds, key, n, t.q, t.k_ld, dk);
        if (t.tq) add_product_to_keys(t, edge, ds, key, n, t.tq, t.k_ld, dk);
        if (!block.done)
            with_type<A>(p.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                auto pack = [&](const KeyRows& from, A* to) {
                    pack_panels<A, T>([&](int j) { return from.row(key + j); }, block.n, p.head_dim,
                                      BLOCK_KV, to);
                };
                pack(keys, block.panels);
                if (p.tk.data) pack(tkeys, block.panels + t.tk_panels);
            });
        add_product_to_queries(t, edge, t.ds, key, n, block.panels);
        if (p.tk.data) add_product_to_queries(t, edge, ds, key, n, block.panels + t.tk_panels);
    }
}

// --- the kernel ---------------------------------------------------------------------------------

template <class A> static void jvp_bwd(const Params& p, const BackwardItem& task) {
    run_item<JvpBackwardTile<A>, A>(p, task);
}
