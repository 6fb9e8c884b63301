// The support of a sparse matrix, decoded: offsets of the entries of a chunk of rows, and their values.
//
// Bitmaps and indices, floats and int8 cost the same once they are decoded.

#pragma once

#include <algorithm>

#include "factorformer.h"
#include "memory.h"
#include "simd.h"

namespace {

constexpr std::size_t DECODED = 512 * 1024; // bytes of a decoded chunk: it stays in the second cache
constexpr int SLACK = 64;                   // offsets that may be written beyond the last

// Positions of one row's nonzeros, times `scale`; up to SLACK entries beyond them are overwritten.
INLINE void decode_positions(const Support &s, int64_t row, uint32_t scale, uint32_t *to) {
    const uint8_t *from = s.packed + row * s.bytes;
    if (s.code == 0) {
#if defined(__AVX512F__)
        const __m512i step = _mm512_set1_epi32(16 * static_cast<int>(scale));
        __m512i here = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(scale)));
        for (int64_t byte = 0; byte < s.bytes; byte += 2, here = _mm512_add_epi32(here, step)) {
            const uint32_t bits = from[byte] | (byte + 1 < s.bytes ? from[byte + 1] << 8 : 0);
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), here));
            to += __builtin_popcount(bits);
        }
#else
        for (int64_t byte = 0; byte < s.bytes; ++byte)
            for (uint32_t bits = from[byte]; bits; bits &= bits - 1)
                *to++ = static_cast<uint32_t>(8 * byte + __builtin_ctz(bits)) * scale;
#endif
        return;
    }
    for (int64_t j = 0; j < s.nonzeros; ++j)
        to[j] = static_cast<uint32_t>(s.code == 1 ? from[j] : from[2 * j] | from[2 * j + 1] << 8) * scale;
}

INLINE void decode_values(const Values &v, int64_t row, int64_t nonzeros, float *to) {
    const int8_t *from = static_cast<const int8_t *>(v.values) + row * nonzeros;
    const float scale = v.scales[row];
    for (int64_t j = 0; j < nonzeros; ++j) to[j] = scale * from[j];
}

// A chunk of rows of S as offsets and values, (rows, nonzeros) both.
struct Chunk {
    Scratch offsets_memory, values_memory;
    uint32_t *offsets;
    const float *values;
    float *decoded;
    int64_t first;

    static int64_t rows(const Support &s, int64_t wanted, bool integers) {
        const int64_t bytes = s.nonzeros * 4 * (integers ? 2 : 1); // of a row
        const int64_t fit = std::max<int64_t>(static_cast<int64_t>(DECODED) / bytes / LANES * LANES, LANES);
        const int64_t pieces = (wanted + fit - 1) / fit;
        return ((wanted + pieces - 1) / pieces + LANES - 1) / LANES * LANES;
    }

    // Memory for so many rows at a time; whether there is any.
    bool reserve(const Support &s, const Values &v, int64_t count) {
        offsets = offsets_memory.take<uint32_t>(count * s.nonzeros + SLACK);
        decoded = v.integers ? values_memory.take<float>(count * s.nonzeros) : nullptr;
        return offsets && (decoded || !v.integers);
    }

    void decode(const Support &s, const Values &v, int64_t begin, int64_t end, uint32_t scale) {
        first = begin;
        for (int64_t row = begin; row < end; ++row)
            decode_positions(s, row, scale, offsets + (row - begin) * s.nonzeros);
        values = v.integers ? decoded : static_cast<const float *>(v.values) + begin * s.nonzeros;
        if (!v.integers) return;
        for (int64_t row = begin; row < end; ++row) decode_values(v, row, s.nonzeros, decoded + (row - begin) * s.nonzeros);
    }

    const uint32_t *offsets_of(int64_t row, int64_t nonzeros) const { return offsets + (row - first) * nonzeros; }
    const float *values_of(int64_t row, int64_t nonzeros) const { return values + (row - first) * nonzeros; }
};

} // namespace
