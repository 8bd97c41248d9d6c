// Where the kernels around attention (norm, gate, activate, rotate, cross entropy, a Linear's
// weight gradient) find their operands.
// next: rows.inl, activate.inl, linear.inl, fused.inl
#pragma once
#include <cstdint>

#include "../philox.h"
#include "dtype.h"

namespace fastattn::cpu {

// Rows in memory; stride in elements from one to the next. Null data: absent.
struct Rows {
    char* data = nullptr;
    int64_t stride = 0;
};

struct NormCall {
    Dtype dtype;
    int dim;
    bool center;  // LayerNorm; else RMSNorm
    double eps;
    Rows x, residual, y, summed;
    const void* weight;  // [dim] of the arithmetic type; null: 1
    const void* bias;    // the same; null: 0
    void* mean;          // [rows]; null without center
    void* rstd;          // [rows]
    bool dropout;        // of x, before the residual is added
    DropoutKey dropout_key;
    Rows dy, dsummed, dx;
    Rows dkept;  // with dropout: x's gradient; dx is then the residual's alone
};

enum class Activation { IDENTITY, RELU, SILU, GELU, GELU_TANH };

struct GateCall {
    Dtype dtype;
    int dim;
    Activation activation;
    Rows gate, up, out;
    Rows dout, dgate, dup;
};

struct ActivateCall {
    Dtype dtype;
    int dim;
    Activation activation;
    bool dropout;
    DropoutKey dropout_key;
    const void* bias;  // [dim] of the arithmetic type; null: 0
    Rows x;            // backward: ReLU's result instead; absent for the identity
    Rows out, dout, dx;
};

struct RotateCall {
    Dtype dtype;
    int64_t batch, heads, length;
    int dim, pairs;
    char *x, *out;
    int64_t x_stride[3], out_stride[3];  // of batch, head and row
    bool heads_inside;                   // walk heads before rows, as they lie in memory
    const void *cos, *sin;               // [positions, pairs] of the arithmetic type
    int64_t cos_stride, sin_stride;
    const int64_t* positions;  // row s of entry b reads positions[b * positions_batch + s]; null: s
    int64_t positions_batch;
    bool interleaved, inverse;
};

struct CrossEntropyCall {
    Dtype dtype;
    int vocab;
    Rows logits;
    const int64_t* labels;
    int64_t ignore_index;
    double label_smoothing, z_loss, softcap;
    const void* scale;  // [rows]: the gradient of each row's loss; null: logits stay as they are
    void *loss, *lse;   // [rows]
};

// A Linear's weight gradient is made in blocks of WEIGHT_ROWS x WEIGHT_COLUMNS, from WEIGHT_DEPTH
// rows of dout and x at a time.
constexpr int WEIGHT_ROWS = 96, WEIGHT_COLUMNS = 256, WEIGHT_DEPTH = 256;

struct WeightCall {
    int depth, out, in;
    Rows dout, x;   // [depth, out], [depth, in]
    void* dweight;  // [out, in]
    bool add;       // to what dweight holds
    void* sums;     // column sums of dout for every WEIGHT_DEPTH rows, [.., out]; null: not wanted
    void *strips, *panels;  // [depth, out] and [depth, in], columns rounded up to whole blocks
};

// Each works on rows begin to end, but for the last two: on one item.
struct FusedKernels {
    void (*norm)(const NormCall&, int64_t begin, int64_t end);
    // adds to dweight and dbias, [dim] of the arithmetic type; null: not wanted
    void (*norm_backward)(const NormCall&, int64_t begin, int64_t end, void* dweight, void* dbias);
    void (*gate)(const GateCall&, int64_t begin, int64_t end);
    void (*gate_backward)(const GateCall&, int64_t begin, int64_t end);
    void (*activate)(const ActivateCall&, int64_t begin, int64_t end);
    // adds to dbias, [dim] of the arithmetic type; null: not wanted
    void (*activate_backward)(const ActivateCall&, int64_t begin, int64_t end, void* dbias);
    void (*rotate)(const RotateCall&, int64_t begin,
                   int64_t end);  // rows of all heads and sequences
    void (*cross_entropy)(const CrossEntropyCall&, int64_t begin, int64_t end);
    void (*weight_pack)(const WeightCall&, int item);     // blocks of rows and columns per depth
    void (*weight_product)(const WeightCall&, int item);  // blocks of rows times of columns
};

}  // namespace fastattn::cpu
