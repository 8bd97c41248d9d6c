// The products that make scores, [keys][query rows]: rows of k (or v) times transposed rows of q
// (or dout). In fp32 (fp64), or on bf16 pairs where the instruction set has that dot product.
// next: block.inl

// Query rows as transposed panels, with `factor` in them or applied afterwards.
template <class A> struct Transposed {
    A* panels;  // [rows / PANEL][columns][PANEL], times factor
    uint32_t*
        pairs;  // [rows / PANEL][columns / 2, rounded up][PANEL] pairs of bf16; null: not used
    int columns;
    A factor;
};

// Keys (values) of one block, row by row.
template <class A> struct RowBlock {
    const A* data;
    const uint16_t* bf16_data;  // bf16 in place, for the products on pairs; null: not used
    int64_t ld;
};

template <class A> INLINE bool use_pairs(const Params& p) {
    return FASTATTN_BF16_DOT && sizeof(A) == 4 && p.dtype == Dtype::BF16 && p.page_table == nullptr;
}

// Whether rows of keys and values are read where they lie.
template <class A> INLINE bool rows_in_place(const Params& p) {
    return p.page_table == nullptr && (size_of(p.dtype) == sizeof(A) || use_pairs<A>(p));
}

template <class A> INLINE Transposed<A> new_transposed(const Params& p, int rows, int columns,
                                                       A factor, Arena& arena) {
    if (use_pairs<A>(p))
        return {nullptr, arena.take<uint32_t>(rows * ((columns + 1) / 2)), columns, factor};
    return {arena.take<A>(rows * columns), nullptr, columns, factor};
}

// Fills `to` from rows given by row_of(i), i < n; those past n are 0. `buffer` holds 8 rows.
template <class A, class RowOf> INLINE void transpose_rows(const Params& p, RowOf row_of, int n,
                                                           const Transposed<A>& to, A* buffer) {
    if (to.pairs == nullptr)
        return with_type<A>(p.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            pack_transposed<A, T>(row_of, n, to.columns, to.factor, buffer, to.panels);
        });
    int pairs = (to.columns + 1) / 2;
    for (int i = 0; i < round_up_panel<A>(n); i++) {
        uint32_t* column =
            to.pairs + static_cast<int64_t>(i / PANEL<A>) * pairs * PANEL<A> + i % PANEL<A>;
        const uint16_t* row = i < n ? reinterpret_cast<const uint16_t*>(row_of(i)) : nullptr;
        for (int d = 0; d < pairs; d++) {
            uint32_t low = row ? row[2 * d] : 0,
                     high = row && 2 * d + 1 < to.columns ? row[2 * d + 1] : 0;
            column[d * PANEL<A>] = low | high << 16;
        }
    }
}

// Rows [first, first + n): where they lie if they can be read in place, else in `buffer`, converted
// into it unless that has been done.
template <class A> INLINE RowBlock<A> load_rows(const Params& p, const KeyRows& keys, int first,
                                                int n, int columns, A* buffer, bool done = false) {
    if (use_pairs<A>(p))
        return {nullptr, reinterpret_cast<const uint16_t*>(keys.row(first)), keys.row_bytes / 2};
    if (keys.pages == nullptr && size_of(p.dtype) == sizeof(A))
        return {reinterpret_cast<const A*>(keys.row(first)), nullptr,
                keys.row_bytes / static_cast<int64_t>(sizeof(A))};
    if (done) return {buffer, nullptr, columns};
    with_type<A>(p.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for (int j = 0; j < n; j++)
            convert_row(reinterpret_cast<const T*>(keys.row(first + j)), buffer + j * columns,
                        columns);
    });
    return {buffer, nullptr, columns};
}

// to[key][row] of one panel, set or added to, for keys [begin, end) of the block.
template <Store STORE = Store::SET, class A>
INLINE void panel_product(const Transposed<A>& q, int panel, const RowBlock<A>& rows, int begin,
                          int end, A* to, int64_t ld) {
    if constexpr (FASTATTN_BF16_DOT && sizeof(A) == 4)
        if (q.pairs) {
            const uint32_t* pairs =
                q.pairs + static_cast<int64_t>(panel) * ((q.columns + 1) / 2) * PANEL<A>;
            int j = begin;
            for (; j + GEMM_ROWS <= end; j += GEMM_ROWS)
                micro_pairs<GEMM_ROWS, STORE>(q.columns, rows.bf16_data + j * rows.ld, rows.ld,
                                              pairs, to + j * ld, ld, q.factor);
            for (; j < end; j++)
                micro_pairs<1, STORE>(q.columns, rows.bf16_data + j * rows.ld, rows.ld, pairs,
                                      to + j * ld, ld, q.factor);
            return;
        }
    const A* panels = q.panels + static_cast<int64_t>(panel) * q.columns * PANEL<A>;
    for (int j = begin; j < end; j += GEMM_ROWS)
        micro_rows<Order::ROWS, STORE>(imin(GEMM_ROWS, end - j), q.columns, rows.data + j * rows.ld,
                                       rows.ld, panels, PANEL<A>, to + j * ld, ld,
                                       static_cast<const A*>(nullptr));
}
