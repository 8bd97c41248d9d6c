// Asynchronous copies: TMA tensors, bulk rows, cp.async. next: matrix.cpp
#include <algorithm>

#include "state.h"

namespace fastattn::emulator {

void complete_bytes(uint32_t bar, int bytes, const Async& a);
void check_async_use(uint32_t bar, uint32_t site);

// ---- tensor maps -------------------------------------------------------------------------------

namespace {

constexpr uint32_t VALID = 0x7A3D;

int span_of(Swizzle s) {
    return s == Swizzle::B128 ? 128 : s == Swizzle::B64 ? 64 : s == Swizzle::B32 ? 32 : 256 * 16;
}

}  // namespace

std::string encode_tiled(TensorMap& map, void* data, int rank, int element_bytes,
                         const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                         Swizzle swizzle) {
    if (rank < 1 || rank > 5) return "rank must be 1 to 5";
    if (reinterpret_cast<uintptr_t>(data) % 16) return "the address must be a multiple of 16";
    map = {};
    map.data = static_cast<uint8_t*>(data);
    map.rank = rank;
    map.element_bytes = element_bytes;
    map.swizzle = swizzle;
    map.strides[0] = element_bytes;
    for (int i = 0; i < 5; i++) {
        map.sizes[i] = i < rank ? sizes[i] : 1;
        map.box[i] = i < rank ? box[i] : 1;
        if (map.sizes[i] < 1 || map.sizes[i] > uint64_t(1) << 32)
            return "each size must be 1 to 2^32";
        if (map.box[i] < 1 || map.box[i] > 256) return "each side of a box must be 1 to 256";
        if (i > 0 && i < rank) {
            map.strides[i] = strides[i - 1];
            if (strides[i - 1] % 16 || strides[i - 1] >= uint64_t(1) << 40)
                return "strides must be multiples of 16 bytes below 2^40";
            if (strides[i - 1] == 0 && map.sizes[i] > 1)
                return "a stride of 0, which no driver has been asked about";
        }
    }
    int inner = static_cast<int>(box[0]) * element_bytes;
    if (inner % 16) return "a box's rows must be multiples of 16 bytes";
    if (inner > span_of(swizzle)) return "a box's rows are longer than the swizzle's span";
    map.valid = VALID;
    return "";
}

namespace {

void check_map(const TensorMap* map, uint32_t address, uint32_t site) {
    if (reinterpret_cast<uintptr_t>(map) % 64 || map->valid != VALID)
        fail(site, "this is no tensor map at an address that is a multiple of 64");
    if (map->rank != 4)
        fail(site, "the map has " + std::to_string(map->rank) + " dimensions, the instruction 4");
    int alignment = map->swizzle == Swizzle::NONE ? 128 : 8 * span_of(map->swizzle);
    check_range(address,
                static_cast<int>(map->box[0] * map->box[1] * map->box[2] * map->box[3]) *
                    map->element_bytes,
                alignment, site, "a tensor copy");
}

struct At {
    int c[4];
};

// For each 16 bytes of a box, calls use(shared address, global address, low, high): bytes [low,
// high) lie inside the tensor.
template <class Use> void for_each_chunk(const TensorMap& map, uint32_t base, At at, Use use) {
    int e = map.element_bytes, per = 16 / e;
    uint32_t linear = 0;
    for (uint32_t i3 = 0; i3 < map.box[3]; i3++)
        for (uint32_t i2 = 0; i2 < map.box[2]; i2++)
            for (uint32_t i1 = 0; i1 < map.box[1]; i1++)
                for (uint32_t i0 = 0; i0 < map.box[0]; i0 += per, linear += 16) {
                    int64_t x[4] = {int64_t(at.c[0]) + i0, int64_t(at.c[1]) + i1,
                                    int64_t(at.c[2]) + i2, int64_t(at.c[3]) + i3};
                    bool inside = true;
                    int64_t offset = 0;
                    for (int d = 0; d < 4; d++) {
                        if (d > 0) inside &= x[d] >= 0 && x[d] < int64_t(map.sizes[d]);
                        offset += x[d] * static_cast<int64_t>(map.strides[d]);
                    }
                    int64_t low = std::clamp<int64_t>(-x[0], 0, per);
                    int64_t high = std::clamp<int64_t>(int64_t(map.sizes[0]) - x[0], 0, per);
                    if (!inside || high < low) low = high = 0;
                    use(swizzled(base + linear, map.swizzle), map.data + offset,
                        static_cast<int>(low) * e, static_cast<int>(high) * e);
                }
}

}  // namespace

// ---- tensor copies -----------------------------------------------------------------------------

void tma_load(uint32_t to, const TensorMap* map, uint32_t bar, const int (&at)[4]) {
    uint32_t site = SITE;
    check_map(map, to, site);
    check_async_use(bar, site);
    Clock clock = clock_of(*cta->current);
    released();
    AsyncPtr a = start(Kind::TENSOR_LOAD, site, clock);
    At where{{at[0], at[1], at[2], at[3]}};
    a->steps[0] = [=](Async& self) {
        int bytes = 0;
        for_each_chunk(*map, to, where, [&](uint32_t shared, uint8_t* global, int low, int high) {
            uint8_t* p = write_cells(shared, 16, self.accessor());
            std::memset(p, 0, 16);
            if (high > low) {
                check_global(global + low, high - low, 1, site, "a tensor load");
                std::memcpy(p + low, global + low, high - low);
            }
            bytes += 16;
        });
        complete_bytes(bar, bytes, self);
    };
    submit(a);
}

void tma_store(const TensorMap* map, uint32_t from, const int (&at)[4], bool reduce) {
    uint32_t site = SITE;
    check_map(map, from, site);
    if (reduce && map->element_bytes != 4) fail(site, "tensor reductions here add fp32");
    Clock clock = clock_of(*cta->current);
    released();
    AsyncPtr a = start(Kind::TENSOR_STORE, site, clock, 2);
    At where{{at[0], at[1], at[2], at[3]}};
    auto data = std::make_shared<std::vector<uint8_t>>();
    a->steps[0] = [=](Async& self) {
        for_each_chunk(*map, from, where, [&](uint32_t shared, uint8_t*, int, int) {
            uint8_t* p = read_cells(shared, 16, self.accessor());
            data->insert(data->end(), p, p + 16);
        });
    };
    a->steps[1] = [=](Async&) {
        size_t i = 0;
        for_each_chunk(*map, from, where, [&](uint32_t, uint8_t* global, int low, int high) {
            if (high > low) check_global(global + low, high - low, 1, site, "a tensor store");
            if (reduce)
                for (int b = low; b < high; b += 4)
                    *reinterpret_cast<float*>(global + b) +=
                        *reinterpret_cast<float*>(data->data() + i + b);
            else if (high > low)
                std::memcpy(global + low, data->data() + i + low, high - low);
            i += 16;
        });
    };
    cta->current->bulk.operations.push_back(a);
    submit(a);
}

// ---- rows --------------------------------------------------------------------------------------

namespace {

void check_row(uint32_t shared, const void* global, int bytes, uint32_t site) {
    check_range(shared, bytes, 16, site, "a bulk copy");
    if (bytes % 16 || bytes <= 0) fail(site, "bulk copies take multiples of 16 bytes");
    check_global(global, bytes, 16, site, "a bulk copy");
}

}  // namespace

void bulk_load(uint32_t to, const void* from, int bytes, uint32_t bar) {
    uint32_t site = SITE;
    check_row(to, from, bytes, site);
    check_async_use(bar, site);
    Clock clock = clock_of(*cta->current);
    released();
    AsyncPtr a = start(Kind::BULK_LOAD, site, clock);
    a->steps[0] = [=](Async& self) {
        std::memcpy(write_cells(to, bytes, self.accessor()), from, bytes);
        complete_bytes(bar, bytes, self);
    };
    submit(a);
}

void bulk_reduce_add(float* to, uint32_t from, int bytes) {
    uint32_t site = SITE;
    check_row(from, to, bytes, site);
    Clock clock = clock_of(*cta->current);
    released();
    AsyncPtr a = start(Kind::BULK_REDUCTION, site, clock, 2);
    auto data = std::make_shared<std::vector<float>>(bytes / 4);
    a->steps[0] = [=](Async& self) {
        std::memcpy(data->data(), read_cells(from, bytes, self.accessor()), bytes);
    };
    a->steps[1] = [=](Async&) {
        for (size_t i = 0; i < data->size(); i++) to[i] += (*data)[i];
    };
    cta->current->bulk.operations.push_back(a);
    submit(a);
}

// ---- groups ------------------------------------------------------------------------------------

void bulk_commit() {
    Thread& t = *cta->current;
    t.bulk_groups.push_back(std::move(t.bulk));
    t.bulk = {};
}

// With read_only, groups stay in the list, because a later wait may be for their writes.
void bulk_wait(int groups, bool read_only) {
    Thread& t = *cta->current;
    Release done;
    for (int i = 0; i < static_cast<int>(t.bulk_groups.size()) - groups; i++)
        for (const AsyncPtr& a : t.bulk_groups[i].operations) {
            while (a->next < (read_only ? 1 : 2)) run_step(a);
            done.add(a->clock);
            done.add(a->slot, a->epoch);
        }
    done.add(t.clock);
    t.clock = done.take();
    int finished = std::max(0, static_cast<int>(t.bulk_groups.size()) - groups);
    if (!read_only)
        t.bulk_groups.erase(t.bulk_groups.begin(), t.bulk_groups.begin() + finished);
    else
        for (int i = 0; i < finished; i++) t.bulk_groups[i].read = true;
}

void copy_async(uint32_t to, const void* from, bool valid) {
    uint32_t site = SITE;
    check_range(to, 16, 16, site, "cp.async");
    if (valid) check_global(from, 16, 16, site, "cp.async");
    Clock clock = clock_of(*cta->current);
    released();
    AsyncPtr a = start(Kind::CP_ASYNC, site, clock);
    a->steps[0] = [=](Async& self) {
        uint8_t* p = write_cells(to, 16, self.accessor());
        if (valid)
            std::memcpy(p, from, 16);
        else
            std::memset(p, 0, 16);
    };
    cta->current->copies.operations.push_back(a);
    submit(a);
}

void copy_commit() {
    Thread& t = *cta->current;
    t.copy_groups.push_back(std::move(t.copies));
    t.copies = {};
}

void copy_wait(int groups) {
    Thread& t = *cta->current;
    Release done;
    while (static_cast<int>(t.copy_groups.size()) > groups) {
        for (const AsyncPtr& a : t.copy_groups.front().operations) {
            finish(a);
            done.add(a->clock);
            done.add(a->slot, a->epoch);
        }
        t.copy_groups.pop_front();
    }
    done.add(t.clock);
    t.clock = done.take();
}

}  // namespace fastattn::emulator
