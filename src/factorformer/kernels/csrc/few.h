// Products with a few tokens, as generation makes them, one at a time.
//
// They take the time in which weights come from memory, which are asked for ahead of their time. Dense matrices meet the
// tokens as floats, for which nothing has to be quantized; of bitmaps in int8 see bitmap.h.

#pragma once

#include <algorithm>
#include <type_traits>

#include "bitmap.h"
#include "factorformer.h"
#include "memory.h"
#include "simd.h"
#include "support.h"
#include "threads.h"

namespace {

constexpr int64_t SMALL = 1 << 15; // bytes of weights that one thread has read before others begin
constexpr int64_t LONG = 8192;     // values from which on a token leaves the first cache, and rows read it together
constexpr int ROWS_TOGETHER = 4;
constexpr int64_t WIDE = 4096; // columns from which on threads share them, and not the rows

// to[r] = a vector whose lanes add up to the product of row r with a token.
template <int R, typename T> INLINE void lanes_of(const T *weight, int64_t in, const float *x, Floats *to) {
    constexpr int V = 4;
    Floats sums[R][V] = {};
    int64_t k = 0;
    for (; k + V * LANES <= in; k += V * LANES) {
        for (int r = 0; r < R; ++r) ask_for<V * LANES>(weight + r * in + k);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Floats token = load(x + k + v * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r][v] += token * widen(weight + r * in + k + v * LANES);
        }
    }
    for (; k < in; k += LANES) {
        const Floats token = load_some(x + k, in - k);
        for (int r = 0; r < R; ++r) sums[r][0] += token * widen_some(weight + r * in + k, in - k);
    }
    for (int r = 0; r < R; ++r) to[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
}

// Rows [first, last) of the product with n tokens.
template <typename T>
void multiply_rows_few(const Matrix &m, const float *x, int64_t n, int64_t first, int64_t last, const float *bias, float *y) {
    const T *weight = static_cast<const T *>(m.weight);
    for (int64_t row = first; row < last; row += LANES) {
        const int here = static_cast<int>(std::min<int64_t>(LANES, last - row));
        for (int64_t t = 0; t < n; ++t) {
            Floats lanes[LANES] = {};
            int r = 0;
            if (m.in >= LONG)
                for (; r + ROWS_TOGETHER <= here; r += ROWS_TOGETHER)
                    lanes_of<ROWS_TOGETHER>(weight + (row + r) * m.in, m.in, x + t * m.in, lanes + r);
            for (; r < here; ++r) lanes_of<1>(weight + (row + r) * m.in, m.in, x + t * m.in, lanes + r);
            add_up(lanes, here, 1.0f, m.scales ? m.scales + row : nullptr, bias ? bias + row : nullptr,
                   y + t * m.out + row);
        }
    }
}

// y[first:last] += the first K rows of a matrix that is stored as (in, out), each times its value.
template <int K, typename T>
INLINE void add_rows(const T *weight, int64_t out, const Floats (&values)[K], int64_t first, int64_t last, float *y) {
    constexpr int V = 4;
    const int64_t distance = K * out; // the rows after these
    int64_t o = first;
    for (; o + V * LANES <= last; o += V * LANES) {
        for (int k = 0; k < K; ++k) ask_for<V * LANES>(weight + k * out + o, distance);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Floats total = load(y + o + v * LANES);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) total += values[k] * widen(weight + k * out + o + v * LANES);
            store(y + o + v * LANES, total);
        }
    }
    for (; o < last; o += LANES) {
        Floats total = load_some(y + o, last - o);
        for (int k = 0; k < K; ++k) total += values[k] * widen_some(weight + k * out + o, last - o);
        store_some(y + o, total, last - o);
    }
}

