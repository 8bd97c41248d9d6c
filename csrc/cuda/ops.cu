// The CUDA operators: their checks, and what is registered with torch. fastattn/backends/registry.py asks
// before it calls; here the same is refused to those who call the operator themselves.
// next: machine.h, sm90.h, sm80.h
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "../tensors.h"
#include "driver.h"
#include "machine.h"
#include "sm80.h"
#include "sm90.h"

namespace fastattn::cuda {
namespace {

Operand operand(const Tensor& t) {
    return {t.data_ptr(), t.size(0),   t.size(1),
            t.size(2),    t.size(3),   t.stride(0),
            t.stride(1),  t.stride(2), static_cast<int64_t>(t.element_size())};
}

// x, or a copy that TMA can read.
Tensor for_tma(const Tensor& x) {
    Tensor t = unit_stride(x);
    return why_not_tma(operand(t), "").empty() ? t : torch::stable::contiguous(t);
}

// t, or the copy that x then is, where a tensor map cannot have x.
Tensor for_map(Operand& x, const Tensor& t) {
    if (!is_expanded(x)) return t;
    Tensor copy = torch::stable::contiguous(t);
    x = operand(copy);
    return copy;
}

void check_device(const OptionalTensor& t, const Tensor& q, const char* name) {
    CHECK(!t || (t->is_cuda() && t->get_device_index() == q.get_device_index()), name,
          " must be on q's GPU");
}

const int* lengths(const OptionalTensor& t, const Tensor& q, int64_t size, const char* name) {
    if (!t) return nullptr;
    check_device(t, q, name);
    CHECK(t->scalar_type() == ScalarType::Int && t->dim() == 1 && t->size(0) == size &&
              (t->size(0) <= 1 || t->stride(0) == 1),
          name, " must be int32 [", size, "], contiguous, got shape ", shape_of(*t));
    return static_cast<const int*>(t->data_ptr());
}

// Into the call, where there is one.
void set_pages(ForwardCall& call, const OptionalTensor& page_table, const Tensor& q,
               int64_t entries) {
    if (!page_table) return;
    check_device(page_table, q, "page_table");
    CHECK(page_table->scalar_type() == ScalarType::Int && page_table->dim() == 2 &&
              page_table->size(0) == entries &&
              (page_table->size(1) <= 1 || page_table->stride(1) == 1),
          "page_table must be int32 [", entries, ", pages], its rows contiguous, got shape ",
          shape_of(*page_table));
    call.page_table = static_cast<const int*>(page_table->data_ptr());
    call.pages = page_table->size(1);
    call.page_row = page_table->stride(0);
    CHECK(call.keys() < MAX_LENGTH, "the pages of an entry hold ", call.keys(),
          " keys, the limit is 2^30");
}

SinkType sink_type(const OptionalTensor& sinks, const Tensor& q) {
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

// Scales of float8 tensors: what is stored times its scale is what is meant; none: 1.
struct Scales {
    OptionalTensor q, k, v;

    static Descale of(OptionalTensor& t, const Tensor& q, int64_t entries, int64_t kv_heads,
                      const char* name) {
        if (!t) return {};
        check_device(t, q, name);
        bool each = t->dim() == 2;
        CHECK(t->scalar_type() == ScalarType::Float && (each || t->dim() == 1) &&
                  t->size(each) == kv_heads && (!each || t->size(0) == entries),
              name, " must be float32 [", kv_heads, "] or [", entries, ", ", kv_heads,
              "], got shape ", shape_of(*t));
        t = torch::stable::contiguous(*t);
        return {static_cast<const float*>(t->data_ptr()), each ? static_cast<int>(kv_heads) : 0};
    }
};

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v, bool paged,
                  bool float8 = false) {
    for (auto [t, name] : {std::pair{&q, "q"}, std::pair{&k, "k"}, std::pair{&v, "v"}}) {
        CHECK(t->dim() == 4, name, " must have 4 dimensions, got shape ", shape_of(*t));
        CHECK(t->is_cuda() && t->get_device_index() == q.get_device_index(), name,
              " must be on q's GPU");
        CHECK(t->scalar_type() == q.scalar_type(), name, " must have q's dtype");
        for (int i = 0; i < 4; i++)
            CHECK(t->size(i) < MAX_LENGTH, name, " has a dimension of ", t->size(i),
                  ", the limit is 2^30");
    }
    if (float8)
        CHECK(q.scalar_type() == ScalarType::Float8_e4m3fn, "these kernels take float8_e4m3fn");
    else
        CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half,
              "the CUDA kernels take bfloat16 and float16");
    int64_t d = q.size(3);
    CHECK(d == 64 || d == 128 || d == 256,
          "the CUDA kernels have head dimensions 64, 128 and 256, ", "q has ", d);
    CHECK(k.size(3) == d && v.size(3) == d, "q, k and v must have one head dimension, got ", d,
          ", ", k.size(3), " and ", v.size(3));
    CHECK((paged || k.size(0) == q.size(0)) && v.size(0) == k.size(0) && k.size(1) == v.size(1) &&
              k.size(2) == v.size(2),
          "k has shape ", shape_of(k), " and v ", shape_of(v), ", q has batch size ", q.size(0));
    CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "q has ", q.size(1),
          " heads, which is not a multiple of the ", k.size(1), " heads of k");
}

