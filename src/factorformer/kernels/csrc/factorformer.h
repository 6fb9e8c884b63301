// The interface of the library: plain C, so that it needs neither torch nor Python to be built or called.
//
// All matrices are dense in memory and row-major; counts are in elements. Nothing here checks an index: supports are
// checked once, when a layer is built or loaded.

#pragma once

#include <cstdint>

constexpr int32_t NO_MEMORY = 1; // what kernels return in place of 0 where scratch memory cannot be had
constexpr int32_t NO_ROW = 2;    // and where an index is that of no row

struct Support {
    const uint8_t *packed; // (rows, bytes)
    int64_t rows, bytes, nonzeros, atoms;
    int32_t code; // of positions: 0 bitmap, 1 one byte, 2 two bytes
};

struct Values {
    const void *values;  // (rows, nonzeros)
    const float *scales; // (rows); null for floats
    int32_t integers;    // whether values are int8, to be multiplied by the scale of their row
};

struct Matrix {
    const void *weight;  // (out, in), or (in, out) if `columns`
    const float *scales; // one for each row as stored; null for floats
    int64_t out, in;
    int32_t integers, columns;
};

// The sum of `rank` products of Kronecker of left (m1, n1, rank) and right (m2, rank, n2), cut to (rows, width).
struct Kronecker {
    const void *left, *right;
    const float *left_scales, *right_scales; // one for each of m1, of m2; null for floats
    int64_t n1, rank, m2, n2, rows, width;
    int32_t integers;
};

// y (batch, queries, heads, width) = softmax(scale q k^T, where allowed) v. Strides are of batch, head and token; those of
// the mask, one byte each, of batch, head, query and key. Several heads may share those of keys and values.
struct Attention {
    const float *q, *k, *v;
    const uint8_t *mask; // null: all keys
    float *y;
    int64_t batch, heads, key_heads, queries, keys, width;
    int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[4];
    float scale;
};

// What values of few bits can be, ascending, and the bounds between each and the next.
struct Levels {
    const float *levels, *bounds; // (count), (count - 1)
    int64_t count;
};

// A stack of encoder layers; see encoder.h for how they are described.
struct Encoder {
    int64_t layers, width, heads, inner, between, deepest; // `between`: the largest result inside of a product
    const float *bias; // of scores, by how far the query is behind the key, (heads, 2 reach + 1); null where there is none
    int64_t reach, exact; // whether attention is to be as exact as floats are
    int64_t *spent; // nanoseconds of all threads, added to by what they were spent on; null where nobody asks
    int64_t threads; // that each vector of tokens is worth
    const int64_t *fields; // of all layers
};

struct Table {
    const char *name;
    bool (*works)(); // whether instructions that some systems forbid, or that are rare, do what they should
    // y (n, rows) = x (n, atoms) S^T + bias
    int32_t (*sparse)(const float *x, int64_t n, const Support *, const Values *, const float *bias, float *y);
    // y (n, atoms) = x (n, rows) S
    int32_t (*sparse_transposed)(const float *x, int64_t n, const Support *, const Values *, float *y);
    // y (rows, nonzeros) = the entries of left^T right on the support; left (n, rows), right (n, atoms)
    int32_t (*sparse_outer)(const float *left, const float *right, int64_t n, const Support *, float *y);
    // y (n, out) = x W_1^T W_2^T ... + bias
    int32_t (*chain)(const float *x, int64_t n, const Matrix *, int64_t count, const float *bias, float *y);
    // y may be x
    void (*gelu)(const float *x, int64_t n, float *y);
    int32_t (*attention)(const Attention *);
    // y (n, width) = rows of S times a dictionary (atoms, width), or of a sum of products of Kronecker
    int32_t (*sparse_rows)(const int64_t *index, int64_t n, const Support *, const Values *, const Matrix *, float *y);
    int32_t (*kronecker_rows)(const int64_t *index, int64_t n, const Kronecker *, float *y);
    // y (n, rows) = x (n, width) times the transpose of that sum + bias, for a few tokens and inner sides
    int32_t (*kronecker)(const float *x, int64_t n, const Kronecker *, const float *bias, float *y);
    // y (n, in) = rows of a table (rows, in), or, if there is a second matrix, their products with it
    int32_t (*dense_rows)(const int64_t *index, int64_t n, const Matrix *, const Matrix *, float *y);
    // ends (rows, groups) of x (rows, width)
    void (*extremes)(const float *x, int64_t rows, int64_t width, float *ends);
    // y (rows, width); reach (rows, groups) may be null, and then there are no levels
    void (*round_rows)(const float *x, int64_t rows, int64_t width, const float *reach, const Levels *, int32_t in_int8,
                       float *y);
    // y and x (rows, width): see encoder.h
    int32_t (*encode)(const Encoder *, const float *x, const int64_t *rows, const int64_t *starts, int64_t sequences,
                      float *y);
};
