// Products of a few tokens with a sum of products of Kronecker.
//
// A token is a matrix X (n1, n2), and what it becomes is Y (m1, m2) = sum over k of left[:, :, k] X right[:, k, :]^T. The
// lanes run along m2 from the first product to the last, so that nothing is transposed but the right factor, once.

#pragma once

#include <algorithm>

#include "dense.h"
#include "factorformer.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t ENOUGH = 1 << 19; // multiply-adds from which on other threads take part

struct KroneckerProduct {
    const Kronecker &k;
    float *blocks; // (m2 / lanes, rank, n2, lanes): the right factor
    float *inner;  // (m2 / lanes, n1, rank, lanes)
    float *left;   // (m1, n1, rank)
    float *token;  // (n1, n2)

    static constexpr int V = 2; // vectors of a block of m2

    static int64_t blocks_of(const Kronecker &k) { return (k.m2 + V * LANES - 1) / (V * LANES); }

    template <typename T> void prepare(const Share &share) const {
        const T *from = static_cast<const T *>(k.right);
        float rows[V * LANES][LANES];
        for (int64_t b = share.begin; b < share.end; ++b) {
            const int64_t first = b * V * LANES, here = std::min<int64_t>(V * LANES, k.m2 - first);
            float *to = blocks + b * k.rank * k.n2 * V * LANES;
            for (int64_t j = 0; j < k.rank * k.n2; j += LANES) {
                const int64_t wide = std::min<int64_t>(LANES, k.rank * k.n2 - j);
                for (int64_t r = 0; r < here; ++r) {
                    const Floats values = widen_some(from + (first + r) * k.rank * k.n2 + j, wide);
                    store(rows[r], k.integers ? values * splat(k.right_scales[first + r]) : values);
                }
                transpose_in(rows[0], LANES, static_cast<int>(here), wide, to + j * V * LANES, V * LANES);
            }
        }
    }

    // Rows [first, last) of the first product, for one block of m2.
    void multiply_first(int64_t b, int64_t first, int64_t last) const {
        constexpr int WIDTH = V * LANES;
        for (int64_t r = 0; r < k.rank; ++r) {
            const float *right = blocks + (b * k.rank + r) * k.n2 * WIDTH;
            in_pieces<ROWS_AT_ONCE>(first, last, [&](int64_t i, auto count) INLINED {
                constexpr int R = decltype(count)::value;
                Floats sums[R][V];
                float_sums<R, V>(right, WIDTH, token + i * k.n2, k.n2, 1, k.n2, sums);
                for (int row = 0; row < R; ++row)
                    for (int v = 0; v < V; ++v)
                        store(inner + ((b * k.n1 + i + row) * k.rank + r) * WIDTH + v * LANES, sums[row][v]);
            });
        }
    }

    // Rows [first, last) of Y, of which only so many values are wanted.
    void multiply_last(int64_t b, int64_t first, int64_t last, const float *bias, float *y) const {
        constexpr int WIDTH = V * LANES;
        const int64_t depth = k.n1 * k.rank;
        in_pieces<ROWS_AT_ONCE>(first, last, [&](int64_t row, auto count) INLINED {
            constexpr int R = decltype(count)::value;
            Floats sums[R][V];
            float_sums<R, V>(inner + b * depth * WIDTH, WIDTH, left + row * depth, depth, 1, depth, sums);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    const int64_t column = b * WIDTH + v * LANES, at = (row + r) * k.m2 + column;
                    const int64_t wanted = std::min<int64_t>({LANES, k.m2 - column, k.rows - at});
                    if (wanted <= 0) continue;
                    store_some(y + at, bias ? sums[r][v] + load_some(bias + at, wanted) : sums[r][v], wanted);
                }
        });
    }
};

template <typename T> void widen_left(const Kronecker &k, const Share &rows, float *to) {
    const int64_t wide = k.n1 * k.rank;
    for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t j = 0; j < wide; j += LANES) {
            const Floats values = widen_some(static_cast<const T *>(k.left) + row * wide + j, wide - j);
            store_some(to + row * wide + j, k.integers ? values * splat(k.left_scales[row]) : values, wide - j);
        }
}

// y (n, rows) = the product of x (n, width) with the sum + bias
int32_t kronecker_few(const float *x, int64_t n, const Kronecker *kronecker, const float *bias, float *y) {
    static thread_local Scratch memory[4];
    const Kronecker &k = *kronecker;
    const int64_t blocks = KroneckerProduct::blocks_of(k), wide = blocks * KroneckerProduct::V * LANES;
    const int64_t m1 = (k.rows + k.m2 - 1) / k.m2, work = wide * k.rank * k.n1 * (k.n2 + m1);
    KroneckerProduct product{k, memory[0].take<float>(k.rank * k.n2 * wide), memory[1].take<float>(k.n1 * k.rank * wide),
                             memory[2].take<float>(m1 * k.n1 * k.rank), memory[3].take<float>(k.n1 * k.n2)};
    if (!product.blocks || !product.inner || !product.left || !product.token) return NO_MEMORY;
#pragma omp parallel if (n * work > ENOUGH)
    {
        const Share some(blocks, 1), columns(k.n1, 1), rows(m1, 1);
        if (k.integers) {
            product.prepare<int8_t>(some);
            widen_left<int8_t>(k, rows, product.left);
        } else {
            product.prepare<float>(some);
            widen_left<float>(k, rows, product.left);
        }
        for (int64_t t = 0; t < n; ++t) {
#pragma omp barrier
#pragma omp single
            {
                std::copy(x + t * k.width, x + (t + 1) * k.width, product.token);
                std::fill(product.token + k.width, product.token + k.n1 * k.n2, 0.0f);
            }
            for (int64_t b = 0; b < blocks; ++b) product.multiply_first(b, columns.begin, columns.end);
#pragma omp barrier
            for (int64_t b = 0; b < blocks; ++b) product.multiply_last(b, rows.begin, rows.end, bias, y + t * k.rows);
        }
    }
    return 0;
}

} // namespace
