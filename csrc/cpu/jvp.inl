// Forward mode: the forward kernel and the derivative of its results along tangents of q, k, v, the
// bias and the sinks, in one pass over the keys. Beside the forward's acc = sum Z P V and
// row_sum = sum P, where P = exp(S - row_max) and Z are dropout's factors, a tile sums
//   tacc = sum Z P tV + (Z P T) V,  tangent_sum = sum P T
// with T of tangents.inl, and ends with
//   tlse = tangent_sum / row_sum,  tout = tacc / row_sum - tlse * out.
// A tangent that is absent is zero, and its products are skipped.
// next: jvp_bwd.inl

template <class A> struct JvpTile : ForwardTile<A> {
    alignas(64) A tangent_sum[BLOCK_Q];  // rescaled with row_sum
    ScoreTangents<A> tangents;           // T, then P T
    A* tacc;                             // [rows][acc_ld]
};

// --- load ---------------------------------------------------------------------------------------

template <class A>
static void load_jvp_tile(const Params& p, const Segment& s, JvpTile<A>& t, Arena& arena) {
    const QueryTile<A>& tile = t.tile;
    t.ld = tile.padded;
    t.acc_ld = round_up_panel<A>(p.v_dim);
    t.dot_ld = 0;
    load_queries(p, s, t, arena);
    A* tanh = p.softcap > 0 && (p.tq.data || p.tk.data) ? arena.take<A>(BLOCK_KV * t.ld) : nullptr;
    allocate_tangents(p, t.ld, false, tanh, t.tangents, arena);
    load_tangent_rows(p, s, tile, t.tangents, arena.take<A>(8 * p.head_dim));
    t.scores = arena.take<A>(BLOCK_KV * t.ld);
    int64_t size = static_cast<int64_t>(tile.count) * t.acc_ld;
    for (A** acc : {&t.acc, &t.tacc}) {
        *acc = arena.take<A>(size);
        __builtin_memset(*acc, 0, sizeof(A) * size);
    }
    if (p.dropout)
        for (DropoutTile& keep : t.keep)
            keep = reinterpret_cast<DropoutTile>(arena.take<float>(DROPOUT_ROWS * DROPOUT_LD));
    for (int i = 0; i < tile.padded; i++) {
        t.row_max[i] = A(NEG_INF);
        t.row_sum[i] = t.tangent_sum[i] = 0;
    }
}

// --- softmax ------------------------------------------------------------------------------------

// T to P T for rows [begin, end) of a panel whose scores are probabilities by now, 0 elsewhere in
// [0, n); and its sums.
template <class A> static void panel_tangents(JvpTile<A>& t, int panel, BlockKeys keys, int n) {
    if (t.tangents.scores == nullptr) return;
    const A unit = t.tangents.unit;
    const int64_t ld = t.ld;
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        const A* probs = t.scores + tile_row;
        A* tangents = t.tangents.scores + tile_row;
        Vec<A> sum = {};
        for (int j = keys.begin; j < keys.end; j++) {
            Vec<A> x = load<A>(probs + j * ld);
            Vec<A> h = x * (load<A>(tangents + j * ld) * unit);
            h = x == 0 ? x : h;  // not 0 * NaN where a masked value is NaN
            store<A>(tangents + j * ld, h);
            sum += h;
        }
        for (int j = 0; j < keys.begin; j++) store<A>(tangents + j * ld, Vec<A>{});
        for (int j = keys.end; j < n; j++) store<A>(tangents + j * ld, Vec<A>{});
        Vec<A> before = load<A>(t.tangent_sum + tile_row) * load<A>(t.rescale + tile_row);
        store<A>(t.tangent_sum + tile_row, before + sum);
    }
}

// --- output -------------------------------------------------------------------------------------

// Compiled once for its three or four products.
template <Store STORE, class A>
static __attribute__((noinline)) void add_values(const JvpTile<A>& t, bool edge, const Range& r,
                                                 int key, int n, const ValuePanels<A>& values,
                                                 const A* weights, A* acc) {
    accumulate<STORE>(t, edge, r, key, n, values, weights, acc);
}

template <class A> static void accumulate_tangents(const Params& p, const JvpTile<A>& t, bool edge,
                                                   const Range& r, int key, int n,
                                                   const A* panels) {
    ValuePanels<A> v{panels, t.acc_ld, BLOCK_KV * PANEL<A>, PANEL<A>}, tv = v;
    tv.data += BLOCK_KV * t.acc_ld;
    const A* pt = t.tangents.scores;
    add_values<Store::RESCALE>(t, edge, r, key, n, v, t.scores, t.acc);
    if (pt) add_values<Store::RESCALE>(t, edge, r, key, n, v, pt, t.tacc);
    if (p.tv.data && pt) add_values<Store::ADD>(t, edge, r, key, n, tv, t.scores, t.tacc);
    if (p.tv.data && !pt) add_values<Store::RESCALE>(t, edge, r, key, n, tv, t.scores, t.tacc);
}

