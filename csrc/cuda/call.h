// From an operator's arguments to a Call: the checks, and where each tensor lies.
// fastattn/backends/cuda.py asks whether the kernels take a call before it makes one. Here the
// same calls are refused, because the operators can also be called directly. next: host_params.h
#pragma once
#include <cstring>

#include "../operands.h"
#include "../tensors.h"
#include "host_params.h"

namespace fastattn::cuda {

inline TensorView view_of(const Tensor& t) {
    TensorView x{};
    x.data = t.data_ptr();
    x.batch = t.size(0);
    x.heads = t.size(1);
    x.rows = t.size(2);
    x.head_dim = t.size(3);
    x.batch_stride = t.stride(0);
    x.head_stride = t.stride(1);
    x.row_stride = t.stride(2);
    x.bytes = static_cast<int64_t>(t.element_size());
    return x;
}

// --- what the kernels take ----------------------------------------------------------------------

template <size_t N> std::string names_of(const char* const (&names)[N]) {
    std::string text = names[0];
    for (size_t i = 1; i < N; i++) text += std::string(i + 1 < N ? ", " : " and ") + names[i];
    return text;
}

// Refuses every operand but those whose names are `taken`, so that an operand which the schemas
// come to have is never ignored.
template <size_t N> void check_operands(const Inputs& in, const char* const (&taken)[N]) {
    auto check = [&](const OptionalTensor& x, const char* name) {
        bool is_taken = false;
        for (const char* one : taken) is_taken |= std::strcmp(one, name) == 0;
        CHECK(!x || is_taken, name,
              " is for another backend: these CUDA kernels take causal masks, ",
              "windows, softcap and, of the optional tensors, ", names_of(taken));
    };
    std::apply([&](auto... field) { (check(in.operands.*field.member, field.name), ...); },
               Operands::fields());
    CHECK(in.spec.dropout_p == 0, "dropout_p is ", in.spec.dropout_p,
          ", and the CUDA kernels have no dropout: another backend has it");
}
inline void check_device(const OptionalTensor& t, const Tensor& q, const char* name) {
    CHECK(!t || (t->is_cuda() && t->get_device_index() == q.get_device_index()), name,
          " must be on q's GPU");
}

inline void check_shapes(const Inputs& in) {
    const Tensor &q = in.q, &k = in.k, &v = in.v;
    for (auto [t, name] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
        CHECK(t->dim() == 4, name, " must have 4 dimensions, got shape ", shape_of(*t));
        check_device(*t, q, name);
        CHECK(t->scalar_type() == q.scalar_type(), name, " must have q's dtype");
        for (int i = 0; i < 4; i++)
            CHECK(t->size(i) < MAX_LENGTH, name, " has a dimension of ", t->size(i),
                  ", the limit is 2^30");
    }
    int64_t d = q.size(3);
    CHECK(d == 64 || d == 128 || d == 256,
          "the CUDA kernels have head dimensions 64, 128 and 256, q has ", d);
    CHECK(k.size(3) == d && v.size(3) == d, "q, k and v must have one head dimension, got ", d,
          ", ", k.size(3), " and ", v.size(3));
    bool paged = in.operands.page_table.has_value();
    CHECK((paged || k.size(0) == q.size(0)) && v.size(0) == k.size(0) && k.size(1) == v.size(1) &&
              k.size(2) == v.size(2),
          "k has shape ", shape_of(k), " and v ", shape_of(v), ", q has batch size ", q.size(0));
    CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "q has ", q.size(1),
          " heads, which is not a multiple of the ", k.size(1), " heads of k");
}

inline void check_half_precision(const Tensor& q) {
    CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
          "the CUDA kernels take bfloat16 and float16");
}

inline void check_numbers(const Spec& spec) {
    check_score_numbers(spec.scale, spec.softcap);
    CHECK(
        spec.softcap == 0 || (spec.softcap >= MIN_CUDA_SOFTCAP && spec.softcap <= MAX_CUDA_SOFTCAP),
        "the CUDA kernels take a softcap in [0.01, 1000] or 0 (off), got ", spec.softcap);
    CHECK(spec.left >= -1 && spec.right >= -1, "left and right must be >= -1");
}

// --- where the operands lie ---------------------------------------------------------------------

// cu_seqlens of a varlen call are [sequences + 1], and the batch is 1; of documents, they are
// [batch, documents + 1].
struct Sequences {
    const int *cu_q = nullptr, *cu_k = nullptr;
    int64_t number = 0;   // in one row of cu_seqlens
    int64_t num_lengths;  // how many values kv_lens has: one a sequence, or one a batch entry
    bool documents = false;

