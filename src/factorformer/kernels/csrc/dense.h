// Chains of products with small dense matrices, floats or int8, whose intermediate results never leave the caches.
//
// A block of tokens goes through all matrices of the chain before the next one begins. Products with int8 weights
// quantize their input to one unsigned byte a value, with a scale and a zero point for each token, add up in integers,
// and are exact but for that; four values of a token share a word, which is what VNNI multiplies.

#pragma once

#include <algorithm>
#include <type_traits>

#include "factorformer.h"
#include "few.h"
#include "memory.h"
#include "simd.h"
#include "threads.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDEST = 4; // vectors of tokens in a block: as many as registers allow beside ROWS_AT_ONCE sums each
#else
constexpr int WIDEST = 2;
#endif
constexpr int ROWS_AT_ONCE = 6;
constexpr int LONGEST = 4; // matrices in a chain
constexpr int TILE = 48; // rows of output that are transposed back at once, a multiple of LANES and ROWS_AT_ONCE

// Words of four weights that lie in memory one after the other, or a row of the transposed matrix apart.
INLINE int32_t word(const int8_t *from, int64_t left) {
    int32_t w = 0;
    std::memcpy(&w, from, left < 4 ? left : 4);
    return w;
}

// total + the four products of the bytes of each lane.
INLINE Ints dot4(Ints total, Words x, int32_t weights) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)x, _mm512_set1_epi32(weights));
#else
    for (int i = 0; i < 4; ++i)
        total += static_cast<int8_t>(weights >> (8 * i)) * (Ints)((x >> (8 * i)) & 255u);
    return total;
#endif
}

INLINE Floats exponential(Floats x) {
    // 2^n * 2^f with |f| <= 1/2: the series of 2^f to the sixth term has a relative error of 2e-8. Of what is not a number,
    // it stays one that is not.
    const Floats limited = maximum(splat(-87.0f), x), scaled = limited * splat(1.44269504f);
    const Floats shifted = scaled + splat(12582912.0f), whole = shifted - splat(12582912.0f);
    const Floats f = (scaled - whole) * splat(0.69314718f);
    Floats series = splat(1.0f / 720);
    for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * f + splat(term);
    Words bits = (Words)shifted << 23;
    return (Floats)((Words)series + bits);
}

// x * Phi(x), with the error function of Abramowitz and Stegun 7.1.26, whose absolute error is below 1.5e-7.
INLINE Floats gelu_of(Floats x) {
    // Beyond 16 the tail is 0, also times infinity.
    const Floats size = minimum(splat(16.0f), (Floats)((Words)x & 0x7fffffffu)), z = size * splat(0.70710678f);
    const Floats t = splat(1.0f) / (splat(1.0f) + splat(0.3275911f) * z);
    Floats series = splat(1.061405429f);
    for (float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) series = series * t + splat(term);
    const Floats tail = splat(0.5f) * series * t * exponential(-z * z); // Phi(-|x|)
    return maximum(x, Floats{}) - size * tail;
}

