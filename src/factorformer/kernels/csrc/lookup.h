// Rows of tables in factors: each a sum of few rows of a small matrix, of which nothing else is read.

#pragma once

#include <algorithm>

#include "dense.h"
#include "factorformer.h"
#include "memory.h"
#include "simd.h"
#include "sparse.h"
#include "threads.h"

namespace {

constexpr int64_t ALONE = 16; // up to so many rows one thread makes them all

// Which rows tokens ask for: where texts repeat many, each once, to be copied where it is asked for again.
struct Wanted {
    const int64_t *rows;   // (count)
    const int32_t *places; // (n): which of the rows each token gets; null where token t gets row t
    int64_t count;
    float *made; // (count, width): where the rows go
};

int32_t check_rows(const int64_t *index, int64_t n, int64_t rows) {
    for (int64_t t = 0; t < n; ++t)
        if (index[t] < 0 || index[t] >= rows) return NO_ROW;
    return 0;
}

int32_t wanted_rows(const int64_t *index, int64_t n, int64_t rows, int64_t width, float *y, Wanted &found) {
    static thread_local Scratch slots_memory, rows_memory, places_memory, made_memory;
    if (const int32_t code = check_rows(index, n, rows)) return code;
    found = {index, nullptr, n, y};
    if (n <= ALONE) return 0;
    int bits = 6;
    while ((int64_t{1} << bits) < 2 * n) ++bits;
    int32_t *slots = slots_memory.take<int32_t>(std::size_t{1} << bits), *places = places_memory.take<int32_t>(n);
    int64_t *once = rows_memory.take<int64_t>(n), count = 0;
    if (!slots || !places || !once) return NO_MEMORY;
    std::fill_n(slots, int64_t{1} << bits, -1);
    for (int64_t t = 0; t < n; ++t) {
        uint64_t at = static_cast<uint64_t>(index[t]) * 0x9e3779b97f4a7c15u >> (64 - bits);
        while (slots[at] >= 0 && once[slots[at]] != index[t]) at = (at + 1) & ((uint64_t{1} << bits) - 1);
        if (slots[at] < 0) {
            slots[at] = static_cast<int32_t>(count);
            once[count++] = index[t];
        }
        places[t] = slots[at];
    }
    if (4 * count > 3 * n) return 0; // copies would cost as much
    float *made = made_memory.take<float>(count * width);
    if (!made) return NO_MEMORY;
    found = {once, places, count, made};
    return 0;
}

// To every token its row.
void hand_out(const Wanted &wanted, int64_t n, int64_t width, float *y) {
    if (!wanted.places) return;
#pragma omp parallel if (n > ALONE)
    {
        const Share share(n, 1);
        for (int64_t t = share.begin; t < share.end; ++t)
            std::memcpy(y + t * width, wanted.made + wanted.places[t] * width, width * sizeof(float));
    }
}

// Rows of a dense matrix as floats, to (count, in).
void gather(const Wanted &wanted, const Matrix &m, float *to) {
#pragma omp parallel if (wanted.count > ALONE)
    {
        const Share share(wanted.count, 1);
        for (int64_t i = share.begin; i < share.end; ++i) {
            const int64_t row = wanted.rows[i];
            float *y = to + i * m.in;
            if (!m.integers) {
                std::memcpy(y, static_cast<const float *>(m.weight) + row * m.in, m.in * sizeof(float));
                continue;
            }
            const int8_t *from = static_cast<const int8_t *>(m.weight) + row * m.in;
            const Floats scale = splat(m.scales[row]);
            int64_t k = 0;
            for (; k + LANES <= m.in; k += LANES) store(y + k, widen(from + k) * scale);
            for (; k < m.in; ++k) y[k] = from[k] * m.scales[row];
        }
    }
}

// Rows of a table, and if there is a second matrix, their product with it.
int32_t dense_rows(const int64_t *index, int64_t n, const Matrix *table, const Matrix *right, float *y) {
    static thread_local Scratch memory;
    if (!right) {
        if (const int32_t code = check_rows(index, n, table->out)) return code;
        gather({index, nullptr, n, y}, *table, y);
        return 0;
    }
    const int64_t width = right->out;
    Wanted wanted;
    if (const int32_t code = wanted_rows(index, n, table->out, width, y, wanted)) return code;
    float *rows = memory.take<float>(wanted.count * table->in);
    if (!rows) return NO_MEMORY;
    gather(wanted, *table, rows);
    if (const int32_t code = wanted.count ? chain(rows, wanted.count, right, 1, nullptr, wanted.made) : 0) return code;
    hand_out(wanted, n, width, y);
    return 0;
}

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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define BYTES_ABREAST 64 // columns in which rows of bytes are added up at once, four rows at a time

// As `combine`, of int8 rows in columns that are a multiple of BYTES_ABREAST: each coefficient becomes two bytes, of which
// the second is in units of 1 / 254 of the first, so that next to nothing of it is lost. `words` has room for twice as
// many bytes as there are terms, and both arrays for up to 16 terms more.
INLINE void combine_bytes(float *coefficients, uint32_t *offsets, int64_t terms, const int8_t *rows, int64_t width,
                          int8_t *words, float *y) {
    const int64_t padded = (terms + LANES - 1) / LANES * LANES;
    std::fill(coefficients + terms, coefficients + padded, 0.0f);
    std::fill(offsets + terms, offsets + padded, 0u);
    Floats most = {}, wrong = {}; // `wrong` is 0, or not a number if a coefficient is not or is infinite
    for (int64_t k = 0; k < padded; k += LANES) {
        const Floats value = load(coefficients + k);
        most = maximum(most, maximum(value, -value));
        wrong += value * Floats{};
    }
    const float largest = _mm512_reduce_max_ps((__m512)most);
    const float unit = std::max(largest / 127, 1e-30f) + sum(wrong), small = unit / 254;
    int8_t *high = words, *low = words + padded;
    __m512i totals[2] = {};
    for (int64_t k = 0; k < padded; k += LANES) {
        const Floats value = load(coefficients + k);
        const __m512i first = _mm512_cvtps_epi32((__m512)(value / splat(unit)));
        const Floats rest = value - (Floats)_mm512_cvtepi32_ps(first) * splat(unit);
        const __m512i second = _mm512_cvtps_epi32((__m512)(rest / splat(small)));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(high + k), _mm512_cvtsepi32_epi8(first));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(low + k), _mm512_cvtsepi32_epi8(second));
        totals[0] = _mm512_add_epi32(totals[0], first);
        totals[1] = _mm512_add_epi32(totals[1], second);
    }
    // Bytes of rows count from 0 on here, 128 too many.
    __m512i begin[2];
    for (int i = 0; i < 2; ++i) {
        const uint32_t total = static_cast<uint32_t>(_mm512_reduce_add_epi32(totals[i]));
        begin[i] = _mm512_set1_epi32(static_cast<int32_t>(0u - 128u * total));
    }
    const __m512i shift = _mm512_set1_epi8(-128);
    for (int64_t column = 0; column < width; column += BYTES_ABREAST) {
        const int8_t *here = rows + column;
        __m512i sums[2][4] = {{begin[0], begin[0], begin[0], begin[0]}, {begin[1], begin[1], begin[1], begin[1]}};
        for (int64_t k = 0; k < terms; k += 4) {
            __m512i bytes[4];
            for (int i = 0; i < 4; ++i) bytes[i] = _mm512_xor_si512(_mm512_loadu_si512(here + offsets[k + i]), shift);
            const __m512i pairs[4] = {_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1]),
                                      _mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3])};
            // Of each quarter of a vector's 64 columns, four to a lane: 0 to 3, 4 to 7, 8 to 11, 12 to 15.
            const __m512i fours[4] = {_mm512_unpacklo_epi16(pairs[0], pairs[2]), _mm512_unpackhi_epi16(pairs[0], pairs[2]),
                                      _mm512_unpacklo_epi16(pairs[1], pairs[3]), _mm512_unpackhi_epi16(pairs[1], pairs[3])};
            const __m512i large = _mm512_set1_epi32(word(high + k, 4)), little = _mm512_set1_epi32(word(low + k, 4));
            for (int i = 0; i < 4; ++i) {
                sums[0][i] = _mm512_dpbusd_epi32(sums[0][i], fours[i], large);
                sums[1][i] = _mm512_dpbusd_epi32(sums[1][i], fours[i], little);
            }
        }
        __m512i done[4];
        for (int i = 0; i < 4; ++i) {
            const Floats first = (Floats)_mm512_cvtepi32_ps(sums[0][i]), second = (Floats)_mm512_cvtepi32_ps(sums[1][i]);
            done[i] = (__m512i)(first * splat(unit) + second * splat(small));
        }
        // The transpose of the quarters.
        const __m512i even[2] = {_mm512_shuffle_i32x4(done[0], done[1], 0x88), _mm512_shuffle_i32x4(done[2], done[3], 0x88)};
        const __m512i odd[2] = {_mm512_shuffle_i32x4(done[0], done[1], 0xdd), _mm512_shuffle_i32x4(done[2], done[3], 0xdd)};
        float *to = y + column;
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
        _mm512_storeu_si512(to + LANES, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
        _mm512_storeu_si512(to + 2 * LANES, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
        _mm512_storeu_si512(to + 3 * LANES, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
    }
}
#endif

// A row of S (rows, atoms) times the dictionary (atoms, width).
template <typename T>
INLINE void sparse_row(const Support &s, const Values &v, const Matrix &dictionary, int64_t row, uint32_t *positions,
                       float *coefficients, int8_t *words, float *y) {
    decode_positions(s, row, 1, positions);
    if (v.integers)
        decode_values(v, row, s.nonzeros, coefficients);
    else
        std::copy_n(static_cast<const float *>(v.values) + row * s.nonzeros, s.nonzeros, coefficients);
    for (int64_t j = 0; j < s.nonzeros; ++j) {
        if (dictionary.integers) coefficients[j] *= dictionary.scales[positions[j]];
        positions[j] *= static_cast<uint32_t>(dictionary.in);
    }
    int64_t done = 0;
#ifdef BYTES_ABREAST
    if constexpr (sizeof(T) == 1)
        if (s.nonzeros >= LANES && dictionary.in >= BYTES_ABREAST) { // of fewer terms, floats lose nothing
            done = dictionary.in / BYTES_ABREAST * BYTES_ABREAST;
            combine_bytes(coefficients, positions, s.nonzeros, static_cast<const int8_t *>(dictionary.weight), done, words, y);
        }
#endif
    const T *rest = static_cast<const T *>(dictionary.weight) + done;
    combine(coefficients, positions, s.nonzeros, rest, dictionary.in - done, y + done);
}

int32_t sparse_rows(const int64_t *index, int64_t n, const Support *support, const Values *v, const Matrix *dictionary,
                    float *y) {
    const Support &s = *support;
    Wanted wanted;
    if (const int32_t code = wanted_rows(index, n, s.rows, dictionary->in, y, wanted)) return code;
    Outcome outcome;
#pragma omp parallel if (wanted.count > ALONE)
    {
        static thread_local Scratch positions_memory, coefficients_memory, words_memory;
        uint32_t *positions = positions_memory.take<uint32_t>(s.nonzeros + SLACK);
        float *coefficients = coefficients_memory.take<float>(s.nonzeros + LANES);
        int8_t *words = words_memory.take<int8_t>(2 * (s.nonzeros + LANES));
        const bool enough = outcome.allows(positions && coefficients && words);
        const Share share(wanted.count, 1);
        const auto one = dictionary->integers ? sparse_row<int8_t> : sparse_row<float>;
        for (int64_t i = share.begin; i < share.end && enough; ++i)
            one(s, *v, *dictionary, wanted.rows[i], positions, coefficients, words, wanted.made + i * dictionary->in);
    }
    if (!outcome.code) hand_out(wanted, n, dictionary->in, y);
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
    Wanted wanted;
    if (const int32_t code = wanted_rows(index, n, k.rows, k.width, y, wanted)) return code;
    Outcome outcome;
#pragma omp parallel if (wanted.count > ALONE)
    {
        static thread_local Scratch offsets_memory, coefficients_memory;
        uint32_t *offsets = offsets_memory.take<uint32_t>(k.rank);
        float *coefficients = coefficients_memory.take<float>(k.n1 * k.rank);
        const bool enough = outcome.allows(offsets && coefficients);
        for (int64_t r = 0; r < k.rank && enough; ++r) offsets[r] = static_cast<uint32_t>(r * k.n2);
        const Share share(wanted.count, 1);
        const auto one = k.integers ? kronecker_row<int8_t> : kronecker_row<float>;
        for (int64_t i = share.begin; i < share.end && enough; ++i)
            one(k, wanted.rows[i], offsets, coefficients, wanted.made + i * k.width);
    }
    if (!outcome.code) hand_out(wanted, n, k.width, y);
    return outcome.code;
}

} // namespace
