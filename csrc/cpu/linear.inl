// The weight gradient of a Linear: dweight[i][j] = sum over rows r of dout[r][i] * x[r][j].
// next: gemm.inl
//
// In both operands the rows, over which the sum goes, are the outer dimension, so packing is
// copying: dout into strips of GEMM_ROWS columns, x into panels, WEIGHT_DEPTH rows at a time. A
// block of x (256 KB in fp32) and one of dout (96 KB) stay in L2 while they are multiplied.

static_assert(WEIGHT_ROWS % GEMM_ROWS == 0 && WEIGHT_COLUMNS % PANEL<float> == 0);

// Rows of the call in depth block k.
INLINE int depth_of(const WeightCall& c, int k) {
    return imin(WEIGHT_DEPTH, c.depth - k * WEIGHT_DEPTH);
}
// Where depth block k's part of strips or panels of `width` columns, padding included, begins.
template <class A> INLINE A* block_of(void* packed, int k, int width) {
    return static_cast<A*>(packed) + static_cast<int64_t>(k) * WEIGHT_DEPTH * width;
}
INLINE int round_up(int n, int step) { return (n + step - 1) / step * step; }

// dout's columns [begin, end) of depth block k, and their sums if they are wanted.
template <class A> static void pack_strips(const WeightCall& c, int k, int begin, int end) {
    const int depth = depth_of(c, k);
    A* to = block_of<A>(c.strips, k, round_up(c.out, WEIGHT_ROWS));
    A sums[WEIGHT_ROWS] = {};
    for (int r = 0; r < depth; r++) {
        const A* row = row_of<A>(c.dout, static_cast<int64_t>(k) * WEIGHT_DEPTH + r);
        int i = begin;
        for (; i + GEMM_ROWS <= end; i += GEMM_ROWS)
            __builtin_memcpy(to + static_cast<int64_t>(i) * depth + r * GEMM_ROWS, row + i,
                             GEMM_ROWS * sizeof(A));
        for (int j = 0; i + j < end; j++)
            to[static_cast<int64_t>(i) * depth + r * GEMM_ROWS + j] = row[i + j];
        if (c.sums != nullptr)
            over<A>(end - begin, [&](int j, int left, int) INLINE_LAMBDA {
                put<A>(sums + j, take<A>(sums + j, left) + take<A>(row + begin + j, left), left);
            });
    }
    if (c.sums != nullptr)
        __builtin_memcpy(static_cast<A*>(c.sums) + static_cast<int64_t>(k) * c.out + begin, sums,
                         (end - begin) * sizeof(A));
}

// One item of the copying: a block of dout, or of x.
template <class A> static void weight_pack(const WeightCall& c, int item) {
    const int row_blocks = (c.out + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    const int column_blocks = (c.in + WEIGHT_COLUMNS - 1) / WEIGHT_COLUMNS;
    const int k = item / (row_blocks + column_blocks), n = item % (row_blocks + column_blocks);
    if (n < row_blocks)
        return pack_strips<A>(c, k, n * WEIGHT_ROWS, imin(c.out, (n + 1) * WEIGHT_ROWS));
    const int depth = depth_of(c, k), begin = (n - row_blocks) * WEIGHT_COLUMNS;
    A* to = block_of<A>(c.panels, k, round_up(c.in, WEIGHT_COLUMNS));
    pack_panels<A, A>(
        [&](int r) { return row_of<A>(c.x, static_cast<int64_t>(k) * WEIGHT_DEPTH + r) + begin; },
        depth, imin(WEIGHT_COLUMNS, c.in - begin), depth, to + static_cast<int64_t>(begin) * depth);
}

// dweight's rows [i, i + rows), columns [j, j + columns) (+)= strip * panel.
template <Store STORE, class A> INLINE void weight_tile(const WeightCall& c, int i, int j, int rows,
                                                        int depth, const A* strip, const A* panel) {
    constexpr const A* NO_RESCALE = nullptr;
    A* to = static_cast<A*>(c.dweight) + static_cast<int64_t>(i) * c.in + j;
    const int columns = imin(PANEL<A>, c.in - j);
    if (columns == PANEL<A>)
        return micro_rows<Order::COLUMNS, STORE>(rows, depth, strip, GEMM_ROWS, panel, PANEL<A>, to,
                                                 c.in, NO_RESCALE);
    A tile[GEMM_ROWS * PANEL<A>];
    micro_rows<Order::COLUMNS, Store::SET>(rows, depth, strip, GEMM_ROWS, panel, PANEL<A>, tile,
                                           PANEL<A>, NO_RESCALE);
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < columns; n++) {
            A& at = to[static_cast<int64_t>(r) * c.in + n];
            at = STORE == Store::ADD ? at + tile[r * PANEL<A> + n] : tile[r * PANEL<A> + n];
        }
}

// One item of the product: a block of dweight.
template <class A> static void weight_product(const WeightCall& c, int item) {
    const int row_blocks = (c.out + WEIGHT_ROWS - 1) / WEIGHT_ROWS;
    const int i0 = item % row_blocks * WEIGHT_ROWS, i1 = imin(c.out, i0 + WEIGHT_ROWS);
    const int j0 = item / row_blocks * WEIGHT_COLUMNS, j1 = imin(c.in, j0 + WEIGHT_COLUMNS);
    for (int k = 0; k * WEIGHT_DEPTH < c.depth; k++) {
        const int depth = depth_of(c, k);
        const A* strips = block_of<A>(c.strips, k, round_up(c.out, WEIGHT_ROWS));
        const A* panels = block_of<A>(c.panels, k, round_up(c.in, WEIGHT_COLUMNS));
        for (int i = i0; i < i1; i += GEMM_ROWS)
            for (int j = j0; j < j1; j += PANEL<A>) {
                const A *strip = strips + static_cast<int64_t>(i) * depth,
                        *panel = panels + static_cast<int64_t>(j) * depth;
                const int rows = imin(GEMM_ROWS, i1 - i);
                if (k == 0 && !c.add)
                    weight_tile<Store::SET>(c, i, j, rows, depth, strip, panel);
                else
                    weight_tile<Store::ADD>(c, i, j, rows, depth, strip, panel);
            }
    }
}
