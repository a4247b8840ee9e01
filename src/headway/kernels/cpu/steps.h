// What a forward pass is made of when it runs natively: steps over buffers that stay where they are. Python builds them
// (kernels/steps.py mirrors every struct); this library only reads them.
//
// Shapes: T rows (tokens of all sequences), D columns, N query heads, K key-value heads, H their size, S cache columns.
#pragma once
#include <cstdint>

typedef int64_t i64;

// R x C weights: value = scale * (code - zero) or scale * code + minimum. Sixteen rows lie side by side: codes are
// [R / 16][C / chunk][chunk / 4][16][4] bytes, or for 4 bits [..][chunk / 8][16][4] with the chunk's first half in the low
// half of each byte; scales and minima are [R / 16][C / group][16]. Rows and columns that are missing are zeros. With minima
// the zero is 0, and with 4 bits at most 8.
struct Matrix {
    const uint8_t *codes;
    const void *scales, *minima;  // float, or half floats
    const float *bias;
    i64 rows, columns, bits, chunk, group, zero, half;
};

// Rows in codes of -127 to 127 with a scale and a sum of codes per chunk. With two planes each row has two: its value is
// the sum of both, which keeps 15 bits instead of 8.
struct Coded {
    int8_t *codes;  // [rows][planes][chunks * chunk]
    float *scales;  // [rows][planes][chunks]
    int32_t *sums;
    i64 columns, chunk, planes;
};

enum Activation : i64 { NONE, RELU, GELU, GELU_TANH, QUICK_GELU, SILU, RELU2 };
enum Normalization : i64 { PLAIN, RMS, LAYER };
enum Kind : i64 { NORM, LINEAR, HEADS, ATTEND, GATHER };

// y = norm(in (T, D)) * weight + bias, then * scale: written to `out` or added to it, put in codes, or both. The strides
// are floats from row to row.
struct Norm {
    const float *in, *weight, *bias, *scale;
    float *out;
    i64 columns, in_stride, out_stride, normalization, adds;
    float eps;
    Coded codes;
};

// out (T, R) = or += activation(codes x W^T + bias + beside). Gated: the first half of W's rows, whole blocks of 16, is the
// gate, the second the product, and out (T, R / 2) = activation(gate) * product. Rows of `beside`, if there are any, can be
// read to the end of a block.
struct Linear {
    Matrix weight;
    Coded in;
    float *out;
    const float *beside;
    i64 out_stride, beside_stride, adds, activation, gated;
};

// Keys and values of one layer and where they stand: (B, K, S, H) with strides in elements, positions (B, S) with -1 for a
// column that holds nothing, and the state of the columns: how many are in use, and whether each stands at its position.
// With `starts` (B + 1) sequences of any length lie one behind the other, columns of one row. In codes of -127 to 127 each
// vector has a scale, (B, K, S); its H is then a multiple of 16 and vectors lie one behind the other.
enum Kept : i64 { FLOATS, HALVES, CODES };
struct Columns {
    void *keys, *values;
    const i64 *positions, *state, *starts;
    float *key_scales, *value_scales;
    i64 sequence_stride, head_stride, column_stride, positions_stride, kept;
};

// Of each row of a fused projection (T, N + 2K, H): queries and keys normalised per head and turned, keys and values put
// into their column. The row's sequence, position and column stand in `rows` (T, 3); angles are (T, pairs, 2), cosine and
// sine; a column of -1 is not stored.
struct Heads {
    float *qkv;
    const float *q_weight, *q_bias, *k_weight, *k_bias, *angles;
    const i64 *rows;
    i64 N, K, H, pairs, interleaved, normalization;
    float eps;
    Columns columns;
};

// out (T, N, H) = softmax(cap(scale q k^T) + bias) v over the columns that a row may see: not after its position if causal,
// and less than `window` away. bias (N, 2 reach + 1) by distance of the column, `reach` for one that is as far or farther.
// scratch: for each thread 4 floats for every column there can be, `room` of them, a multiple of 16.
struct Attend {
    const float *q;
    const i64 *rows;
    float *out, *scratch;
    const float *bias;
    i64 N, K, H, q_stride, window, causal, room, reach;
    float scale, cap;
    Columns columns;
};

// out (T, C) = or += scale * the rows `ids` of a table, in codes or in `plain` floats. ids are id_stride apart.
struct Gather {
    Matrix table;
    const float *plain;
    const i64 *ids;
    float *out;
    i64 id_stride, adds;
    float scale;
};

struct Step {
    Kind kind;
    const void *what;
};