// y[:, first:last] = the product of n tokens with some of the rows of a matrix that is stored as (in, out).
template <typename T>
void multiply_columns_few(const Matrix &m, const float *x, int64_t n, const Share &rows, int64_t first, int64_t last,
                          const float *bias, float *y) {
    const T *weight = static_cast<const T *>(m.weight);
    for (int64_t t = 0; t < n; ++t)
        for (int64_t o = first; o < last; ++o) y[t * m.out + o] = bias ? bias[o] : 0.0f;
    const auto add = [&](int64_t k, auto count) {
        constexpr int K = decltype(count)::value;
        for (int64_t t = 0; t < n; ++t) {
            Floats values[K];
            for (int i = 0; i < K; ++i) values[i] = splat(x[t * m.in + k + i] * (m.integers ? m.scales[k + i] : 1.0f));
            add_rows(weight + k * m.out, m.out, values, first, last, y + t * m.out);
        }
    };
    int64_t k = rows.begin;
    for (; k + ROWS_TOGETHER <= rows.end; k += ROWS_TOGETHER) add(k, std::integral_constant<int, ROWS_TOGETHER>{});
    for (; k < rows.end; ++k) add(k, std::integral_constant<int, 1>{});
}

// The product with one matrix, of which each thread reads a part in one piece; `partial` has room for the result of each.
template <typename T>
void multiply_few(const Matrix &m, const float *x, int64_t n, const float *bias, float *partial, float *y) {
    const Share share(m.out, LANES);
    if (!m.columns) return multiply_rows_few<T>(m, x, n, share.begin, share.end, bias, y);
    if (m.out >= WIDE) {
        const Share part(m.out, 4 * LANES);
        return multiply_columns_few<T>(m, x, n, Share(m.in), part.begin, part.end, bias, y);
    }
    const int64_t threads = omp_get_num_threads(), size = n * m.out;
    float *own = threads > 1 ? partial + omp_get_thread_num() * size : y;
    multiply_columns_few<T>(m, x, n, Share(m.in, ROWS_TOGETHER), 0, m.out, threads > 1 ? nullptr : bias, own);
    if (threads == 1) return;
#pragma omp barrier
    for (int64_t t = 0; t < n; ++t)
        for (int64_t o = share.begin; o < share.end; o += LANES) {
            const int64_t at = t * m.out + o, left = share.end - o;
            Floats total = bias ? load_some(bias + o, left) : Floats{};
            for (int64_t thread = 0; thread < threads; ++thread) total += load_some(partial + thread * size + at, left);
            store_some(y + at, total, left);
        }
}

int32_t chain_few(const float *x, int64_t n, const Matrix *m, int64_t count, const float *bias, float *y) {
    static thread_local Scratch memory[3];
    int64_t widest = 1, bytes = 0, partial_size = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (i > 0) widest = std::max(widest, m[i].in);
        if (m[i].columns && m[i].out < WIDE) partial_size = std::max(partial_size, n * m[i].out * omp_get_max_threads());
        bytes += m[i].in * m[i].out * (m[i].integers ? 1 : 4);
    }
    float *hidden[2] = {memory[0].take<float>(widest * n), memory[1].take<float>(widest * n)};
    float *partial = memory[2].take<float>(partial_size);
    if (!hidden[0] || !hidden[1] || !partial) return NO_MEMORY;
#pragma omp parallel if (bytes > SMALL)
    {
        for (int64_t i = 0; i < count; ++i) {
            const bool last = i + 1 == count;
            const auto multiply = m[i].integers ? multiply_few<int8_t> : multiply_few<float>;
            multiply(m[i], i ? hidden[i % 2] : x, n, last ? bias : nullptr, partial, last ? y : hidden[(i + 1) % 2]);
            if (!last) {
#pragma omp barrier
            }
        }
    }
    return 0;
}

// Rows of a decoded chunk.
void multiply_chunk(const float *x, int64_t n, const Support &s, const Chunk &chunk, const float *bias, float *y,
                    int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const uint32_t *offsets = chunk.offsets_of(row, s.nonzeros);
        const float *values = chunk.values_of(row, s.nonzeros);
        for (int64_t t = 0; t < n; ++t) {
            const float *token = x + t * s.atoms;
            float parts[4] = {};
            int64_t j = 0;
            for (; j + 4 <= s.nonzeros; j += 4)
                for (int i = 0; i < 4; ++i) parts[i] += values[j + i] * token[offsets[j + i]];
            for (; j < s.nonzeros; ++j) parts[0] += values[j] * token[offsets[j]];
            y[t * s.rows + row] = (parts[0] + parts[1]) + (parts[2] + parts[3]) + (bias ? bias[row] : 0.0f);
        }
    }
}

