// The query rows of a tile, each with the keys that it sees. A tile of scores is [keys][rows], a
// SIMD lane for each row, so a row's maximum, sum and bounds are plain vertical vector operations.
// next: mask.inl

// Keys of a block, counted from its first one.
struct BlockKeys {
    int begin, end;
};

// The query rows of a tile, those of one query head after those of another.
template <class A> struct QueryTile {
    int count;  // in use; the rest, up to `padded`, see no key
    int padded;
    alignas(64) IntOf<A> lo[BLOCK_Q];  // visible keys [lo, hi), in segment coordinates
    alignas(64) IntOf<A> hi[BLOCK_Q];
    alignas(64) A diagonal[BLOCK_Q];  // key on the row's diagonal
    alignas(64) A slope[BLOCK_Q];     // ALiBi, in base 2
    const char* mask[BLOCK_Q];        // at the segment's first key
    const char* bias[BLOCK_Q];
    bool one_mask, one_bias;          // every row reads the same one (padding masks, for one)
    bool ranged;                      // key ranges: a tile may have keys that no row sees
    int row[BLOCK_Q], head[BLOCK_Q];  // row of the segment, query head

    Range range(int begin, int end) const {  // of rows [begin, end)
        Range r{INT32_MAX, 0, INT32_MAX, 0};
        for (int i = begin; i < end; i++) {
            r.begin = imin(r.begin, static_cast<int>(lo[i]));
            r.full_begin = imax(r.full_begin, static_cast<int>(lo[i]));
            r.full_end = imin(r.full_end, static_cast<int>(hi[i]));
            r.end = imax(r.end, static_cast<int>(hi[i]));
        }
        return r;
    }
    // Whether some row sees one of keys [begin, end).
    bool sees(int begin, int end) const {
        for (int i = 0; i < count; i++)
            if (lo[i] < end && hi[i] > begin) return true;
        return false;
    }
    // Of keys [key, key + n), those between the first and the last that a row of the panel sees.
    // `edge`: some row of the tile does not see all of them.
    INLINE_MEMBER BlockKeys of_panel(int panel, bool edge, int key, int n) const {
        if (!edge) return {0, n};
        int first = panel * PANEL<A>;
        Range seen = range(first, imin(count, first + PANEL<A>));
        int from = imin(n, imax(0, seen.begin - key));
        return {from, imax(from, imin(n, seen.end - key))};
    }
    // How many rows from `first` on, at most `most`, make one product: each sees a key that those
    // before it see, so some row sees each key of their range, or they see nothing at all.
    int overlapping(int first, int most) const {
        int end = imin(count, first + most);
        if (!ranged) return end - first;
        Range seen = range(first, first + 1);
        for (int i = first + 1; i < end; i++) {
            bool any = seen.begin < seen.end && lo[i] < hi[i];
            if (any && (lo[i] >= seen.end || hi[i] <= seen.begin)) return i - first;
            seen.begin = imin(seen.begin, static_cast<int>(lo[i]));
            seen.end = imax(seen.end, static_cast<int>(hi[i]));
        }
        return end - first;
    }
};

template <class A> INLINE A slope_in_base2(float slope) {
    double x = slope * LOG2E;
    if (x - x != 0) return A(x);  // infinite or NaN
    return A(x > MAX_SLOPE ? MAX_SLOPE : x < -MAX_SLOPE ? -MAX_SLOPE : x);
}

// Each row's bounds within its key range. A row that sees nothing widens no range.
template <class A>
static void narrow_query_tile(const KeyRanges& ranges, const Segment& s, QueryTile<A>& tile) {
    for (int i = 0; i < tile.count; i++) {
        int lo = imax(static_cast<int>(tile.lo[i]), ranges.first(s, tile.head[i], tile.row[i]));
        int hi = imin(static_cast<int>(tile.hi[i]), ranges.past(s, tile.head[i], tile.row[i]));
        tile.lo[i] = lo < hi ? lo : s.band.kv_len;
        tile.hi[i] = lo < hi ? hi : 0;
    }
}

// Rows row_of(0) to row_of(rows - 1) of `heads` heads from `head` on.
template <class A, class RowOf> INLINE void set_query_rows(const Params& p, const Segment& s,
                                                           int head, int heads, int rows,
                                                           RowOf row_of, QueryTile<A>& tile) {
    tile.count = heads * rows;
    tile.padded = round_up_panel<A>(tile.count);
    int tile_row = 0;
    for (int h = head; h < head + heads; h++)
        for (int n = 0; n < rows; n++, tile_row++) {
            int i = row_of(n);
            tile.lo[tile_row] = s.band.lo(i);
            tile.hi[tile_row] = s.band.hi(i);
            tile.diagonal[tile_row] = A(i) + A(s.band.offset);
            tile.row[tile_row] = i;
            tile.head[tile_row] = h;
            if (p.slopes)
                tile.slope[tile_row] = slope_in_base2<A>(p.slopes[s.sequence * p.slopes_batch + h]);
            if (p.mask.data)
                tile.mask[tile_row] =
                    p.mask.bytes_at(s.sequence, h, s.row0 + i) + s.key0 * p.mask.col;
            if (p.bias.data)
                tile.bias[tile_row] = p.bias.bytes_at(s.sequence, h, s.row0 + i) +
                                      s.key0 * p.bias.col * size_of(p.bias.dtype);
        }
    for (; tile_row < tile.padded; tile_row++) {
        tile.lo[tile_row] = s.band.kv_len;  // sees nothing, and keeps lo and hi from decreasing
        tile.hi[tile_row] = s.band.kv_len;
        tile.diagonal[tile_row] = tile.slope[tile_row] = 0;
    }
    tile.ranged = p.key_ranges.given();
    if (tile.ranged) narrow_query_tile(p.key_ranges, s, tile);
    tile.one_mask = tile.one_bias = true;
    for (int i = 1; i < tile.count; i++) {
        tile.one_mask &= p.mask.data == nullptr || tile.mask[i] == tile.mask[0];
        tile.one_bias &= p.bias.data == nullptr || tile.bias[i] == tile.bias[0];
    }
}

// Rows [row, row + rows).
template <class A> static void set_query_tile(const Params& p, const Segment& s, int head,
                                              int heads, int row, int rows, QueryTile<A>& tile) {
    set_query_rows(p, s, head, heads, rows, [&](int n) { return row + n; }, tile);
}