// One row's results: those of the forward, and their tangents, which are 0 for a row that has seen
// no key.
template <class A>
static void write_row_and_tangent(const Params& p, const Segment& s, const JvpTile<A>& t, int i) {
    int head = t.tile.head[i], row = t.tile.row[i];
    const A* acc = t.acc + static_cast<int64_t>(i) * t.acc_ld;
    A* tacc = t.tacc + static_cast<int64_t>(i) * t.acc_ld;
    write_row(p, s, head, row, t.row_max[i], t.row_sum[i], acc);
    A tlse = 0, factor = 0;
    if (t.row_sum[i] == 0) {
        __builtin_memset(tacc, 0, sizeof(A) * p.v_dim);
    } else {
        WithSink<A> whole(p, head, t.row_max[i], t.row_sum[i]);
        A sum = t.tangent_sum[i] * whole.keys;
        if (p.tsinks.data && whole.sink != 0)
            sum += whole.sink * bias_at<A>(p.tsinks.dtype, p.tsinks.bytes_at(0, head, 0));
        tlse = sum / whole.row_sum;
        factor = whole.keys / whole.row_sum;
        if (p.dropout) factor = A(factor / p.dropout_key.keep_probability());
        for (int c = 0; c < p.v_dim; c++) tacc[c] -= tlse * acc[c];
    }
    store_row(tacc, factor, p.dtype, p.tout.bytes_at(s.batch, head, s.q_begin + row), p.v_dim);
    *p.tlse.at<A>(s.batch, head, s.q_begin + row) = tlse;
}

// --- the kernel ---------------------------------------------------------------------------------

template <class A> static void jvp(const Params& p, const ForwardItem& item) {
    const Segment& s = p.segments[item.segment];
    ArenaLease lease;
    Arena& arena = *lease;
    JvpTile<A>& t = *arena.take<JvpTile<A>>(1);
    set_query_tile(p, s, item.head, item.heads, item.row, item.rows, t.tile);
    load_jvp_tile(p, s, t, arena);
    const QueryTile<A>& tile = t.tile;

    int kv_head = item.head / p.group();
    KeyRows keys = key_rows(p, p.k, s, kv_head), values = key_rows(p, p.v, s, kv_head);
    KeyRows tkeys = tangent_rows(p, p.tk, s, kv_head), tvalues = tangent_rows(p, p.tv, s, kv_head);
    Range r = tile.range(0, tile.count);
    // Whole blocks, so that tiles whose key ranges begin elsewhere share what is packed.
    if (tile.ranged) r.begin = r.begin / BLOCK_KV * BLOCK_KV;
    bool more_tiles = tile.count < s.band.q_len * p.group() && r.begin % BLOCK_KV == 0;
    // Panels of v, then those of tv, then the rows of tk.
    int columns = t.acc_ld * (p.tv.data ? 2 : 1), tk_at = columns * BLOCK_KV;
    if (p.tk.data && !rows_in_place<A>(p)) columns += p.head_dim;
    t.blocks = new_blocks<A>(p, item.segment, kv_head, false, columns, more_tiles, arena);

    for (int key = r.begin; key < r.end; key += BLOCK_KV) {
        int n = imin(BLOCK_KV, r.end - key);
        bool edge = key < r.full_begin || key + n > r.full_end;
        if (edge && tile.ranged && !tile.sees(key, key + n)) continue;
        Seen seen = p.mask.data ? mask_summary(p, tile, key, n) : Seen::ALL;
        if (seen == Seen::NONE) continue;
        Block<A> block = t.blocks.at(key, n);
        RowBlock<A> k = load_rows(p, keys, key, block.n, p.head_dim, block.keys, block.done), tk{};
        if (p.tk.data)
            tk = load_rows(p, tkeys, key, block.n, p.head_dim, block.panels + tk_at, block.done);
        for (int panel = 0; panel * PANEL<A> < tile.padded; panel++) {
            BlockKeys part = tile.of_panel(panel, edge, key, n);
            A *scores = t.scores + panel * PANEL<A>, *first = scores + part.begin * t.ld;
            product<Store::SET>(t.q, panel, k, part, t.scores, t.ld);
            tangent_product(p, t.q, k, tk, t.tangents, panel, part);
            finish_scores(p, tile, panel, key + part.begin, part.end - part.begin,
                          seen == Seen::SOME, edge, first, t.ld,
                          t.tangents.tanh ? t.tangents.tanh + (first - t.scores) : nullptr);
            finish_tangents(p, t.tangents, panel, key, part);
            panel_softmax(t, panel, part.begin, part.end, n, scores);
            panel_tangents(t, panel, part, n);
        }
        if (p.dropout) {
            const float* z = dropout_tile(p, s, tile, key, n, t.keep[0], t.keep[1]);
            drop(t, z, n, t.scores);
            if (t.tangents.scores) drop(t, z, n, t.tangents.scores);
        }
        if (!block.done)
            with_type<A>(p.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                auto pack = [&](const KeyRows& rows, A* to) {
                    pack_panels<A, T>([&](int j) { return rows.row(key + j); }, block.n, p.v_dim,
                                      BLOCK_KV, to);
                };
                pack(values, block.panels);
                if (p.tv.data) pack(tvalues, block.panels + BLOCK_KV * t.acc_ld);
            });
        accumulate_tangents(p, t, edge, r, key, n, block.panels);
    }
    for (int i = 0; i < tile.count; i++) write_row_and_tangent(p, s, t, i);
}
