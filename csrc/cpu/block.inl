// Where the keys and values of a block are packed or converted: in the thread's scratch memory, or
// in its packed-panel cache, where the head's other tiles find them done.
// next: query_tile.inl

template <class A> struct Block {
    A *keys, *values;  // rows, converted: [n][head_dim], [n][v_dim]
    A* panels;         // [columns / PANEL][BLOCK_KV][PANEL]
    int n;             // rows to pack: into a cache all that another tile may want
    bool done;
};

template <class A> struct Blocks {
    A *keys, *values, *panels;  // of the first block
    int head_dim, v_dim, panel_columns, kv_len;
    PanelCache* cache;  // has all blocks, one after the other; null: there is memory for one

    INLINE_MEMBER Block<A> at(int key, int n) const {
        if (cache == nullptr) return {keys, values, panels, n, false};
        int64_t row = key;  // a multiple of BLOCK_KV
        return {keys + row * head_dim, values + row * v_dim, panels + row * panel_columns,
                imin(BLOCK_KV, kv_len - key), !cache->claim(key / BLOCK_KV)};
    }
};

// For one kv head of a segment. value_rows: values are wanted as rows, not only as panels. keep: in
// the packed-panel cache, if they fit.
template <class A> static Blocks<A> new_blocks(const Params& p, int segment, int kv_head,
                                               bool value_rows, int panel_columns, bool keep,
                                               Arena& arena) {
    Blocks<A> b{};
    b.kv_len = p.segments[segment].band.kv_len;
    b.head_dim = p.head_dim;
    b.v_dim = p.v_dim;
    b.panel_columns = panel_columns;
    bool in_place = rows_in_place<A>(p);
    int blocks = (b.kv_len + BLOCK_KV - 1) / BLOCK_KV;
    int64_t key_width = in_place ? 0 : p.head_dim,
            value_width = in_place || !value_rows ? 0 : p.v_dim;
    int64_t width = key_width + value_width + panel_columns;
    size_t bytes = sizeof(A) * static_cast<size_t>(width) * BLOCK_KV * blocks;
    int64_t rows = BLOCK_KV;
    if (keep && bytes <= PanelCache::BYTES) {
        b.cache = &PanelCache::of(p.call, segment, kv_head, bytes, blocks);
        rows *= blocks;
    }
    b.panels = b.cache ? static_cast<A*>(b.cache->memory()) : arena.take<A>(rows * width);
    b.keys = b.panels + rows * panel_columns;
    b.values = b.keys + rows * key_width;
    return b;
}
