// Products of blocks of 16 rows, 16 tokens and 64 bytes of each by AMX, and the same in plain C++, to test them where no
// processor has it.
//
// Rows of weights and words of tokens lie in memory as tiles have them, so nothing is rearranged: a tile of weights is 16
// rows of 64 bytes, and one of tokens 16 words, one below the other, of 16 tokens.

#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__AMX_INT8__) || defined(FACTORFORMER_EMULATED_TILES)
#define FACTORFORMER_TILES 1
#endif

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_WORDS = 16; // and as many tokens

#if defined(__AMX_INT8__)

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles of a thread, while this lives.
struct Tiles {
    Tiles() {
        const TileShapes shapes;
        asm volatile("" : : "r"(&shapes) : "memory"); // compilers do not know how much of it is read
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// Compilers want the numbers of tiles as they are written: sums in 0 to 3, weights in 4 and 5, tokens in 6 and 7.
template <int N> INLINE void tile_zero() {
    if constexpr (N == 0) _tile_zero(0);
    else if constexpr (N == 1) _tile_zero(1);
    else if constexpr (N == 2) _tile_zero(2);
    else _tile_zero(3);
}

template <int N> INLINE void tile_load(const void *from, int64_t apart) {
    if constexpr (N == 4) _tile_loadd(4, from, apart);
    else if constexpr (N == 5) _tile_loadd(5, from, apart);
    else if constexpr (N == 6) _tile_loadd(6, from, apart);
    else _tile_loadd(7, from, apart);
}

template <int N> INLINE void tile_store(void *to, int64_t apart) {
    if constexpr (N == 0) _tile_stored(0, to, apart);
    else if constexpr (N == 1) _tile_stored(1, to, apart);
    else if constexpr (N == 2) _tile_stored(2, to, apart);
    else _tile_stored(3, to, apart);
}

// C += A B, of signed and unsigned bytes, or of pairs of bfloat16.
template <int C, int A, int B> INLINE void tile_bytes() {
    if constexpr (C == 0) _tile_dpbsud(0, 4, 6);
    else if constexpr (C == 1) _tile_dpbsud(1, 4, 7);
    else if constexpr (C == 2) _tile_dpbsud(2, 5, 6);
    else _tile_dpbsud(3, 5, 7);
}

template <int C, int A, int B> INLINE void tile_pairs() {
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    else if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    else if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    else _tile_dpbf16ps(3, 5, 7);
}

#elif defined(FACTORFORMER_EMULATED_TILES)

struct Tiles {};

struct EmulatedTile {
    uint8_t bytes[16][64];
};

INLINE EmulatedTile *emulated() {
    static thread_local EmulatedTile tiles[8];
    return tiles;
}

template <int N> INLINE void tile_zero() { std::memset(emulated() + N, 0, sizeof(EmulatedTile)); }
template <int N> INLINE void tile_load(const void *from, int64_t apart) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(emulated()[N].bytes[row], static_cast<const uint8_t *>(from) + row * apart, 64);
}
template <int N> INLINE void tile_store(void *to, int64_t apart) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<uint8_t *>(to) + row * apart, emulated()[N].bytes[row], 64);
}

template <typename Number> INLINE Number number_at(const EmulatedTile &tile, int row, int column) {
    Number x;
    std::memcpy(&x, tile.bytes[row] + column * sizeof x, sizeof x);
    return x;
}

template <typename Number, typename Product> INLINE void tile_products(int c, int a, int b, const Product &product) {
    EmulatedTile *tiles = emulated();
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) {
            Number total = number_at<Number>(tiles[c], row, column);
            for (int k = 0; k < 16; ++k)
                total = product(total, number_at<uint32_t>(tiles[a], row, k), number_at<uint32_t>(tiles[b], k, column));
            std::memcpy(tiles[c].bytes[row] + column * sizeof total, &total, sizeof total);
        }
}

template <int C, int A, int B> INLINE void tile_bytes() {
    tile_products<int32_t>(C, A, B, [](int32_t total, uint32_t weights, uint32_t tokens) {
        for (int i = 0; i < 4; ++i)
            total += static_cast<int8_t>(weights >> (8 * i)) * static_cast<uint8_t>(tokens >> (8 * i));
        return total;
    });
}

