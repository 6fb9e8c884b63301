// Rows of a sparse matrix whose support is a bitmap, and what they make of a few tokens.
//
// An instruction puts stored values where the bits are set, zeros between them, and the product is a dense one from there
// on. Where values are bytes and the processor has instructions for these, tokens become two bytes a value, whose unit is
// 1 / 32,639 of the largest of a token, and in the transposed product of what the rows of a thread are multiplied by.

#pragma once

#include <algorithm>

#include "factorformer.h"
#include "memory.h"
#include "simd.h"

namespace {

constexpr int ABREAST = 64; // entries of a row that are put in their places at once

#if defined(__AVX512BW__)

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define IN_BYTES 1
constexpr int64_t MOST_ATOMS = 4096; // whose products with bytes and 128 add up to less than 2^31 in each lane
constexpr int64_t MOST_ROWS = 256;   // the same where the sums are over rows
#endif

INLINE uint64_t first_ones(int count) { return _bzhi_u64(~0ull, static_cast<unsigned>(count)); }

// Up to 64 bits.
INLINE uint64_t bits_at(const uint8_t *from, int64_t bytes) {
    if (bytes < 8)
        return _mm_cvtsi128_si64(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << bytes) - 1), from));
    uint64_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return bits;
}

// Calls `block(atom, bits, values)` for each block of a row: its bits, and where the values of these begin.
template <typename T, typename Block>
INLINE void blocks_of(const Support &s, const Values &v, int64_t row, const Block &block) {
    const uint8_t *from = s.packed + row * s.bytes;
    const T *values = static_cast<const T *>(v.values) + row * s.nonzeros;
    ask_for<ABREAST>(from);
    for (int64_t byte = 0; byte < s.bytes; byte += ABREAST / 8) {
        const uint64_t bits = bits_at(from + byte, s.bytes - byte);
        ask_for<ABREAST / 2>(values);
        block(8 * byte, bits, values);
        values += __builtin_popcountll(bits);
    }
}

// LANES values in their places, as floats.
INLINE Floats spread(__mmask16 bits, const float *values) {
    const __mmask16 stored = static_cast<__mmask16>(first_ones(__builtin_popcount(bits)));
    return (Floats)_mm512_maskz_expand_ps(bits, _mm512_maskz_loadu_ps(stored, values));
}

INLINE Floats spread(__mmask16 bits, const int8_t *values) {
    const __mmask16 stored = static_cast<__mmask16>(first_ones(__builtin_popcount(bits)));
    const __m512i whole = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(stored, values));
    return (Floats)_mm512_maskz_expand_ps(bits, _mm512_cvtepi32_ps(whole));
}

template <typename T> INLINE void spread_all(uint64_t bits, const T *values, Floats (&to)[ABREAST / LANES]) {
#pragma GCC unroll 4
    for (int i = 0; i < ABREAST / LANES; ++i, bits >>= LANES) {
        to[i] = spread(static_cast<__mmask16>(bits), values);
        values += __builtin_popcount(static_cast<__mmask16>(bits));
    }
}

#if IN_BYTES
// Values in units of the largest of them: scale (256 high + low).
struct Halves {
    const int8_t *high, *low;
    float scale;
};

constexpr float REACH = 32639; // the largest number of that kind

// The scale by which values go no farther than that, not a number if one of them is not; each times its factor, if any.
INLINE float scale_of(const float *x, const float *factors, int64_t count) {
    Floats most{}, wrong{};
    for (int64_t k = 0; k < count; k += LANES) {
        const Floats value = load_some(x + k, count - k) * (factors ? load_some(factors + k, count - k) : splat(1.0f));
        most = maximum(maximum(value, -value), most);
        wrong += value * Floats{};
    }
    return std::max(_mm512_reduce_max_ps((__m512)most) / REACH, 1e-30f) + sum(wrong);
}