    explicit Sequences(const Inputs& in) : num_lengths(in.q.size(0)) {
        const Tensor& q = in.q;
        const OptionalTensor &q_cu = in.operands.cu_seqlens_q, &k_cu = in.operands.cu_seqlens_k;
        CHECK(!q_cu == !k_cu, "cu_seqlens_q and cu_seqlens_k come together");
        if (!q_cu) return;
        documents = q_cu->dim() == 2;
        int64_t rows = documents ? q.size(0) : 1;
        CHECK(q_cu->dim() >= 1 && q_cu->dim() <= 2 && q_cu->numel() >= rows && rows == q.size(0),
              "cu_seqlens_q has shape ", shape_of(*q_cu), " and q batch size ", q.size(0),
              "; [sequences + 1] goes with batch size 1, [batch, documents + 1] with any");
        number = q_cu->size(q_cu->dim() - 1) - 1;
        CHECK(rows * number <= MAX_ENTRIES, "cu_seqlens_q has ", rows * number,
              " sequences, the limit is 2^24: attend to fewer at a time");
        if (!documents) num_lengths = number;
        cu_q = checked(*q_cu, q, "cu_seqlens_q", rows);
        cu_k = checked(*k_cu, q, "cu_seqlens_k", rows);
    }

    bool none() const { return cu_q != nullptr && number == 0; }

    const int* checked(const Tensor& cu, const Tensor& q, const char* name, int64_t rows) const {
        check_device(cu, q, name);
        CHECK(cu.scalar_type() == ScalarType::Int && cu.is_contiguous() &&
                  cu.numel() == rows * (number + 1),
              name, " must be int32 of ", rows * (number + 1), " numbers, contiguous, got shape ",
              shape_of(cu));
        return static_cast<const int*>(cu.data_ptr());
    }
};

inline const int* lengths(const OptionalTensor& t, const Tensor& q, int64_t size,
                          const char* name) {
    if (!t) return nullptr;
    check_device(t, q, name);
    CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == size &&
              (t->size(0) <= 1 || t->stride(0) == 1),
          name, " must be int32 [", size, "], contiguous, got shape ", shape_of(*t));
    return static_cast<const int*>(t->data_ptr());
}

inline SinkType sink_type(const OptionalTensor& sinks, const Tensor& q) {
    if (!sinks) return SinkType::NONE;
    check_device(sinks, q, "sinks");
    CHECK(sinks->dim() == 1 && sinks->size(0) == q.size(1) &&
              (q.size(1) <= 1 || sinks->stride(0) == 1),
          "sinks must be [", q.size(1), "], contiguous, got shape ", shape_of(*sinks));
    switch (sinks->scalar_type()) {
        case ScalarType::Float:
            return SinkType::F32;
        case ScalarType::BFloat16:
            return SinkType::BF16;
        case ScalarType::Half:
            return SinkType::F16;
        default:
            fail("sinks must be float32, bfloat16 or float16");
    }
}

// All of a call but its four-dimensional tensors. It points into the tensors of `in`.
inline void set_operands(Call& call, const Inputs& in, const Sequences& sequences) {
    const Operands& x = in.operands;
    call.kv_lens = lengths(x.kv_lens, in.q, sequences.num_lengths, "kv_lens");
    call.kv_starts = lengths(x.kv_starts, in.q, sequences.num_lengths, "kv_starts");
    call.cu_q = sequences.cu_q;
    call.cu_k = sequences.cu_k;
    call.sequences = static_cast<int>(sequences.number);
    call.documents = sequences.documents;
    call.sinks = x.sinks ? x.sinks->data_ptr() : nullptr;
    call.sink_type = sink_type(x.sinks, in.q);
    call.scale = in.spec.scale;
    call.softcap = in.spec.softcap;
    call.left = in.spec.left;
    call.right = in.spec.right;
    call.align_end = in.spec.align_end;
}

inline void set_pages(ForwardCall& call, const Inputs& in, const Sequences& sequences) {
    const OptionalTensor& table = in.operands.page_table;
    if (!table) return;
    CHECK(!sequences.documents, "documents have no pages");
    check_device(table, in.q, "page_table");
    CHECK(table->scalar_type() == ScalarType::Int && table->dim() == 2 &&
              table->size(0) == sequences.num_lengths &&
              (table->size(1) <= 1 || table->stride(1) == 1),
          "page_table must be int32 [", sequences.num_lengths,
          ", pages], its rows contiguous, got shape ", shape_of(*table));
    call.page_table = static_cast<const int*>(table->data_ptr());
    call.pages = table->size(1);
    call.page_row = table->stride(0);
    CHECK(call.keys() < MAX_LENGTH, "the pages of a sequence hold ", call.keys(),
          " keys, the limit is 2^30");
}

// A contiguous copy replaces t, for the pointer to stay valid as long as t.
inline Descale descale_of(OptionalTensor& t, const Inputs& in, const Sequences& sequences,
                          const char* name) {
    if (!t) return {};
    check_device(t, in.q, name);
    int64_t kv_heads = in.k.size(1);
    bool each = t->dim() == 2;
    CHECK(t->scalar_type() == ScalarType::Float && (each || t->dim() == 1) &&
              t->size(each) == kv_heads && (!each || t->size(0) == sequences.num_lengths),
          name, " must be float32 [", kv_heads, "] or [", sequences.num_lengths, ", ", kv_heads,
          "], got shape ", shape_of(*t));
    t = torch::stable::contiguous(*t);
    return {static_cast<const float*>(t->data_ptr()), each ? static_cast<int>(kv_heads) : 0};
}

}  // namespace fastattn::cuda
