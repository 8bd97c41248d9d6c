// From raw products to scores: everything that stands between q.k and the softmax, for one panel of
// a tile.
// next: dropout.inl
//
// Scores are in base 2: the factor scale * LOG2E is in q (or is applied after the bf16 dot
// product), and to_base2() brings biases there: only -inf masks, and a finite sum stays finite.

// s = cap * tanh(s / cap); `tanh`, if wanted, receives the tanh, for derivatives: 1 - tanh^2.
template <class A> INLINE void apply_softcap(A cap, int n, A* s, int64_t ld, A* tanh) {
    A inverse = 1 / cap;
    for (int j = 0; j < n; j++)
        for (int v = 0; v < 2; v++) {
            A* x = s + j * ld + v * SIMD_WIDTH<A>;
            Vec<A> t = vtanh(load<A>(x) * inverse);
            store<A>(x, t * cap);
            if (tanh) store<A>(tanh + j * ld + v * SIMD_WIDTH<A>, t);
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

// What a tile's rows read of a tensor that is added to the scores: the bias, or its tangent.
struct AddedRows {
    Dtype dtype;
    int64_t col;              // of the tensor: its stride from key to key
    const char* const* rows;  // of the tile, at the segment's first key
    int count;
    bool one;  // every row reads the same one
};

// s += map(x) for the rows x of one panel.
template <class A, class Map> INLINE void add_rows(Dtype dtype, const AddedRows& x, int panel,
                                                   int key, int n, A* s, int64_t ld, Map map) {
    constexpr int W = SIMD_WIDTH<A>;
    int64_t step = x.col * size_of(x.dtype);
    if (x.one) {
        for (int j = 0; j < n; j++) {
            A b = map(bias_at<A>(x.dtype, x.rows[0] + (key + j) * step));
            store<A>(s + j * ld, load<A>(s + j * ld) + b);
            store<A>(s + j * ld + W, load<A>(s + j * ld + W) + b);
        }
        return;
    }
    // Eight rows at a time, transposed; where they are not plain A, converted first.
    constexpr int STEP = imin(8, PANEL<A>);
    alignas(64) A converted[STEP][BLOCK_KV];
    bool in_place = x.col == 1 && (sizeof(A) == 8 ? Dtype::F64 : Dtype::F32) == x.dtype;
    for (int tile_row = 0; tile_row < PANEL<A>; tile_row += STEP) {
        int first = panel * PANEL<A> + tile_row, count = imin(STEP, x.count - first);
        if (!in_place)
            for (int i = 0; i < count; i++) {
                const char* from = x.rows[first + i] + key * step;
                if (x.col == 1 && x.dtype == dtype)
                    with_type<A>(dtype, [&](auto* type) {
                        using T = std::remove_pointer_t<decltype(type)>;
                        convert_row(reinterpret_cast<const T*>(from), converted[i], n);
                    });
                else
                    for (int j = 0; j < n; j++)
                        converted[i][j] = bias_at<A>(x.dtype, from + j * step);
            }
        auto row = [&](int i) {
            return in_place ? reinterpret_cast<const A*>(x.rows[first + i]) + key : converted[i];
        };
        if (count > 0) transpose_mapped<true>(row, count, n, s + tile_row, ld, map);
    }
}

template <class A> INLINE void apply_bias(const Params& p, const QueryTile<A>& tile, int panel,
                                          int key, int n, A* s, int64_t ld) {
    add_rows(p.dtype, {p.bias.dtype, p.bias.col, tile.bias, tile.count, tile.one_bias}, panel, key,
             n, s, ld, [](auto x) INLINE_LAMBDA { return to_base2<A>(x); });
}

template <class A>
INLINE void apply_alibi(const QueryTile<A>& tile, int panel, int key, int n, A* s, int64_t ld) {
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        Vec<A> diagonal = load<A>(tile.diagonal + tile_row), slope = load<A>(tile.slope + tile_row);
        for (int j = 0; j < n; j++) {
            Vec<A> distance = diagonal - A(key + j);
            distance = distance < 0 ? -distance : distance;
            A* x = s + j * ld + v * SIMD_WIDTH<A>;
            store<A>(x, load<A>(x) - slope * distance);
        }
    }
}

// Everything, for keys [key, key + n) of one panel. `edge`: some row does not see all of them.
template <class A> INLINE void finish_scores(const Params& p, const QueryTile<A>& tile, int panel,
                                             int key, int n, bool masked, bool edge, A* s,
                                             int64_t ld, A* softcap_tanh) {
    if (p.softcap > 0) apply_softcap<A>(A(p.softcap * LOG2E), n, s, ld, softcap_tanh);
    if (p.bias.data) apply_bias<A>(p, tile, panel, key, n, s, ld);
    if (p.slopes) apply_alibi<A>(tile, panel, key, n, s, ld);
    if (masked) apply_mask<A>(p, tile, panel, key, n, s, ld);
    if (edge) apply_bounds<A>(tile, panel, key, n, s, ld);
}