INLINE __m512i codes_of(Floats value, float scale) {
    const Floats limited = minimum(maximum(value / splat(scale), splat(-REACH)), splat(REACH));
    return _mm512_cvtps_epi32((__m512)limited);
}

// LANES codes as the two bytes of each.
INLINE void split(__m512i codes, int8_t *highs, int8_t *lows) {
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(highs), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(lows), _mm512_cvtepi32_epi8(codes));
}
#endif

// What a thread needs to multiply rows of a bitmap.
struct Bitmap {
    Scratch tokens_memory, codes_memory, sums_memory;

    // Rows [first, last) of the product with n tokens; whether there is memory.
    bool multiply(const Support &s, const Values &v, const float *x, int64_t n, int64_t first, int64_t last,
                  const float *bias, float *y) {
        const int64_t apart = (s.atoms + ABREAST - 1) / ABREAST * ABREAST;
#if IN_BYTES
        if (v.integers && s.atoms <= MOST_ATOMS) {
            int8_t *bytes = codes_memory.take<int8_t>(2 * n * apart);
            for (int64_t t = 0; t < n && bytes; ++t) {
                const Halves token = halves(x + t * s.atoms, s.atoms, apart, bytes + 2 * t * apart);
                multiply_bytes(s, v, token, apart, first, last, bias, y + t * s.rows);
            }
            return bytes;
        }
#endif
        float *tokens = tokens_memory.take<float>(n * apart);
        if (!tokens) return false;
        for (int64_t t = 0; t < n; ++t) {
            std::copy(x + t * s.atoms, x + (t + 1) * s.atoms, tokens + t * apart);
            std::fill(tokens + t * apart + s.atoms, tokens + (t + 1) * apart, 0.0f);
        }
        const auto multiply = v.integers ? &Bitmap::multiply_floats<int8_t> : &Bitmap::multiply_floats<float>;
        multiply(s, v, tokens, apart, n, first, last, bias, y);
        return true;
    }

    // sums (n, apart) += the transposed product of n tokens with rows [first, last); whether there is memory.
    bool scatter(const Support &s, const Values &v, const float *x, int64_t n, int64_t first, int64_t last, float *sums,
                 int64_t apart) {
#if IN_BYTES
        if (v.integers) {
            int8_t *codes = codes_memory.take<int8_t>(2 * (last - first + LANES));
            int32_t *totals = sums_memory.take<int32_t>(apart);
            for (int64_t t = 0; t < n && codes && totals; ++t)
                scatter_bytes(s, v, x + t * s.rows, first, last, codes, totals, apart, sums + t * apart);
            return codes && totals;
        }
#endif
        const auto scatter = v.integers ? &Bitmap::scatter_floats<int8_t> : &Bitmap::scatter_floats<float>;
        for (int64_t t = 0; t < n; ++t) scatter(s, v, x + t * s.rows, first, last, sums + t * apart);
        return true;
    }

private:
    template <typename T>
    static void multiply_floats(const Support &s, const Values &v, const float *tokens, int64_t apart, int64_t n,
                                int64_t first, int64_t last, const float *bias, float *y) {
        for (int64_t row = first; row < last; row += LANES) {
            const int here = static_cast<int>(std::min<int64_t>(LANES, last - row));
            for (int64_t t = 0; t < n; ++t) {
                const float *token = tokens + t * apart;
                Floats lanes[LANES] = {};
                for (int r = 0; r < here; ++r) {
                    Floats sums[ABREAST / LANES] = {};
                    blocks_of<T>(s, v, row + r, [&](int64_t atom, uint64_t bits, const T *values) INLINED {
                        Floats entries[ABREAST / LANES];
                        spread_all(bits, values, entries);
#pragma GCC unroll 4
                        for (int i = 0; i < ABREAST / LANES; ++i) sums[i] += entries[i] * load(token + atom + i * LANES);
                    });
                    lanes[r] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
                }
                const float *scales = v.integers ? v.scales + row : nullptr;
                add_up(lanes, here, 1.0f, scales, bias ? bias + row : nullptr, y + t * s.rows + row);
            }
        }
    }

