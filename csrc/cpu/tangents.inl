// What forward mode and its backward share: T, the tangent of a tile's scores along tangents of q,
// k and the bias. With x = scale * q k' before the softcap f,
//   T = f'(x) * T0 + tbias,  T0 = scale * (tq k' + q tk')
// next: jvp.inl

template <class A> struct ScoreTangents {
    A* scores;        // T, [BLOCK_KV][ld]; null: nothing that has a tangent changes a score
    A* tanh;          // of the softcap, as finish_scores() leaves it; null: no softcap
    A* curvature;     // f''(x) * T0, [BLOCK_KV][ld]; null: not wanted
    A unit;           // T is this times `scores`: LN2 as long as they are in base 2
    int ld;           // at least the tile's rows
    Transposed<A> q;  // tq, as q
    AddedRows bias;   // tbias
    const char* bias_rows[BLOCK_Q];
};

// --- load ---------------------------------------------------------------------------------------

// tanh is memory for a tile of scores, or null where nobody needs it.
template <class A> static void allocate_tangents(const Params& p, int rows, bool second, A* tanh,
                                                 ScoreTangents<A>& t, Arena& arena) {
    bool any = p.tq.data || p.tk.data || p.tbias.data;
    t.ld = rows;
    t.tanh = tanh;
    t.scores = any ? arena.take<A>(BLOCK_KV * t.ld) : nullptr;
    t.curvature = any && second && tanh ? arena.take<A>(BLOCK_KV * t.ld) : nullptr;
    t.unit = tanh || p.tbias.data ? A(1) : A(LN2);
    if (p.tq.data) t.q = new_transposed<A>(p, rows, p.head_dim, A(p.scale * LOG2E), arena);
}

// `buffer` holds 8 rows of q.
template <class A> static void load_tangent_rows(const Params& p, const Segment& s,
                                                 const QueryTile<A>& tile, ScoreTangents<A>& t,
                                                 A* buffer) {
    if (p.tq.data)
        transpose_rows(
            p, [&](int i) { return p.tq.bytes_at(s.batch, tile.head[i], s.q_begin + tile.row[i]); },
            tile.count, t.q, buffer);
    if (!p.tbias.data) return;
    bool one = true;
    for (int i = 0; i < tile.count; i++) {
        t.bias_rows[i] = p.tbias.bytes_at(s.entry, tile.head[i], s.row0 + tile.row[i]) +
                         s.key0 * p.tbias.col * size_of(p.tbias.dtype);
        one &= t.bias_rows[i] == t.bias_rows[0];
    }
    t.bias = {p.tbias.dtype, p.tbias.col, t.bias_rows, tile.count, one};
}

// The rows of tk or tv.
static KeyRows tangent_rows(const Params& p, const Tensor4& t, const Segment& s, int kv_head) {
    return t.data ? key_rows(p, t, s, kv_head) : KeyRows{};
}

// --- scores -------------------------------------------------------------------------------------

// A product of scores, compiled once for all callers here: each place where it is inlined takes 6
// copies of the micro-kernel.
template <Store STORE, class A>
static __attribute__((noinline)) void product(const Transposed<A>& q, int panel,
                                              const RowBlock<A>& rows, BlockKeys keys, A* to,
                                              int64_t ld) {
    panel_product<STORE>(q, panel, rows, keys.begin, keys.end, to + panel * PANEL<A>, ld);
}

// T0 of one panel, in base 2, for the block's `keys`. k and tk are its rows of keys, and q the
// tile's rows of q.
template <class A> static void tangent_product(const Params& p, const Transposed<A>& q,
                                               const RowBlock<A>& k, const RowBlock<A>& tk,
                                               const ScoreTangents<A>& t, int panel,
                                               BlockKeys keys) {
    if (t.scores == nullptr) return;
    if (p.tq.data) product<Store::SET>(t.q, panel, k, keys, t.scores, t.ld);
    if (p.tk.data && p.tq.data) product<Store::ADD>(q, panel, tk, keys, t.scores, t.ld);
    if (p.tk.data && !p.tq.data) product<Store::SET>(q, panel, tk, keys, t.scores, t.ld);
    if (p.tk.data || p.tq.data) return;
    for (int j = keys.begin; j < keys.end; j++)
        for (int v = 0; v < 2; v++)
            store<A>(t.scores + j * t.ld + panel * PANEL<A> + v * SIMD_WIDTH<A>, Vec<A>{});
}

// T of T0, except for `unit`, for the `keys` of the block that starts with `key`.
template <class A> static void finish_tangents(const Params& p, const ScoreTangents<A>& t,
                                               int panel, int key, BlockKeys keys) {
    if (t.scores == nullptr || t.unit != 1) return;
    A curve = t.curvature ? A(-2 / p.softcap) : A(0);
    for (int j = keys.begin; j < keys.end; j++)
        for (int v = 0; v < 2; v++) {
            int64_t at = j * t.ld + panel * PANEL<A> + v * SIMD_WIDTH<A>;
            Vec<A> x = load<A>(t.scores + at) * A(LN2);
            if (t.tanh) {
                Vec<A> tanh = load<A>(t.tanh + at);
                x *= 1 - tanh * tanh;
                if (t.curvature) store<A>(t.curvature + at, x * tanh * curve);
            }
            store<A>(t.scores + at, x);
        }
    if (p.tbias.data)
        add_rows(p.dtype, t.bias, panel, key + keys.begin, keys.end - keys.begin,
                 t.scores + keys.begin * t.ld + panel * PANEL<A>, t.ld,
                 [](auto x) INLINE_LAMBDA { return x; });
}
