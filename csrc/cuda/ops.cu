// The CUDA operators, and what is registered with torch. next: call.h (their checks), machine.h
// (the GPU), sm90.h, sm80.h (the launches)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "call.h"
#include "driver.h"
#include "machine.h"
#include "sm80.h"
#include "sm90.h"

namespace fastattn::cuda {
namespace {

constexpr const char* TAKEN_FORWARD[] = {"sinks",        "kv_lens",      "kv_starts",
                                         "cu_seqlens_q", "cu_seqlens_k", "page_table"};
constexpr const char* TAKEN[] = {"sinks", "kv_lens", "kv_starts", "cu_seqlens_q", "cu_seqlens_k"};

Gpu check_gpu(const Tensor& q) {
    Gpu gpu{};
    std::string problem = ask(q.get_device_index(), gpu);
    CHECK(problem.empty(), problem);
    CHECK(gpu.capability >= 80, "the CUDA kernels are for sm_80 and later, this GPU is sm_",
          gpu.capability);
    return gpu;
}

// --- tensors that the kernels can read and write ------------------------------------------------

// x, or a copy that TMA and cp.async can read.
Tensor for_tma(const Tensor& x) {
    Tensor t = unit_stride(x);
    return why_not_tma(view_of(t), "").empty() ? t : torch::stable::contiguous(t);
}

// t, or a copy of which x then is the view, where x is expanded: tensor maps have no stride of 0.
Tensor for_map(TensorView& x, const Tensor& t) {
    if (!is_expanded(x)) return t;
    Tensor copy = torch::stable::contiguous(t);
    x = view_of(copy);
    return copy;
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

// A result in x's memory order where TMA can write that; of FP8, in bfloat16.
Tensor result_like(const Tensor& x) {
    Tensor t = unit_stride(x);
    bool fp8 = x.scalar_type() == ScalarType::Float8_e4m3fn;
    if (is_dense(t) && why_not_tma(view_of(t), "").empty()) return fp8 ? bf16_like(t) : new_like(t);
    return new_tensor(x, {x.size(0), x.size(1), x.size(2), x.size(3)},
                      fp8 ? ScalarType::BFloat16 : x.scalar_type());
}

// --- forward ------------------------------------------------------------------------------------

struct Descales {
    OptionalTensor q, k, v;
};

// Launches; "" or what went wrong. On sm_90, wgmma serves many rows whose keys are not in pages,
// and all of FP8. q, k and v are the tensors that the call's views are of.
std::string run_forward(ForwardCall& call, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Gpu& gpu) {
    bool bf16 = q.scalar_type() == ScalarType::BFloat16, fp8 = call.q.bytes == 1;
    join_expanded_heads(call);
    ForwardPlan plan =
        forward_plan(call, gpu.multiprocessors, gpu.hopper() ? IDLE_SM90 : IDLE_SM80);
    if (fp8 || (gpu.hopper() && !plan.few && !call.page_table)) {
        Tensor read[] = {for_map(call.q, q), for_map(call.k, k), for_map(call.v, v)};
        return launch_forward_sm90(call, bf16, gpu.multiprocessors, stream_of(q));
    }
    auto [outs, lses] = split_sizes(call, plan);
    Tensor split_out = new_tensor(q, {outs}, ScalarType::Float);
    Tensor split_lse = new_tensor(q, {lses}, ScalarType::Float);
    call.split_out = static_cast<float*>(split_out.data_ptr());
    call.split_lse = static_cast<float*>(split_lse.data_ptr());
    return launch_forward_sm80(call, plan, bf16, stream_of(q));
}

std::tuple<Tensor, Tensor> forward(const Inputs& in, int64_t num_splits, const Gpu& gpu,
                                   Descales descales) {
    Sequences sequences(in);
    check_numbers(in.spec);
    CHECK(num_splits >= 0 && num_splits < MAX_LENGTH, "num_splits must be >= 0, got ", num_splits);
    torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
    Tensor q = for_tma(in.q), k = for_tma(in.k), v = for_tma(in.v), out = result_like(in.q);
    Tensor lse = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    ForwardCall call{};
    call.q = view_of(q);
    call.k = view_of(k);
    call.v = view_of(v);
    call.out = view_of(out);
    call.lse = static_cast<float*>(lse.data_ptr());
    call.splits = static_cast<int>(num_splits);
    call.q_descale = descale_of(descales.q, in, sequences, "q_descale");
    call.k_descale = descale_of(descales.k, in, sequences, "k_descale");
    call.v_descale = descale_of(descales.v, in, sequences, "v_descale");
    set_operands(call, in, sequences);
    set_pages(call, in, sequences);
    if (q.numel() == 0) return {out, lse};
    if (k.size(0) == 0 || call.keys() == 0 || sequences.none()) {
        torch::stable::fill_(out, 0);
        torch::stable::fill_(lse, -INFINITY);
        return {out, lse};
    }
    std::string error = run_forward(call, q, k, v, gpu);
    CHECK(error.empty(), error);
    return {out, lse};
}

std::tuple<Tensor, Tensor> flash_attn_fwd(Inputs in, int64_t num_splits) {
    check_shapes(in);
    check_half_precision(in.q);
    check_operands(in, TAKEN_FORWARD);
    return forward(in, num_splits, check_gpu(in.q), {});
}

std::tuple<Tensor, Tensor> flash_attn_fwd_float8(Inputs in, int64_t num_splits,
                                                 OptionalTensor q_descale, OptionalTensor k_descale,
                                                 OptionalTensor v_descale) {
    check_shapes(in);
    CHECK(in.q.scalar_type() == ScalarType::Float8_e4m3fn, "these kernels take float8_e4m3fn");
    check_operands(in, TAKEN);
    CHECK(num_splits <= 1, "the CUDA kernels of float8 do not split keys; num_splits is ",
          num_splits, ", accepted are 0 and 1");
    Gpu gpu = check_gpu(in.q);
    CHECK(gpu.hopper(), "the CUDA kernels of float8 are for sm_90, this GPU is sm_",
          gpu.capability);
    return forward(in, num_splits, gpu, {q_descale, k_descale, v_descale});
}

// --- backward -----------------------------------------------------------------------------------

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

// The backward's working memory, which lives until the kernels have been launched: torch's
// allocator gives it to later work of the same stream only.
struct Workspace {
    Tensor lse2, delta, dq_sums, counters;  // counters: semaphores, then large, filled together

    Workspace(BackwardCall& call, const Tensor& q, const Gpu& gpu) {
        BackwardSizes sizes =
            gpu.hopper() ? backward_sizes_sm90(call.q, call.cu_q, call.sequences)
                         : backward_sizes_sm80(call.q, call.cu_q, call.sequences, gpu.memory());
        lse2 = new_tensor(q, {sizes.rows}, ScalarType::Float);
        delta = new_tensor(q, {sizes.rows}, ScalarType::Float);
        dq_sums = new_tensor(q, {sizes.dq_sums}, ScalarType::Float);
        counters = new_tensor(q, {sizes.semaphores + sizes.large}, ScalarType::Int);
        torch::stable::fill_(dq_sums, 0);
        torch::stable::fill_(counters, 0);
        call.lse2 = static_cast<float*>(lse2.data_ptr());
        call.delta = static_cast<float*>(delta.data_ptr());
        call.dq_sums = static_cast<float*>(dq_sums.data_ptr());
        call.semaphores = static_cast<int*>(counters.data_ptr());
        call.large = call.semaphores + sizes.semaphores;
    }
};

void run_backward(BackwardCall& call, const Tensor& q, const Gpu& gpu) {
    Workspace workspace(call, q, gpu);
    bool bf16 = q.scalar_type() == ScalarType::BFloat16;
    cudaStream_t stream = stream_of(q);
    std::string error =
        gpu.hopper() ? launch_backward_sm90(call, bf16, gpu.multiprocessors, stream)
                     : launch_backward_sm80(call, bf16, gpu.memory(), gpu.multiprocessors, stream);
    CHECK(error.empty(), error);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> flash_attn_bwd(Tensor dout, OptionalTensor dlse,
                                                                  Tensor out, Tensor lse, Inputs in,
                                                                  bool need_dbias, bool need_dsinks,
                                                                  OptionalTensor dentropy) {
    CHECK(!dentropy,
          "dentropy is given, and the CUDA backward has no gradient of the entropy: "
          "flash_attn_bwd_triton has it");
    check_shapes(in);
    check_half_precision(in.q);
    check_operands(in, TAKEN);
    CHECK(!need_dbias, "need_dbias, but there is no bias");
    CHECK(!need_dsinks || in.operands.sinks, "need_dsinks, but there are no sinks");
    Sequences sequences(in);
    check_numbers(in.spec);
    check_like(dout, in.q, "dout");
    check_like(out, in.q, "out");
    Gpu gpu = check_gpu(in.q);
    CHECK(in.q.size(3) != 256 || gpu.memory() == Memory::LARGE,
          "the CUDA backward of head dimension 256 takes ", shared_memory(Memory::LARGE),
          " bytes of shared memory a CTA, this GPU has ", gpu.shared_bytes);

    torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
    Tensor q = for_tma(in.q), k = for_tma(in.k), v = for_tma(in.v);
    dout = for_tma(dout);
    out = for_tma(out);
    lse = per_row(lse, q, "lse");
    if (dlse) dlse = per_row(*dlse, q, "dlse");
    Tensor dq = result_like(in.q), dk = result_like(in.k), dv = result_like(in.v);
    Tensor none = new_tensor(q, {0}, ScalarType::Float);
    Tensor dsinks = need_dsinks ? new_tensor(q, {q.size(1)}, ScalarType::Float) : none;
    BackwardCall call{};
    set_operands(call, in, sequences);
    if (q.numel() == 0 || k.numel() == 0 || sequences.none()) {
        for (Tensor t : {dq, dk, dv, dsinks}) torch::stable::fill_(t, 0);
        return {dq, dk, dv, none, dsinks};
    }
    if (gpu.hopper())
        for (Tensor* t : {&q, &k, &v, &dout})
            if (is_expanded(view_of(*t))) *t = torch::stable::contiguous(*t);
    call.q = view_of(q);
    call.k = view_of(k);
    call.v = view_of(v);
    call.out = view_of(out);
    call.dout = view_of(dout);
    call.dq = view_of(dq);
    call.dk = view_of(dk);
    call.dv = view_of(dv);
    call.lse = static_cast<const float*>(lse.data_ptr());
    call.dlse = dlse ? static_cast<const float*>(dlse->data_ptr()) : nullptr;
    call.dsinks = need_dsinks ? static_cast<float*>(dsinks.data_ptr()) : nullptr;
    run_backward(call, q, gpu);
    return {dq, dk, dv, none, dsinks};
}

}  // namespace
}  // namespace fastattn::cuda

// --- questions ----------------------------------------------------------------------------------

// What fastattn/backends/proof_steps.py asks through ctypes: "" or what is wrong, kept until this
// thread's next question.
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
    TensorView x{};
    x.data = data;
    x.batch = shape[0];
    x.heads = shape[1];
    x.rows = shape[2];
    x.head_dim = shape[3];
    x.batch_stride = strides[0];
    x.head_stride = strides[1];
    x.row_stride = strides[2];
    x.bytes = bytes;
    TensorMap map;
    return keep(tensor_map(map, x, box_rows, encode));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
    m.impl("flash_attn_fwd", BOX(&fastattn::cuda::flash_attn_fwd));
    m.impl("flash_attn_fwd_float8", BOX(&fastattn::cuda::flash_attn_fwd_float8));
    m.impl("flash_attn_bwd", BOX(&fastattn::cuda::flash_attn_bwd));
}