    template <typename T>
    static void scatter_floats(const Support &s, const Values &v, const float *x, int64_t first, int64_t last, float *sums) {
        for (int64_t row = first; row < last; ++row) {
            const Floats value = splat(x[row] * (v.integers ? v.scales[row] : 1.0f));
            blocks_of<T>(s, v, row, [&](int64_t atom, uint64_t bits, const T *values) INLINED {
                Floats entries[ABREAST / LANES];
                spread_all(bits, values, entries);
                float *to = sums + atom;
#pragma GCC unroll 4
                for (int i = 0; i < ABREAST / LANES; ++i)
                    store(to + i * LANES, load(to + i * LANES) + value * entries[i]);
            });
        }
    }

#if IN_BYTES
    // Bytes of a row in their places, 128 more than they are: as what VNNI takes to be without a sign.
    INLINE __m512i spread_bytes(uint64_t bits, const int8_t *values, bool inside) {
        const __m512i stored = inside ? _mm512_loadu_si512(values)
                                      : _mm512_maskz_loadu_epi8(first_ones(__builtin_popcountll(bits)), values);
        return _mm512_xor_si512(_mm512_maskz_expand_epi8(bits, stored), _mm512_set1_epi8(-128));
    }

    // Whether ABREAST values can be read wherever a row begins.
    INLINE bool is_inside(const Support &s, int64_t row) { return (s.rows - row - 1) * s.nonzeros >= ABREAST; }

    static Halves halves(const float *x, int64_t count, int64_t apart, int8_t *to) {
        const float scale = scale_of(x, nullptr, count);
        for (int64_t k = 0; k < apart; k += LANES) {
            split(codes_of(k < count ? load_some(x + k, count - k) : Floats{}, scale), to + k, to + apart + k);
        }
        return {to, to + apart, scale};
    }