// Sums of R rows of weights, `between` from one to the next and `step` between their entries, times a block of tokens
// (depth, V * LANES), rows `apart`.
template <int R, int V>
INLINE void float_sums(const float *tokens, int64_t apart, const float *weights, int64_t between, int64_t step, int64_t depth,
                       Floats (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = Floats{};
    for (int64_t k = 0; k < depth; ++k, tokens += apart, weights += step) {
        Floats x[V];
        for (int v = 0; v < V; ++v) x[v] = load(tokens + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const Floats w = splat(weights[r * between]);
            for (int v = 0; v < V; ++v) sums[r][v] += w * x[v];
        }
    }
}

// The same of bytes, four in a word; `between` and `step` are in bytes.
template <int R, int V>
INLINE void byte_sums(const uint32_t *tokens, int64_t apart, const int8_t *weights, int64_t between, int64_t step,
                      int64_t depth, Ints (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = Ints{};
    for (int64_t k = 0; k < depth; ++k, tokens += apart, weights += step) {
        __builtin_prefetch(weights + R * between + (R - 1) * step * k); // of the next rows, where they are contiguous
        Words x[V];
        for (int v = 0; v < V; ++v) std::memcpy(&x[v], tokens + v * LANES, sizeof(Words));
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const int32_t w = word(weights + r * between, 4);
            for (int v = 0; v < V; ++v) sums[r][v] = dot4(sums[r][v], x[v], w);
        }
    }
}

// to[r][:] = R rows of weights times a block of tokens.
template <int R, int V>
INLINE void float_rows(const float *tokens, const float *weights, int64_t between, int64_t step, int64_t depth, float *to) {
    Floats sums[R][V];
    float_sums<R, V>(tokens, V * LANES, weights, between, step, depth, sums);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(to + (r * V + v) * LANES, sums[r][v]);
}

// How many rows a block of V vectors of tokens meets at once: as many sums as registers hold.
template <int V> constexpr int ROWS_WITH = V == 1 ? 2 * ROWS_AT_ONCE : ROWS_AT_ONCE;

// Calls `rows` for R rows at a time, and for fewer at the end.
template <int R, typename Rows> INLINE void in_pieces(int64_t first, int64_t last, const Rows &rows) {
    for (; first + R <= last; first += R) rows(first, std::integral_constant<int, R>{});
    if constexpr (R > 1) in_pieces<R / 2>(first, last, rows);
}

// What a block of tokens is, to products with int8 weights.
template <int V> struct Quantized {
    uint32_t *words; // (in / 4, V * LANES)
    float scale[V * LANES], zero[V * LANES];
};

// What a product with int8 weights needs beside them: their sums, for the zero points of what they are multiplied by,
// and where the weights that share a word lie apart, the words.
struct Prepared {
    int32_t *sums;   // (out)
    uint32_t *words; // (in / 4, out); null where a word lies in memory as it is
};

// Columns [first, last) of `prepared` for a matrix that is stored as (in, out).
INLINE void pack_columns(const Matrix &m, int64_t first, int64_t last, const Prepared &to) {
    const int8_t *weight = static_cast<const int8_t *>(m.weight);
    std::fill(to.sums + first, to.sums + last, 0);
    for (int64_t k = 0; k < m.in; k += 4) {
        uint32_t *words = to.words + k / 4 * m.out;
        const int8_t *rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = weight + std::min(k + i, m.in - 1) * m.out;
        const int used = static_cast<int>(std::min<int64_t>(4, m.in - k));
        const uint32_t mask = used == 4 ? ~0u : (1u << (8 * used)) - 1;
        for (int64_t o = first; o < last; ++o) {
            const uint32_t word = static_cast<uint8_t>(rows[0][o]) | static_cast<uint32_t>(static_cast<uint8_t>(rows[1][o])) << 8 |
                                  static_cast<uint32_t>(static_cast<uint8_t>(rows[2][o])) << 16 |
                                  static_cast<uint32_t>(static_cast<uint8_t>(rows[3][o])) << 24;
            words[o] = word & mask;
            to.sums[o] += rows[0][o] + (used > 1 ? rows[1][o] : 0) + (used > 2 ? rows[2][o] : 0) + (used > 3 ? rows[3][o] : 0);
        }
    }
}

INLINE void sum_rows(const Matrix &m, int64_t first, int64_t last, const Prepared &to) {
    const int8_t *weight = static_cast<const int8_t *>(m.weight);
    for (int64_t row = first; row < last; ++row) {
        const int8_t *at = weight + row * m.in;
        int64_t k = 0;
        int32_t total = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        __m512i sums = _mm512_setzero_si512();
        for (; k + 64 <= m.in; k += 64) sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(at + k));
        total = _mm512_reduce_add_epi32(sums);
#endif
        for (; k < m.in; ++k) total += at[k];
        to.sums[row] = total;
    }
}

// From sums of integers to floats; a zero point adds its multiple of the sum of the weights.
template <int R, int V>
INLINE void integer_rows(const Quantized<V> &x, const Matrix &m, const Prepared &prepared, int64_t row, float *to) {
    const int64_t whole = m.columns ? (m.in + 3) / 4 : m.in / 4;
    const int8_t *weight = m.columns ? reinterpret_cast<const int8_t *>(prepared.words + row)
                                     : static_cast<const int8_t *>(m.weight) + row * m.in;
    const int64_t between = m.columns ? 4 : m.in;
    Ints sums[R][V];
    byte_sums<R, V>(x.words, V * LANES, weight, between, m.columns ? m.out * 4 : 4, whole, sums);
    const uint32_t *tokens = x.words + whole * V * LANES;
    if (4 * whole < m.in)
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                Words block;
                std::memcpy(&block, tokens + v * LANES, sizeof block);
                sums[r][v] = dot4(sums[r][v], block, word(weight + r * between + 4 * whole, m.in - 4 * whole));
            }
    for (int r = 0; r < R; ++r) {
        const float scale = m.columns ? 1.0f : m.scales[row + r];
        const float correction = static_cast<float>(prepared.sums[row + r]);
        for (int v = 0; v < V; ++v) {
            const Floats value = __builtin_convertvector(sums[r][v], Floats);
            const Floats zero = load(x.zero + v * LANES), factor = load(x.scale + v * LANES);
            store(to + (r * V + v) * LANES, (value - zero * splat(correction)) * (factor * splat(scale)));
        }
    }
}

