// The query rows of a tile, each with the keys that it sees. A tile of scores is [keys][lanes]: a lane
// is a query row, so a row's maximum, sum and bounds are plain vertical vector operations.
// next: mask.inl

// The query rows of a tile, lane by lane.
template <class A> struct Lanes {
    int count;  // in use; the rest, up to `padded`, see no key
    int padded;
    alignas(64) IntOf<A> lo[BLOCK_Q];  // visible keys [lo, hi), in segment coordinates
    alignas(64) IntOf<A> hi[BLOCK_Q];
    alignas(64) A diagonal[BLOCK_Q];  // key on the row's diagonal
    alignas(64) A slope[BLOCK_Q];     // ALiBi, in base 2
    const char* mask[BLOCK_Q];        // at the segment's first key
    const char* bias[BLOCK_Q];
    bool one_mask, one_bias;          // every lane reads the same row (padding masks, for one)
    bool ranged;                      // key ranges: a tile may have keys that no lane sees
    int row[BLOCK_Q], head[BLOCK_Q];  // row of the segment, query head

    Range range(int begin, int end) const {  // of lanes [begin, end)
        Range r{INT32_MAX, 0, INT32_MAX, 0};
        for (int i = begin; i < end; i++) {
            r.begin = imin(r.begin, static_cast<int>(lo[i]));
            r.full_begin = imax(r.full_begin, static_cast<int>(lo[i]));
            r.full_end = imin(r.full_end, static_cast<int>(hi[i]));
            r.end = imax(r.end, static_cast<int>(hi[i]));
        }
        return r;
    }
    // Whether some lane sees one of keys [begin, end).
    bool sees(int begin, int end) const {
        for (int i = 0; i < count; i++)
            if (lo[i] < end && hi[i] > begin) return true;
        return false;
    }
    // How many lanes from `first` on, at most `most`, make one product: each sees a key that those
    // before it see, so some lane sees each key of their range, or they see nothing at all.
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

// Each lane's bounds within its row's key range. A lane that sees nothing widens no range.
template <class A>
static void narrow_lanes(const KeyRanges& ranges, const Segment& s, Lanes<A>& lanes) {
    for (int i = 0; i < lanes.count; i++) {
        int lo = imax(static_cast<int>(lanes.lo[i]), ranges.first(s, lanes.head[i], lanes.row[i]));
        int hi = imin(static_cast<int>(lanes.hi[i]), ranges.past(s, lanes.head[i], lanes.row[i]));
        lanes.lo[i] = lo < hi ? lo : s.band.kv_len;
        lanes.hi[i] = lo < hi ? hi : 0;
    }
}

// Rows [row, row + rows) of `heads` heads from `head` on.
template <class A> static void set_lanes(const Params& p, const Segment& s, int head, int heads,
                                         int row, int rows, Lanes<A>& lanes) {
    lanes.count = heads * rows;
    lanes.padded = round_up_panel<A>(lanes.count);
    int lane = 0;
    for (int h = head; h < head + heads; h++)
        for (int i = row; i < row + rows; i++, lane++) {
            lanes.lo[lane] = s.band.lo(i);
            lanes.hi[lane] = s.band.hi(i);
            lanes.diagonal[lane] = A(i) + A(s.band.offset);
            lanes.row[lane] = i;
            lanes.head[lane] = h;
            if (p.slopes)
                lanes.slope[lane] = slope_in_base2<A>(p.slopes[s.entry * p.slopes_batch + h]);
            if (p.mask.data)
                lanes.mask[lane] = p.mask.bytes_at(s.entry, h, s.row0 + i) + s.key0 * p.mask.col;
            if (p.bias.data)
                lanes.bias[lane] = p.bias.bytes_at(s.entry, h, s.row0 + i) +
                                   s.key0 * p.bias.col * size_of(p.bias.dtype);
        }
    for (; lane < lanes.padded; lane++) {
        lanes.lo[lane] = s.band.kv_len;  // sees nothing, and keeps lo and hi from decreasing
        lanes.hi[lane] = s.band.kv_len;
        lanes.diagonal[lane] = lanes.slope[lane] = 0;
    }
    lanes.ranged = p.key_ranges.given();
    if (lanes.ranged) narrow_lanes(p.key_ranges, s, lanes);
    lanes.one_mask = lanes.one_bias = true;
    for (int i = 1; i < lanes.count; i++) {
        lanes.one_mask &= p.mask.data == nullptr || lanes.mask[i] == lanes.mask[0];
        lanes.one_bias &= p.bias.data == nullptr || lanes.bias[i] == lanes.bias[0];
    }
}