void refuse(bool others) {
    CHECK(!others,
          "the CUDA kernels take causal masks, windows, softcap, sinks, kv_lens, kv_starts, "
          "cu_seqlens and, forward, page_table; other operands are for another backend");
}

// cu_seqlens of packed sequences are [sequences + 1]; of documents, [batch, documents + 1].
struct Sequences {
    const int *cu_q = nullptr, *cu_k = nullptr;
    int64_t number = 0, entries;  // in a row; with lengths of their own
    bool documents = false;

    Sequences(const OptionalTensor& q_cu, const OptionalTensor& k_cu, const Tensor& q)
        : entries(q.size(0)) {
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
        if (!documents) entries = number;
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

void check_numbers(double scale, double softcap, int64_t left, int64_t right) {
    check_score_numbers(scale, softcap);
    CHECK(softcap == 0 || (softcap >= MIN_CUDA_SOFTCAP && softcap <= MAX_CUDA_SOFTCAP),
          "the CUDA kernels take a softcap in [0.01, 1000] or 0 (off), got ", softcap);
    CHECK(left >= -1 && right >= -1, "left and right must be >= -1");
}

Gpu check_gpu(const Tensor& q) {
    Gpu gpu{};
    std::string problem = ask(q.get_device_index(), gpu);
    CHECK(problem.empty(), problem);
    CHECK(gpu.capability >= 80, "the CUDA kernels are for sm_80 and later, this GPU is sm_",
          gpu.capability);
    return gpu;
}

// "" or what went wrong. On sm_90, wgmma serves many rows of keys that are not in pages, and all
// of 8 bits. rows, keys and values are the call's.
std::string run_forward(ForwardCall& call, const Tensor& rows, const Tensor& keys,
                        const Tensor& values, const Gpu& gpu) {
    const Tensor& q = rows;
    bool bf16 = q.scalar_type() == ScalarType::BFloat16, float8 = call.q.bytes == 1;
    join_expanded_heads(call);
    ForwardPlan plan =
        forward_plan(call, gpu.multiprocessors, gpu.hopper() ? IDLE_SM90 : IDLE_SM80);
    if (float8 || (gpu.hopper() && !plan.few && !call.page_table)) {
        Tensor read[] = {for_map(call.q, rows), for_map(call.k, keys), for_map(call.v, values)};
        return launch_forward_sm90(call, bf16, gpu.multiprocessors, stream_of(q));
    }
    auto [outs, lses] = split_sizes(call, plan);
    Tensor split_out = new_tensor(q, {outs}, ScalarType::Float);
    Tensor split_lse = new_tensor(q, {lses}, ScalarType::Float);
    call.split_out = static_cast<float*>(split_out.data_ptr());
    call.split_lse = static_cast<float*>(split_lse.data_ptr());
    return launch_forward_sm80(call, plan, bf16, stream_of(q));
}

// bfloat16 with x's sizes and strides.
Tensor bf16_like(const Tensor& x) {
    int64_t sizes[4], strides[4];
    for (int i = 0; i < 4; i++) {
        sizes[i] = x.size(i);
        strides[i] = x.stride(i);
    }
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_bfloat16(),
                                 aoti_torch_device_type_cuda(), x.get_device_index(), &made));
    return poisoned(Tensor(made));
}

