// What of a tile is hidden: the bool mask, where a call has one, and the rows' own bounds.
// next: score.inl

enum class Seen { NONE, SOME, ALL };

// What the mask lets through of keys [key, key + n): NONE skips the tile, ALL skips the test.
template <class A>
INLINE Seen mask_summary(const Params& p, const QueryTile<A>& tile, int key, int n) {
    constexpr uint64_t ONES = 0x0101010101010101ull;
    uint64_t any = 0, all = ONES;
    for (int tile_row = 0; tile_row < (tile.one_mask ? 1 : tile.count); tile_row++) {
        const char* row = tile.mask[tile_row] + key * p.mask.col;
        int j = 0;
        if (p.mask.col == 1)
            for (; j + 8 <= n; j += 8) {
                uint64_t eight;
                __builtin_memcpy(&eight, row + j, 8);
                any |= eight;
                all &= eight;
            }
        for (; j < n; j++) {
            any |= row[j * p.mask.col] ? 1 : 0;
            all &= row[j * p.mask.col] ? ONES : 0;
        }
    }
    return any == 0 ? Seen::NONE : all == ONES ? Seen::ALL : Seen::SOME;
}

// 8x8 bytes: byte i of to[j] = byte j of from[i].
INLINE void transpose_bytes8(const uint64_t* from, uint64_t* to) {
    uint64_t x[8], y[8];
    for (int i = 0; i < 8; i += 2) {
        x[i] = (from[i] & 0x00ff00ff00ff00ffull) | (from[i + 1] & 0x00ff00ff00ff00ffull) << 8;
        x[i + 1] = (from[i] >> 8 & 0x00ff00ff00ff00ffull) | (from[i + 1] & 0xff00ff00ff00ff00ull);
    }
    for (int i = 0; i < 8; i++) {  // pairs of rows 2 apart, units of 2 bytes
        if (i & 2) continue;
        y[i] = (x[i] & 0x0000ffff0000ffffull) | (x[i + 2] & 0x0000ffff0000ffffull) << 16;
        y[i + 2] = (x[i] >> 16 & 0x0000ffff0000ffffull) | (x[i + 2] & 0xffff0000ffff0000ull);
    }
    for (int i = 0; i < 4; i++) {
        to[i] = (y[i] & 0xffffffffull) | y[i + 4] << 32;
        to[i + 4] = y[i] >> 32 | (y[i + 4] & 0xffffffff00000000ull);
    }
}

template <class A> struct Bytes {
    typedef uint8_t V __attribute__((vector_size(SIMD_WIDTH<A>)));
};

// s[key][row] = -inf where the mask is false, for one panel.
template <class A> INLINE void apply_mask(const Params& p, const QueryTile<A>& tile, int panel,
                                          int key, int n, A* s, int64_t ld) {
    constexpr int W = SIMD_WIDTH<A>;
    if (tile.one_mask) {
        const char* row = tile.mask[0] + key * p.mask.col;
        for (int j = 0; j < n; j++)
            if (!row[j * p.mask.col]) {
                store<A>(s + j * ld, splat(A(NEG_INF)));
                store<A>(s + j * ld + W, splat(A(NEG_INF)));
            }
        return;
    }
    alignas(64) uint8_t seen[BLOCK_KV][imax(8, PANEL<A>)] = {};
    for (int tile_row = 0; tile_row < PANEL<A>; tile_row++) {
        const char* const* rows = tile.mask + panel * PANEL<A> + tile_row;
        int left = tile.count - panel * PANEL<A> - tile_row;
        if (PANEL<A> >= 8 && p.mask.col == 1 && left >= 8 && tile_row + 8 <= PANEL<A>) {
            int j = 0;
            for (; j + 8 <= n; j += 8) {
                uint64_t from[8], to[8];
                for (int i = 0; i < 8; i++) __builtin_memcpy(from + i, rows[i] + key + j, 8);
                transpose_bytes8(from, to);
                for (int i = 0; i < 8; i++) __builtin_memcpy(&seen[j + i][tile_row], to + i, 8);
            }
            for (; j < n; j++)
                for (int i = 0; i < 8; i++) seen[j][tile_row + i] = rows[i][key + j];
            tile_row += 7;
        } else if (left > 0) {
            for (int j = 0; j < n; j++) seen[j][tile_row] = rows[0][(key + j) * p.mask.col];
        }
    }
    for (int j = 0; j < n; j++)
        for (int v = 0; v < 2; v++) {
            typename Bytes<A>::V bytes;
            __builtin_memcpy(&bytes, &seen[j][v * W], W);
            VecI<A> visible = __builtin_convertvector(bytes, VecI<A>) != 0;
            A* x = s + j * ld + v * W;
            store<A>(x, visible ? load<A>(x) : splat(A(NEG_INF)));
        }
}

// --- bounds -------------------------------------------------------------------------------------

template <class A>
INLINE void apply_bounds(const QueryTile<A>& tile, int panel, int key, int n, A* s, int64_t ld) {
    for (int v = 0; v < 2; v++) {
        int tile_row = panel * PANEL<A> + v * SIMD_WIDTH<A>;
        VecI<A> lo = load_int<A>(tile.lo + tile_row), hi = load_int<A>(tile.hi + tile_row);
        for (int j = 0; j < n; j++) {
            VecI<A> at = splat_int<A>(key + j);
            A* x = s + j * ld + v * SIMD_WIDTH<A>;
            Vec<A> inside = at >= lo ? load<A>(x) : splat(A(NEG_INF));
            store<A>(x, at < hi ? inside : splat(A(NEG_INF)));
        }
    }
}
