// Rows of tables in factors: each a sum of few rows of a small matrix, of which nothing else is read.

#pragma once

#include <algorithm>

#include "factorformer.h"
#include "memory.h"
#include "simd.h"
#include "sparse.h"
#include "threads.h"

namespace {

constexpr int64_t ALONE = 16; // up to so many rows one thread makes them all

// y[0:V * LANES] = the sum of so many rows, each times its coefficient.
template <int V, typename T>
INLINE void combine_part(const float *coefficients, const uint32_t *offsets, int64_t terms, const T *rows, float *y) {
    Floats sums[V] = {};
    for (int64_t k = 0; k < terms; ++k) {
        const Floats coefficient = splat(coefficients[k]);
        const T *row = rows + offsets[k];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[v] += coefficient * widen(row + v * LANES);
    }
    for (int v = 0; v < V; ++v) store(y + v * LANES, sums[v]);
}

template <typename T>
INLINE void combine(const float *coefficients, const uint32_t *offsets, int64_t terms, const T *rows, int64_t width,
                    float *y) {
    int64_t j = 0;
    for (; j + 8 * LANES <= width; j += 8 * LANES) combine_part<8>(coefficients, offsets, terms, rows + j, y + j);
    for (; j + LANES <= width; j += LANES) combine_part<1>(coefficients, offsets, terms, rows + j, y + j);
    for (; j < width; ++j) {
        float sum = 0;
        for (int64_t k = 0; k < terms; ++k) sum += coefficients[k] * static_cast<float>(rows[offsets[k] + j]);
        y[j] = sum;
    }
}

// A row of S (rows, atoms) times the dictionary (atoms, width).
template <typename T>
INLINE void sparse_row(const Support &s, const Values &v, const Matrix &dictionary, int64_t row, uint32_t *positions,
                       float *coefficients, float *y) {
    decode_positions(s, row, 1, positions);
    if (v.integers)
        decode_values(v, row, s.nonzeros, coefficients);
    else
        std::copy_n(static_cast<const float *>(v.values) + row * s.nonzeros, s.nonzeros, coefficients);
    for (int64_t j = 0; j < s.nonzeros; ++j) {
        if (dictionary.integers) coefficients[j] *= dictionary.scales[positions[j]];
        positions[j] *= static_cast<uint32_t>(dictionary.in);
    }
    combine(coefficients, positions, s.nonzeros, static_cast<const T *>(dictionary.weight), dictionary.in, y);
}

int32_t sparse_rows(const int64_t *index, int64_t n, const Support *support, const Values *v, const Matrix *dictionary,
                    float *y) {
    const Support &s = *support;
    Outcome outcome;
#pragma omp parallel if (n > ALONE)
    {
        static thread_local Scratch positions_memory, coefficients_memory;
        uint32_t *positions = positions_memory.take<uint32_t>(s.nonzeros + SLACK);
        float *coefficients = coefficients_memory.take<float>(s.nonzeros);
        const bool enough = outcome.allows(positions && coefficients);
        const Share share(n, 1);
        for (int64_t t = share.begin; t < share.end && enough; ++t) {
            if (index[t] < 0 || index[t] >= s.rows) {
                outcome.code = NO_ROW;
                continue;
            }
            const auto one = dictionary->integers ? sparse_row<int8_t> : sparse_row<float>;
            one(s, *v, *dictionary, index[t], positions, coefficients, y + t * dictionary->in);
        }
    }
    return outcome.code;
}

// Row i1 * m2 + i2 of a sum of Kronecker products: the product of block i1 (n1, rank) and block i2 (rank, n2).
template <typename T>
INLINE void kronecker_row(const Kronecker &k, int64_t row, const uint32_t *offsets, float *coefficients, float *y) {
    const int64_t first = row / k.m2, second = row % k.m2, size = k.n1 * k.rank;
    const T *left = static_cast<const T *>(k.left) + first * size;
    const T *right = static_cast<const T *>(k.right) + second * k.rank * k.n2;
    const float scale = k.integers ? k.left_scales[first] * k.right_scales[second] : 1.0f;
    for (int64_t i = 0; i < size; ++i) coefficients[i] = scale * static_cast<float>(left[i]);
    for (int64_t j = 0; j < k.n1 && j * k.n2 < k.width; ++j) {
        const int64_t here = std::min(k.n2, k.width - j * k.n2);
        combine(coefficients + j * k.rank, offsets, k.rank, right, here, y + j * k.n2);
    }
}

int32_t kronecker_rows(const int64_t *index, int64_t n, const Kronecker *kronecker, float *y) {
    const Kronecker &k = *kronecker;
    Outcome outcome;
#pragma omp parallel if (n > ALONE)
    {
        static thread_local Scratch offsets_memory, coefficients_memory;
        uint32_t *offsets = offsets_memory.take<uint32_t>(k.rank);
        float *coefficients = coefficients_memory.take<float>(k.n1 * k.rank);
        const bool enough = outcome.allows(offsets && coefficients);
        for (int64_t r = 0; r < k.rank && enough; ++r) offsets[r] = static_cast<uint32_t>(r * k.n2);
        const Share share(n, 1);
        for (int64_t t = share.begin; t < share.end && enough; ++t) {
            if (index[t] < 0 || index[t] >= k.rows) {
                outcome.code = NO_ROW;
                continue;
            }
            const auto one = k.integers ? kronecker_row<int8_t> : kronecker_row<float>;
            one(k, index[t], offsets, coefficients, y + t * k.width);
        }
    }
    return outcome.code;
}

} // namespace