    static void multiply_bytes(const Support &s, const Values &v, const Halves &token, int64_t apart, int64_t first,
                               int64_t last, const float *bias, float *y) {
        const auto sum_of = [](__m512i high, __m512i low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); };
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int64_t k = 0; k < apart; k += ABREAST) {
            high = _mm512_dpbusd_epi32(high, _mm512_set1_epi8(-128), _mm512_loadu_si512(token.high + k));
            low = _mm512_dpbusd_epi32(low, _mm512_set1_epi8(-128), _mm512_loadu_si512(token.low + k));
        }
        const __m512i excess = sum_of(high, low);
        for (int64_t row = first; row < last; row += LANES) {
            const int here = static_cast<int>(std::min<int64_t>(LANES, last - row));
            Floats lanes[LANES] = {};
            for (int r = 0; r < here; ++r) {
                const bool inside = is_inside(s, row + r);
                high = low = _mm512_setzero_si512();
                blocks_of<int8_t>(s, v, row + r, [&](int64_t atom, uint64_t bits, const int8_t *values) INLINED {
                    const __m512i entries = spread_bytes(bits, values, inside);
                    high = _mm512_dpbusd_epi32(high, entries, _mm512_loadu_si512(token.high + atom));
                    low = _mm512_dpbusd_epi32(low, entries, _mm512_loadu_si512(token.low + atom));
                });
                lanes[r] = (Floats)_mm512_cvtepi32_ps(_mm512_sub_epi32(sum_of(high, low), excess));
            }
            add_up(lanes, here, token.scale, v.scales + row, bias ? bias + row : nullptr, y + row);
        }
    }

    // Four rows in their places, interleaved: vector i has of each 16 atoms the i-th four, all rows of one in a word.
    INLINE void interleave(const __m512i (&rows)[4], __m512i (&to)[4]) {
        const __m512i first[2] = {_mm512_unpacklo_epi8(rows[0], rows[1]), _mm512_unpackhi_epi8(rows[0], rows[1])};
        const __m512i last[2] = {_mm512_unpacklo_epi8(rows[2], rows[3]), _mm512_unpackhi_epi8(rows[2], rows[3])};
        for (int i = 0; i < 2; ++i) {
            to[2 * i] = _mm512_unpacklo_epi16(first[i], last[i]);
            to[2 * i + 1] = _mm512_unpackhi_epi16(first[i], last[i]);
        }
    }

    static void scatter_bytes(const Support &s, const Values &v, const float *x, int64_t first, int64_t last, int8_t *codes,
                              int32_t *totals, int64_t apart, float *sums) {
        const float scale = scale_of(x + first, v.scales + first, last - first);
        const int64_t padded = (last - first + LANES - 1) / LANES * LANES;
        int8_t *const highs = codes, *const lows = codes + padded;
        for (int64_t k = 0; k < padded; k += LANES) {
            const int64_t left = last - first - k;
            const Floats value = load_some(x + first + k, left) * load_some(v.scales + first + k, left);
            split(codes_of(value, scale), highs + k, lows + k);
        }
        for (int64_t start = first; start < last; start += MOST_ROWS) {
            const int64_t end = std::min(start + MOST_ROWS, last);
            std::fill(totals, totals + apart, 0);
            int32_t excess = 0;
            for (int64_t row = start; row < end; row += 4) {
                const uint8_t *from[4];
                const int8_t *values[4];
                bool inside[4];
                for (int r = 0; r < 4; ++r) { // codes beyond the last row are 0
                    const int64_t here = std::min(row + r, last - 1);
                    from[r] = s.packed + here * s.bytes;
                    values[r] = static_cast<const int8_t *>(v.values) + here * s.nonzeros;
                    inside[r] = is_inside(s, here);
                    ask_for<ABREAST>(from[r], 4 * s.bytes);
                    excess += 128 * (256 * highs[row - first + r] + lows[row - first + r]);
                }
                int32_t high_word, low_word;
                std::memcpy(&high_word, highs + row - first, sizeof high_word);
                std::memcpy(&low_word, lows + row - first, sizeof low_word);
                const __m512i high = _mm512_set1_epi32(high_word), low = _mm512_set1_epi32(low_word);
                for (int64_t byte = 0; byte < s.bytes; byte += ABREAST / 8) {
                    __m512i entries[4], mixed[4];
                    for (int r = 0; r < 4; ++r) {
                        const uint64_t bits = bits_at(from[r] + byte, s.bytes - byte);
                        ask_for<ABREAST / 2>(values[r], 4 * s.nonzeros);
                        entries[r] = spread_bytes(bits, values[r], inside[r]);
                        values[r] += __builtin_popcountll(bits);
                    }
                    interleave(entries, mixed);
                    int32_t *to = totals + 8 * byte;
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        const __m512i more = _mm512_dpbusd_epi32(_mm512_setzero_si512(), mixed[i], high);
                        const __m512i total = _mm512_dpbusd_epi32(_mm512_loadu_si512(to + i * LANES), mixed[i], low);
                        _mm512_storeu_si512(to + i * LANES, _mm512_add_epi32(total, _mm512_slli_epi32(more, 8)));
                    }
                }
            }
            for (int64_t atom = 0; atom < apart; atom += ABREAST)
                for (int quarter = 0; quarter < 4; ++quarter) // of what was interleaved, 4 atoms of each vector
                    for (int i = 0; i < 4; ++i) {
                        const int64_t place = atom + quarter * LANES + i * 4;
                        const int32_t *from = totals + atom + i * LANES + quarter * 4;
                        for (int j = 0; j < 4; ++j) sums[place + j] += scale * static_cast<float>(from[j] - excess);
                    }
        }
    }
#endif
};

#endif // __AVX512BW__

} // namespace