// scale and zero point of each lane from its range; zero is always among the values that are exact.
INLINE void choose_range(Floats low, Floats high, Floats &scale, Floats &zero) {
    low = minimum(low, Floats{});
    high = maximum(high, Floats{});
    scale = maximum((high - low) * splat(1.0f / 255), splat(1e-30f));
    zero = (-low / scale + splat(12582912.0f)) - splat(12582912.0f);
}

INLINE Words quantize(Floats x, Floats inverse, Floats zero) {
    const Floats limited = minimum(maximum(x * inverse + zero, Floats{}), splat(255.0f));
    return (Words)(limited + splat(12582912.0f)) & 255u;
}

// Quantize a transposed block (k_end, V * LANES), each k of it times its scale if there are any.
template <int V> INLINE void quantize_block(const float *block, int64_t k_end, const float *scales, Quantized<V> &to) {
    constexpr int WIDTH = V * LANES;
    for (int v = 0; v < V; ++v) {
        const float *from = block + v * LANES;
        const auto value = [=](int64_t k) __attribute__((always_inline)) {
            return scales ? load(from + k * WIDTH) * splat(scales[k]) : load(from + k * WIDTH);
        };
        Floats low = {}, high = {}, wrong = {}; // `wrong` is 0, or not a number if a value is not or is infinite
        for (int64_t k = 0; k < k_end; ++k) {
            const Floats x = value(k);
            low = minimum(low, x);
            high = maximum(high, x);
            wrong += x * Floats{};
        }
        Floats scale, zero;
        choose_range(low, high, scale, zero);
        store(to.scale + v * LANES, scale + wrong);
        store(to.zero + v * LANES, zero);
        const Floats inverse = splat(1.0f) / scale;
        for (int64_t k = 0; k < k_end; k += 4) {
            Words packed = quantize(value(k), inverse, zero);
            for (int i = 1; i < 4 && k + i < k_end; ++i) packed |= quantize(value(k + i), inverse, zero) << (8 * i);
            std::memcpy(to.words + (k / 4) * WIDTH + v * LANES, &packed, sizeof packed);
        }
    }
}

template <int V> struct Stage {
    const float *tokens;
    const Quantized<V> *quantized;
    const Matrix *matrix;
    const Prepared *prepared;

    // Rows [first, last) of the product with the block, to (last - first, V * LANES).
    void multiply(int64_t first, int64_t last, float *to) const {
        const Matrix &m = *matrix;
        in_pieces<ROWS_WITH<V>>(first, last, [&](int64_t row, auto count) __attribute__((always_inline)) {
            constexpr int R = decltype(count)::value;
            float *place = to + (row - first) * V * LANES;
            if (m.integers) return integer_rows<R, V>(*quantized, m, *prepared, row, place);
            const float *weight = static_cast<const float *>(m.weight);
            if (m.columns) float_rows<R, V>(tokens, weight + row, 1, m.out, m.in, place);
            else float_rows<R, V>(tokens, weight + row * m.in, m.in, 1, m.in, place);
        });
    }
};

struct Buffers {
    Scratch hidden[2], words, sums, packed;
};