// sums (n, apart) += the transposed product with rows of a decoded chunk.
void scatter_chunk(const float *x, int64_t n, const Support &s, const Chunk &chunk, int64_t first, int64_t last,
                   float *sums, int64_t apart) {
    for (int64_t row = first; row < last; ++row) {
        const uint32_t *offsets = chunk.offsets_of(row, s.nonzeros);
        const float *values = chunk.values_of(row, s.nonzeros);
        for (int64_t t = 0; t < n; ++t) {
            const float value = x[t * s.rows + row];
            for (int64_t j = 0; j < s.nonzeros; ++j) sums[t * apart + offsets[j]] += value * values[j];
        }
    }
}

INLINE int64_t bytes_of(const Support &s, const Values &v) { return s.rows * (s.bytes + s.nonzeros * (v.integers ? 1 : 4)); }

int32_t sparse_few(const float *x, int64_t n, const Support &s, const Values &v, const float *bias, float *y) {
    Outcome outcome;
#pragma omp parallel if (bytes_of(s, v) > SMALL)
    {
        const Share share(s.rows, LANES);
#if defined(__AVX512BW__)
        if (s.code == 0) {
            static thread_local Bitmap bitmap;
            outcome.allows(bitmap.multiply(s, v, x, n, share.begin, share.end, bias, y));
        } else
#endif
        {
            static thread_local Chunk chunk;
            const int64_t step = Chunk::rows(s, std::max<int64_t>(share.end - share.begin, 1), v.integers);
            const bool enough = outcome.allows(chunk.reserve(s, v, step));
            for (int64_t row = share.begin; row < share.end && enough; row += step) {
                const int64_t end = std::min(row + step, share.end);
                chunk.decode(s, v, row, end, 1);
                multiply_chunk(x, n, s, chunk, bias, y, row, end);
            }
        }
    }
    return outcome.code;
}

int32_t sparse_transposed_few(const float *x, int64_t n, const Support &s, const Values &v, float *y) {
    static thread_local Scratch memory;
    const int64_t apart = (s.atoms + ABREAST - 1) / ABREAST * ABREAST;
    float *sums = memory.take<float>(n * apart * omp_get_max_threads());
    if (!sums) return NO_MEMORY;
    Outcome outcome;
#pragma omp parallel if (bytes_of(s, v) > SMALL)
    {
        const Share share(s.rows, LANES), part(n * apart, ABREAST);
        float *own = sums + omp_get_thread_num() * n * apart;
        std::fill(own, own + n * apart, 0.0f);
#if defined(__AVX512BW__)
        if (s.code == 0) {
            static thread_local Bitmap bitmap;
            outcome.allows(bitmap.scatter(s, v, x, n, share.begin, share.end, own, apart));
        } else
#endif
        {
            static thread_local Chunk chunk;
            const int64_t step = Chunk::rows(s, std::max<int64_t>(share.end - share.begin, 1), v.integers);
            const bool enough = outcome.allows(chunk.reserve(s, v, step));
            for (int64_t row = share.begin; row < share.end && enough; row += step) {
                const int64_t end = std::min(row + step, share.end);
                chunk.decode(s, v, row, end, 1);
                scatter_chunk(x, n, s, chunk, row, end, own, apart);
            }
        }
#pragma omp barrier
        for (int64_t i = part.begin; i < part.end; i += LANES) {
            Floats total = load(sums + i);
            for (int thread = 1; thread < omp_get_num_threads(); ++thread)
                total += load(sums + thread * n * apart + i);
            store_some(y + i / apart * s.atoms + i % apart, total, std::max<int64_t>(s.atoms - i % apart, 0));
        }
    }
    return outcome.code;
}

} // namespace
