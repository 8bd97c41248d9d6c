// Where the fields of the structs lie that Python passes to the emulator. ../support/emulated.py
// repeats the structs for ctypes, and compares its copies with these when it loads the library: a
// field that moved would otherwise be read as another. next: ../support/emulated.py
#include <string>

#include "host_params.h"

using namespace fastattn::cuda;

namespace {

// Writes "Struct 96", the size, then "Struct.field 8 4", offset and size, for each field.
template <class Struct> struct Writer {
    std::string name, text;
    Struct x{};

    explicit Writer(const char* name) : name(name) {
        text = this->name + " " + std::to_string(sizeof x) + "\n";
    }
    // offsetof is not defined for structs with a base, so a member of an object is asked.
    template <class Field> Writer& add(const char* field, const Field& member) {
        auto offset = reinterpret_cast<const char*>(&member) - reinterpret_cast<const char*>(&x);
        text += name + "." + field + " " + std::to_string(offset) + " " +
                std::to_string(sizeof member) + "\n";
        return *this;
    }
};

#define ADD(FIELD) w.add(#FIELD, w.x.FIELD)

std::string layout_of_view() {
    Writer<TensorView> w("TensorView");
    ADD(data), ADD(batch), ADD(heads), ADD(rows), ADD(head_dim);
    ADD(batch_stride), ADD(head_stride), ADD(row_stride), ADD(bytes);
    return w.text;
}

std::string layout_of_descale() {
    Writer<Descale> w("Descale");
    ADD(data), ADD(stride);
    return w.text;
}

template <class W> void add_call(W& w) {
    ADD(q), ADD(k), ADD(v), ADD(out), ADD(kv_lens), ADD(kv_starts), ADD(cu_q), ADD(cu_k);
    ADD(sequences), ADD(documents), ADD(sinks), ADD(sink_type), ADD(scale), ADD(softcap);
    ADD(left), ADD(right), ADD(align_end);
}

std::string layout_of_forward() {
    Writer<ForwardCall> w("ForwardCall");
    add_call(w);
    ADD(lse), ADD(page_table), ADD(pages), ADD(page_row), ADD(splits);
    ADD(split_out), ADD(split_lse), ADD(q_descale), ADD(k_descale), ADD(v_descale);
    return w.text;
}

std::string layout_of_backward() {
    Writer<BackwardCall> w("BackwardCall");
    add_call(w);
    ADD(dout), ADD(dq), ADD(dk), ADD(dv), ADD(lse), ADD(dlse), ADD(lse2), ADD(delta);
    ADD(dq_sums), ADD(semaphores), ADD(large), ADD(dsinks);
    return w.text;
}

}  // namespace

extern "C" const char* emulated_layouts() {
    static const std::string all =
        layout_of_view() + layout_of_descale() + layout_of_forward() + layout_of_backward();
    return all.c_str();
}