// A result in x's memory order where TMA can write that; of float8, in bfloat16.
Tensor result_like(const Tensor& x) {
    Tensor t = unit_stride(x);
    bool float8 = x.scalar_type() == ScalarType::Float8_e4m3fn;
    if (is_dense(t) && why_not_tma(operand(t), "").empty())
        return float8 ? bf16_like(t) : new_like(t);
    return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)},
                      float8 ? ScalarType::BFloat16 : x.scalar_type());
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const OptionalTensor& sinks, const OptionalTensor& kv_lens,
                                   const OptionalTensor& kv_starts,
                                   const OptionalTensor& cu_seqlens_q,
                                   const OptionalTensor& cu_seqlens_k,
                                   const OptionalTensor& page_table, double scale, double softcap,
                                   int64_t left, int64_t right, bool align_end, int64_t num_splits,
                                   const Gpu& gpu, Scales scales) {
    Sequences sequences(cu_seqlens_q, cu_seqlens_k, q);
    CHECK(!page_table || !sequences.documents, "documents have no pages");
    check_numbers(scale, softcap, left, right);
    CHECK(num_splits >= 0 && num_splits < MAX_LENGTH, "num_splits must be >= 0, got ", num_splits);
    torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    Tensor rows = for_tma(q), keys = for_tma(k), values = for_tma(v);
    Tensor out = result_like(q);
    Tensor lse = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    ForwardCall call{operand(rows),
                     operand(keys),
                     operand(values),
                     operand(out),
                     static_cast<float*>(lse.data_ptr()),
                     lengths(kv_lens, q, sequences.entries, "kv_lens"),
                     lengths(kv_starts, q, sequences.entries, "kv_starts"),
                     sequences.cu_q,
                     sequences.cu_k,
                     static_cast<int>(sequences.number),
                     sequences.documents,
                     sinks ? sinks->data_ptr() : nullptr,
                     sink_type(sinks, q),
                     scale,
                     softcap,
                     left,
                     right,
                     align_end,
                     nullptr,
                     0,
                     0,
                     static_cast<int>(num_splits),
                     nullptr,
                     nullptr,
                     Scales::of(scales.q, q, sequences.entries, k.size(1), "q_descale"),
                     Scales::of(scales.k, q, sequences.entries, k.size(1), "k_descale"),
                     Scales::of(scales.v, q, sequences.entries, k.size(1), "v_descale")};
    set_pages(call, page_table, q, sequences.entries);
    if (q.numel() == 0) return {out, lse};
    if (k.size(0) == 0 || call.keys() == 0 || sequences.none()) {
        torch::stable::fill_(out, 0);
        torch::stable::fill_(lse, -INFINITY);
        return {out, lse};
    }
    std::string error = run_forward(call, rows, keys, values, gpu);
    CHECK(error.empty(), error);
    return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor kv_lens,
    OptionalTensor kv_starts, OptionalTensor document_ids, OptionalTensor key_begin,
    OptionalTensor key_end, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, OptionalTensor dropout_seed, double scale, double softcap,
    int64_t left, int64_t right, bool align_end, double dropout_p, int64_t num_splits) {
    check_shapes(q, k, v, page_table.has_value());
    refuse(mask || bias || alibi_slopes || document_ids || key_begin || key_end || dropout_seed ||
           dropout_p > 0);
    return forward(q, k, v, sinks, kv_lens, kv_starts, cu_seqlens_q, cu_seqlens_k, page_table,
                   scale, softcap, left, right, align_end, num_splits, check_gpu(q), {});
}