// Threads share a block of tokens and take rows of each matrix, with a barrier between, or have blocks of their own.
template <int V>
int32_t chain_blocks(const float *x, int64_t n, const Matrix *m, int64_t count, const float *bias, float *y) {
    constexpr int WIDTH = V * LANES;
    static thread_local Buffers common;
    const int64_t blocks = (n + WIDTH - 1) / WIDTH, in = m[0].in, out = m[count - 1].out;
    const bool together = blocks < omp_get_max_threads();
    int64_t widest = in, sums_size = 0, words_size = 0;
    for (int64_t i = 0; i < count; ++i) {
        widest = std::max(widest, m[i].in);
        if (m[i].integers) sums_size += m[i].out;
        if (m[i].integers && m[i].columns) words_size += (m[i].in + 3) / 4 * m[i].out;
    }
    Prepared prepared[LONGEST];
    int32_t *sums = common.sums.take<int32_t>(sums_size);
    uint32_t *packed = common.packed.take<uint32_t>(words_size);
    if (!sums || !packed) return NO_MEMORY;
    for (int64_t i = 0; i < count; ++i) {
        prepared[i] = {sums, packed};
        if (m[i].integers) sums += m[i].out;
        if (m[i].integers && m[i].columns) packed += (m[i].in + 3) / 4 * m[i].out;
    }
    float *shared[2] = {};
    uint32_t *shared_words = nullptr;
    if (together) {
        for (int part = 0; part < 2; ++part) shared[part] = common.hidden[part].template take<float>(widest * WIDTH);
        shared_words = common.words.take<uint32_t>((widest + 3) / 4 * WIDTH);
        if (!shared[0] || !shared[1] || !shared_words) return NO_MEMORY;
    }
    Outcome outcome;
    static thread_local Quantized<V> shared_quantized_memory;
    Quantized<V> *shared_quantized = &shared_quantized_memory;
#pragma omp parallel
    {
        static thread_local Buffers own;
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t i = 0; i < count; ++i)
            if (m[i].integers) {
                const int64_t first = m[i].out * me / threads, last = m[i].out * (me + 1) / threads;
                if (m[i].columns) pack_columns(m[i], first, last, prepared[i]);
                else sum_rows(m[i], first, last, prepared[i]);
            }
#pragma omp barrier
        float *hidden[2] = {shared[0], shared[1]};
        Quantized<V> own_quantized, *quantized = together ? shared_quantized : &own_quantized;
        uint32_t *words = shared_words;
        if (!together) {
            for (int part = 0; part < 2; ++part) hidden[part] = own.hidden[part].template take<float>(widest * WIDTH);
            words = own.words.template take<uint32_t>((widest + 3) / 4 * WIDTH);
        }
        const bool enough = outcome.allows(hidden[0] && hidden[1] && words); // alike in all threads where they share it
        alignas(64) float tile[TILE * WIDTH];
        const int64_t begin = together ? 0 : blocks * me / threads, end = together ? blocks : blocks * (me + 1) / threads;
        for (int64_t b = begin; b < end && enough; ++b) {
            const int64_t t = b * WIDTH;
            const int tokens = static_cast<int>(std::min<int64_t>(WIDTH, n - t));
            if (!together || me == 0) transpose_in(x + t * in, in, tokens, in, hidden[0], WIDTH);
            for (int64_t i = 0; i < count; ++i) {
                if (m[i].integers && (!together || me == 0)) {
                    quantized->words = words;
                    quantize_block<V>(hidden[i % 2], m[i].in, m[i].columns ? m[i].scales : nullptr, *quantized);
                }
                if (together) {
#pragma omp barrier
                }
                const Stage<V> stage{hidden[i % 2], quantized, m + i, prepared + i};
                const int64_t tiles = (m[i].out + TILE - 1) / TILE;
                const int64_t first = together ? std::min(tiles * me / threads * TILE, m[i].out) : 0;
                const int64_t last = together ? std::min(tiles * (me + 1) / threads * TILE, m[i].out) : m[i].out;
                if (i + 1 < count) {
                    stage.multiply(first, last, hidden[(i + 1) % 2] + first * WIDTH);
                } else
                    for (int64_t row = first; row < last; row += TILE) {
                        const int here = static_cast<int>(std::min<int64_t>(TILE, last - row));
                        stage.multiply(row, row + here, tile);
                        if (bias)
                            for (int i = 0; i < here * V; ++i)
                                store(tile + i * LANES, load(tile + i * LANES) + splat(bias[row + i / V]));
                        transpose_out(tile, WIDTH, here, tokens, y + t * out + row, out);
                    }
                if (together) {
#pragma omp barrier
                }
            }
        }
    }
    return outcome.code;
}

int32_t chain(const float *x, int64_t n, const Matrix *m, int64_t count, const float *bias, float *y) {
    const int64_t threads = omp_get_max_threads();
    if (n <= FEW) return chain_few(x, n, m, count, bias, y);
    if (n >= threads * WIDEST * LANES) return chain_blocks<WIDEST>(x, n, m, count, bias, y);
    if (n >= threads * 2 * LANES) return chain_blocks<2>(x, n, m, count, bias, y);
    return chain_blocks<1>(x, n, m, count, bias, y);
}

void gelu(const float *x, int64_t n, float *y) {
#pragma omp parallel for schedule(static) if (n > 16384)
    for (int64_t block = 0; block < n / LANES; ++block) store(y + block * LANES, gelu_of(load(x + block * LANES)));
    if (n % LANES) {
        float rest[LANES] = {};
        std::copy(x + n / LANES * LANES, x + n, rest);
        store(rest, gelu_of(load(rest)));
        std::copy(rest, rest + n % LANES, y + n / LANES * LANES);
    }
}

} // namespace