INLINE float upper_half(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <int C, int A, int B> INLINE void tile_pairs() {
    tile_products<float>(C, A, B, [](float total, uint32_t weights, uint32_t tokens) {
        total += upper_half(weights << 16) * upper_half(tokens << 16);
        return total + upper_half(weights & 0xffff0000u) * upper_half(tokens & 0xffff0000u);
    });
}

#else

struct Tiles {};

#endif

#if defined(FACTORFORMER_TILES)

template <bool PAIRS_OF, int C, int A, int B> INLINE void tile_product() {
    if constexpr (PAIRS_OF) tile_pairs<C, A, B>();
    else tile_bytes<C, A, B>();
}

// sums (16 R, 16 T), rows 32 apart: R times 16 rows of weights, `depth` words each, with T times 16 tokens, rows `apart`.
template <bool PAIRS_OF, int R, int T>
INLINE void tile_sums(const uint32_t *weights, int64_t depth, const uint32_t *tokens, int64_t apart, uint32_t *sums) {
    asm volatile("" : : : "memory"); // nor that loads of tiles read what was just written
    tile_zero<0>();
    if constexpr (T > 1) tile_zero<1>();
    if constexpr (R > 1) tile_zero<2>();
    if constexpr (R > 1 && T > 1) tile_zero<3>();
    for (int64_t k = 0; k < depth; k += TILE_WORDS) {
        tile_load<4>(weights + k, 4 * depth);
        tile_load<6>(tokens + k * apart, 4 * apart);
        tile_product<PAIRS_OF, 0, 4, 6>();
        if constexpr (T > 1) {
            tile_load<7>(tokens + k * apart + 16, 4 * apart);
            tile_product<PAIRS_OF, 1, 4, 7>();
        }
        if constexpr (R > 1) {
            tile_load<5>(weights + TILE_ROWS * depth + k, 4 * depth);
            tile_product<PAIRS_OF, 2, 5, 6>();
        }
        if constexpr (R > 1 && T > 1) tile_product<PAIRS_OF, 3, 5, 7>();
    }
    tile_store<0>(sums, 4 * 32);
    if constexpr (T > 1) tile_store<1>(sums + 16, 4 * 32);
    if constexpr (R > 1) tile_store<2>(sums + TILE_ROWS * 32, 4 * 32);
    if constexpr (R > 1 && T > 1) tile_store<3>(sums + TILE_ROWS * 32 + 16, 4 * 32);
}

// Whether tiles of this processor make the sums that they should: of small whole numbers, exact in either type.
inline bool tiles_work() {
    constexpr int64_t DEPTH = 2 * TILE_WORDS;
    const Tiles tiles;
    static_cast<void>(tiles);
    alignas(64) uint32_t weights[32 * DEPTH], tokens[DEPTH * 32], sums[32 * 32];
    for (int pairs = 0; pairs < 2; ++pairs) {
        uint32_t state = 1;
        const auto draw = [&](uint32_t below) { return (state = state * 1664525u + 1013904223u) / 65536u % below; };
        const auto half = [](float x) {
            uint32_t bits;
            std::memcpy(&bits, &x, sizeof bits);
            return bits >> 16;
        };
        float exact[32 * 32] = {}, of_weights[32 * DEPTH * 4], of_tokens[DEPTH * 32 * 4];
        const int in_word = pairs ? 2 : 4;
        for (int64_t i = 0; i < 32 * DEPTH; ++i) {
            weights[i] = tokens[i] = 0;
            for (int at = 0; at < in_word; ++at) {
                const float w = static_cast<float>(draw(255)) - 127, t = static_cast<float>(draw(256));
                of_weights[i * 4 + at] = w;
                of_tokens[i * 4 + at] = t;
                const int bits = 32 / in_word * at;
                weights[i] |= (pairs ? half(w) : static_cast<uint32_t>(static_cast<int>(w) & 255)) << bits;
                tokens[i] |= (pairs ? half(t) : static_cast<uint32_t>(t)) << bits;
            }
        }
        for (int64_t row = 0; row < 32; ++row)
            for (int64_t k = 0; k < DEPTH; ++k)
                for (int64_t token = 0; token < 32; ++token)
                    for (int at = 0; at < in_word; ++at)
                        exact[row * 32 + token] += of_weights[(row * DEPTH + k) * 4 + at] * of_tokens[(k * 32 + token) * 4 + at];
        if (pairs) tile_sums<true, 2, 2>(weights, DEPTH, tokens, 32, sums);
        else tile_sums<false, 2, 2>(weights, DEPTH, tokens, 32, sums);
        for (int64_t i = 0; i < 32 * 32; ++i) {
            float found;
            std::memcpy(&found, sums + i, sizeof found);
            if (!pairs) found = static_cast<float>(static_cast<int32_t>(sums[i]));
            if (found != exact[i]) return false;
        }
    }
    return true;
}

#else

inline bool tiles_work() { return true; } // there are none

#endif

} // namespace