std::tuple<Tensor, Tensor> flash_attn_fwd_float8(
    const Tensor& q, const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor kv_lens,
    OptionalTensor kv_starts, OptionalTensor document_ids, OptionalTensor key_begin,
    OptionalTensor key_end, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, OptionalTensor dropout_seed, double scale, double softcap,
    int64_t left, int64_t right, bool align_end, double dropout_p, int64_t num_splits,
    OptionalTensor q_descale, OptionalTensor k_descale, OptionalTensor v_descale) {
    check_shapes(q, k, v, false, true);
    refuse(mask || bias || alibi_slopes || document_ids || key_begin || key_end || dropout_seed ||
           dropout_p > 0);
    CHECK(!page_table && num_splits <= 1,
          "the CUDA kernels of float8 take no page_table and do not split keys");
    Gpu gpu = check_gpu(q);
    CHECK(gpu.hopper(), "the CUDA kernels of float8 are for sm_90, this GPU is sm_",
          gpu.capability);
    return forward(q, k, v, sinks, kv_lens, kv_starts, cu_seqlens_q, cu_seqlens_k, page_table,
                   scale, softcap, left, right, align_end, num_splits, gpu,
                   {q_descale, k_descale, v_descale});
}

void check_like(const Tensor& t, const Tensor& q, const char* name) {
    check_device(t, q, name);
    CHECK(t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(0) == q.size(0) &&
              t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.size(3) == q.size(3),
          name, " has shape ", shape_of(t), ", expected q's ", shape_of(q), " in q's dtype");
}

// lse or dlse, contiguous.
Tensor per_row(const Tensor& t, const Tensor& q, const char* name) {
    check_device(t, q, name);
    CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 3 && t.size(0) == q.size(0) &&
              t.size(1) == q.size(1) && t.size(2) == q.size(2),
          name, " has shape ", shape_of(t), ", expected [", q.size(0), ", ", q.size(1), ", ",
          q.size(2), "] in float32");
    return torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(
    const Tensor& dout, OptionalTensor dlse, const Tensor& out, const Tensor& lse, const Tensor& q,
    const Tensor& k, const Tensor& v, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor kv_lens,
    OptionalTensor kv_starts, OptionalTensor document_ids, OptionalTensor key_begin,
    OptionalTensor key_end, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    OptionalTensor page_table, OptionalTensor dropout_seed, double scale, double softcap,
    int64_t left, int64_t right, bool align_end, double dropout_p, bool need_dbias,
    bool need_dsinks) {
    check_shapes(q, k, v, false);
    refuse(mask || bias || alibi_slopes || document_ids || key_begin || key_end || page_table ||
           dropout_seed || dropout_p > 0 || need_dbias);
    Sequences sequences(cu_seqlens_q, cu_seqlens_k, q);
    CHECK(!need_dsinks || sinks, "need_dsinks, but there are no sinks");
    check_numbers(scale, softcap, left, right);
    check_like(dout, q, "dout");
    check_like(out, q, "out");
    Gpu gpu = check_gpu(q);
    CHECK(q.size(3) != 256 || gpu.memory() == Memory::LARGE,
          "the CUDA backward of head dimension 256 takes ", shared_memory(Memory::LARGE),
          " bytes of shared memory a CTA, this GPU has ", gpu.shared_bytes);

    torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    Tensor rows = for_tma(q), keys = for_tma(k), values = for_tma(v), cotangent = for_tma(dout);
    if (gpu.hopper())
        for (Tensor* t : {&rows, &keys, &values, &cotangent})
            if (is_expanded(operand(*t))) *t = torch::stable::contiguous(*t);
    Tensor result = for_tma(out), row_lse = per_row(lse, q, "lse");
    OptionalTensor row_dlse;
    if (dlse) row_dlse = per_row(*dlse, q, "dlse");
    Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
    Tensor none = new_tensor(q, {0}, ScalarType::Float);
    SinkType type = sink_type(sinks, q);
    Tensor dsinks = need_dsinks ? new_tensor(q, {q.size(1)}, ScalarType::Float) : none;
    if (q.numel() == 0 || k.numel() == 0 || sequences.none()) {
        for (Tensor t : {dq, dk, dv, dsinks}) torch::stable::fill_(t, 0);
        return {dq, dk, dv, none, dsinks};
    }
    int count = static_cast<int>(sequences.number);
    BackwardSizes sizes =
        gpu.hopper() ? backward_sizes_sm90(operand(rows), sequences.cu_q, count)
                     : backward_sizes_sm80(operand(rows), sequences.cu_q, count, gpu.memory());
    Tensor lse2 = new_tensor(q, {sizes.rows}, ScalarType::Float);
    Tensor delta = new_tensor(q, {sizes.rows}, ScalarType::Float);
    Tensor sums = new_tensor(q, {sizes.sums}, ScalarType::Float);
    Tensor semaphores =
        new_tensor(q, {sizes.semaphores + sizes.large}, ScalarType::Int);  // filled together
    torch::stable::fill_(sums, 0);
    torch::stable::fill_(semaphores, 0);
    BackwardCall call{operand(rows),
                      operand(keys),
                      operand(values),
                      operand(result),
                      operand(cotangent),
                      operand(dq),
                      operand(dk),
                      operand(dv),
                      static_cast<const float*>(row_lse.data_ptr()),
                      row_dlse ? static_cast<const float*>(row_dlse->data_ptr()) : nullptr,
                      lengths(kv_lens, q, sequences.entries, "kv_lens"),
                      lengths(kv_starts, q, sequences.entries, "kv_starts"),
                      sequences.cu_q,
                      sequences.cu_k,
                      count,
                      sequences.documents,
                      scale,
                      softcap,
                      left,
                      right,
                      align_end,
                      static_cast<float*>(lse2.data_ptr()),
                      static_cast<float*>(delta.data_ptr()),
                      static_cast<float*>(sums.data_ptr()),
                      static_cast<int*>(semaphores.data_ptr()),
                      static_cast<int*>(semaphores.data_ptr()) + sizes.semaphores,
                      sinks ? sinks->data_ptr() : nullptr,
                      type,
                      need_dsinks ? static_cast<float*>(dsinks.data_ptr()) : nullptr};
    bool bf16 = q.scalar_type() == ScalarType::BFloat16;
    cudaStream_t stream = stream_of(q);
    std::string error =
        gpu.hopper() ? launch_backward_sm90(call, bf16, gpu.multiprocessors, stream)
                     : launch_backward_sm80(call, bf16, gpu.memory(), gpu.multiprocessors, stream);
    CHECK(error.empty(), error);
    return {dq, dk, dv, none, dsinks};
}

}  // namespace
}  // namespace fastattn::cuda

