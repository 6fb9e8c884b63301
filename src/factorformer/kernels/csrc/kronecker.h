// Products of a few tokens with a sum of products of Kronecker whose inner sides, n1 and m2, are a few as well.
//
// A token is a matrix X (n1, n2), and what it becomes is Y (m1, m2) = sum over k of left[:, :, k] X right[:, k, :]^T: two
// products of a few tokens with a matrix, between which next to nothing has to change its place.

#pragma once

#include <algorithm>

#include "factorformer.h"
#include "few.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t MULTIPLIED = 1 << 16; // multiply-adds that one thread has done before others begin

// y (n, rows) = x (n, width) times the transpose of the sum + bias
template <typename T> int32_t multiply_kronecker(const float *x, int64_t n, const Kronecker &k, const float *bias, float *y) {
    static thread_local Scratch tokens_memory, inner_memory, outer_memory;
    const int64_t size = k.n1 * k.n2, m1 = (k.rows + k.m2 - 1) / k.m2, depth = k.n1 * k.rank;
    float *padded = tokens_memory.take<float>(k.width < size ? n * size : 0);
    float *inner = inner_memory.take<float>(n * k.m2 * depth), *outer = outer_memory.take<float>(n * k.m2 * m1);
    if (!padded || !inner || !outer) return NO_MEMORY;
    for (int64_t t = 0; t < n && k.width < size; ++t)
        std::fill(std::copy(x + t * k.width, x + (t + 1) * k.width, padded + t * size), padded + (t + 1) * size, 0.0f);
    // Scales of the right factor are one for several of its rows here, and come in between.
    const Matrix right{k.right, nullptr, k.m2 * k.rank, k.n2, k.integers, 0};
    const Matrix left{k.left, k.left_scales, m1, depth, k.integers, 0};
    Outcome outcome;
#pragma omp parallel if (n * (k.n1 * right.out * right.in + k.m2 * m1 * depth) > MULTIPLIED)
    {
        static thread_local Scratch own_memory;
        float *tokens = own_memory.take<float>(n * k.m2 * depth);
        const bool enough = outcome.allows(tokens);
        const Share first(right.out, LANES), last(m1, LANES);
        multiply_rows_few<T>(right, k.width < size ? padded : x, n * k.n1, first.begin, first.end, nullptr, inner);
#pragma omp barrier
        if (enough) {
            for (int64_t t = 0; t < n; ++t)
                for (int64_t j = 0; j < k.m2; ++j)
                    for (int64_t i = 0; i < k.n1; ++i) {
                        const float *from = inner + ((t * k.n1 + i) * k.m2 + j) * k.rank;
                        float *to = tokens + ((t * k.m2 + j) * k.n1 + i) * k.rank;
                        for (int64_t r = 0; r < k.rank; ++r) to[r] = from[r] * (k.integers ? k.right_scales[j] : 1.0f);
                    }
            multiply_rows_few<T>(left, tokens, n * k.m2, last.begin, last.end, nullptr, outer);
            for (int64_t t = 0; t < n; ++t)
                for (int64_t i = last.begin; i < last.end; ++i)
                    for (int64_t j = 0; j < k.m2 && i * k.m2 + j < k.rows; ++j) {
                        const int64_t at = i * k.m2 + j;
                        y[t * k.rows + at] = outer[(t * k.m2 + j) * m1 + i] + (bias ? bias[at] : 0.0f);
                    }
        }
    }
    return outcome.code;
}

int32_t kronecker_few(const float *x, int64_t n, const Kronecker *k, const float *bias, float *y) {
    return k->integers ? multiply_kronecker<int8_t>(x, n, *k, bias, y) : multiply_kronecker<float>(x, n, *k, bias, y);
}

} // namespace
