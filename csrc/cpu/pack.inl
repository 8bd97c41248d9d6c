// Rows of q, k, v and their gradients copied into the form that gemm.inl reads, converted to the
// type of arithmetic on the way.
// next: product.inl
//
// A panel is PANEL columns wide. "Panels" are [columns / PANEL][rows][PANEL]: the B operand of a
// product. "Transposed panels" are [rows / PANEL][columns][PANEL]: each row has a SIMD lane.

template <class A> INLINE int round_up_panel(int n) {
    return (n + PANEL<A> - 1) / PANEL<A> * PANEL<A>;
}

// Keys (or values) of one segment and kv head, contiguous in memory or scattered over pages.
struct KeyRows {
    const char* data;
    int64_t row_bytes;
    const int* pages;  // this entry's row of the page table; null: contiguous
    int page_size;
    int64_t page_bytes;
    int first;  // the segment's first key, counted in pages from the entry's key 0

    INLINE_MEMBER const char* row(int j) const {
        if (pages == nullptr) return data + j * row_bytes;
        j += first;
        return data + pages[j / page_size] * page_bytes + (j % page_size) * row_bytes;
    }
};

static KeyRows key_rows(const Params& p, const Tensor4& t, const Segment& s, int kv_head) {
    int64_t size = size_of(p.dtype);
    if (p.page_table == nullptr)
        return {t.bytes_at(s.batch, kv_head, s.kv_begin), t.row * size, nullptr, 1, 0, 0};
    return {t.bytes_at(0, kv_head, 0),
            t.row * size,
            p.page_table + s.sequence * p.page_table_row,
            p.page_size,
            t.batch * size,
            s.kv_begin};
}

// [n rows][columns] -> panels of `capacity` rows; columns are padded with 0 to a whole panel.
template <class A, class T, class RowOf>
INLINE void pack_panels(RowOf row_of, int n, int columns, int capacity, A* to) {
    constexpr int W = SIMD_WIDTH<A>;
    int whole = columns / PANEL<A>;
    for (int r = 0; r < n; r++) {
        const T* from = reinterpret_cast<const T*>(row_of(r));
        A* row = to + r * PANEL<A>;
        for (int c = 0; c < whole; c++) {
            store<A>(row, load_as<A>(from + c * PANEL<A>));
            store<A>(row + W, load_as<A>(from + c * PANEL<A> + W));
            row += static_cast<int64_t>(capacity) * PANEL<A>;
        }
        if (whole * PANEL<A> < columns)
            for (int i = 0; i < PANEL<A>; i++) {
                int c = whole * PANEL<A> + i;
                row[i] = c < columns ? A(to_float(from[c])) : A(0);
            }
    }
}

typedef float Float8 __attribute__((vector_size(32)));
typedef float Float8Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

// to[c * to_ld + r] (+)= map(row(r)[c]) for 8 rows and columns; row(r) points to floats.
template <bool ADD, class RowOf, class Map>
INLINE void transpose8(RowOf row, float* to, int64_t to_ld, Map map) {
    Float8 r[8], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = map(Float8(*reinterpret_cast<const Float8Unaligned*>(row(i))));
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = __builtin_shufflevector(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = __builtin_shufflevector(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        s[i] = __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        s[i + 4] = __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        Float8Unaligned* at = reinterpret_cast<Float8Unaligned*>(to + i * to_ld);
        *at = ADD ? *at + s[i] : s[i];
    }
}

// to[c * to_ld + r] (+)= map(row(r)[c]) for `rows` x `columns`.
template <bool ADD, class A, class RowOf, class Map>
INLINE void transpose_mapped(RowOf row, int rows, int columns, A* to, int64_t to_ld, Map map) {
    auto element = [&](int r, int c) {
        A x = map(row(r)[c]);
        to[c * to_ld + r] = ADD ? to[c * to_ld + r] + x : x;
    };
    int r0 = 0;
    if constexpr (sizeof(A) == 4)
        for (; r0 + 8 <= rows; r0 += 8) {
            int c = 0;
            for (; c + 8 <= columns; c += 8)
                transpose8<ADD>([&](int r) { return row(r0 + r) + c; }, to + c * to_ld + r0, to_ld,
                                map);
            for (; c < columns; c++)
                for (int r = r0; r < r0 + 8; r++) element(r, c);
        }
    for (; r0 < rows; r0++)
        for (int c = 0; c < columns; c++) element(r0, c);
}

// The same with factor * row(r)[c].
template <bool ADD, class A, class RowOf>
INLINE void transpose(RowOf row, int rows, int columns, A* to, int64_t to_ld, A factor) {
    transpose_mapped<ADD>(row, rows, columns, to, to_ld,
                          [&](auto x) INLINE_LAMBDA { return x * factor; });
}

// [n rows][columns] -> transposed panels, times factor; rows past n are 0. `buffer` holds 8 rows.
template <class A, class T, class RowOf>
INLINE void pack_transposed(RowOf row_of, int n, int columns, A factor, A* buffer, A* to) {
    constexpr int STEP = imin(8, PANEL<A>);
    for (int r = 0; r < round_up_panel<A>(n); r += STEP) {
        A* panel = to + static_cast<int64_t>(r / PANEL<A>) * columns * PANEL<A> + r % PANEL<A>;
        int rows = imin(STEP, imax(0, n - r));
        for (int i = 0; i < rows; i++)
            convert_row(reinterpret_cast<const T*>(row_of(r + i)), buffer + i * columns, columns);
        for (int i = rows; i < STEP; i++)
            for (int c = 0; c < columns; c++) buffer[i * columns + c] = 0;
        transpose<false>([&](int i) { return buffer + i * columns; }, STEP, columns, panel,
                         PANEL<A>, factor);
    }
}