// What fastattn/backends/proof_steps.py asks through ctypes: "" or what is wrong, kept until this thread's
// next question.
#define QUESTION extern "C" __attribute__((visibility("default"))) const char*

static const char* keep(std::string text) {
    static thread_local std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

// Does torch have what is looked up in it?
QUESTION fastattn_torch_problem() {
    return fastattn::cuda::current_stream() ? "" : fastattn::cuda::NO_CURRENT_STREAM;
}

// Can this library use this GPU?
QUESTION fastattn_cuda_problem(int device) {
    fastattn::cuda::Gpu gpu{};
    return keep(fastattn::cuda::ask(device, gpu));
}

// Does the driver make a tensor map of this tensor, with boxes of so many rows? shape: [batch,
// heads, rows, D]; strides of the first three, in elements.
QUESTION fastattn_cuda_tensor_map(void* data, const int64_t* shape, const int64_t* strides,
                                  int64_t bytes, int box_rows) {
    using namespace fastattn::cuda;
    Operand x{data,       shape[0],   shape[1],   shape[2], shape[3],
              strides[0], strides[1], strides[2], bytes};
    TensorMap map;
    return keep(tensor_map(map, x, box_rows, encode));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
    m.impl("flash_attn_fwd", TORCH_BOX(&fastattn::cuda::flash_attn_fwd));
    m.impl("flash_attn_fwd_float8", TORCH_BOX(&fastattn::cuda::flash_attn_fwd_float8));
    m.impl("flash_attn_bwd", TORCH_BOX(&fastattn::cuda::flash_attn_bwd));
}
