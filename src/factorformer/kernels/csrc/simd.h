// Vectors of as many lanes as the instruction set has, in the compiler's own vector types.
//
// Every product here keeps tokens in lanes: a block of `T` rows of input is transposed, so that one weight, broadcast,
// meets `T` tokens at once, and weights are read in the layout in which they are stored.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline)) // of what has no name

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

INLINE Floats load(const float *from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// LANES values as floats.
INLINE Floats widen(const float *from) { return load(from); }

INLINE Floats widen(const int8_t *from) {
#if defined(__AVX512F__)
    const Ints whole = (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
    const Ints whole = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
#else
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const Ints whole = __builtin_convertvector(bytes, Ints);
#endif
    return __builtin_convertvector(whole, Floats);
}

INLINE void store(float *to, Floats v) { std::memcpy(to, &v, sizeof v); }

// The first `count` lanes, where that is fewer, and zeros.
INLINE Floats load_some(const float *from, int64_t count) {
    if (count >= LANES) return load(from);
#if defined(__AVX512F__)
    return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
    Floats v{};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
#endif
}

INLINE Floats widen_some(const float *from, int64_t count) { return load_some(from, count); }

INLINE Floats widen_some(const int8_t *from, int64_t count) {
    if (count >= LANES) return widen(from);
    int8_t bytes[LANES] = {};
    for (int64_t i = 0; i < count; ++i) bytes[i] = from[i];
    return widen(bytes);
}

INLINE void store_some(float *to, Floats v, int64_t count) {
    if (count >= LANES) return store(to, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
#else
    std::memcpy(to, &v, count * sizeof(float));
#endif
}

constexpr int64_t AHEAD = 1024; // bytes by which memory is asked for before it is read

// Ask for `count` values behind those that are read `distance` values later, or AHEAD bytes.
template <int count, typename T> INLINE void ask_for(const T *from, int64_t distance = AHEAD / sizeof(T)) {
    for (std::size_t byte = 0; byte < count * sizeof(T); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char *>(from + distance) + byte);
}

// `x - 0` is `x` for every x, so that nothing but the broadcast is left.
INLINE Floats splat(float x) { return x - Floats{}; }

INLINE Floats minimum(Floats a, Floats b) { return a < b ? a : b; }
INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

template <int S, std::size_t... I>
INLINE void exchange(Floats &a, Floats &b, std::index_sequence<I...>) {
#if defined(__clang__)
    const Floats first = __builtin_shufflevector(a, b, static_cast<int>(I & S ? I - S + LANES : I)...);
    b = __builtin_shufflevector(a, b, static_cast<int>(I & S ? I + LANES : I + S)...);
#else // GCC has the above from version 12 on, and this in all
    const Floats first = __builtin_shuffle(a, b, Ints{static_cast<int32_t>(I & S ? I - S + LANES : I)...});
    b = __builtin_shuffle(a, b, Ints{static_cast<int32_t>(I & S ? I + LANES : I + S)...});
#endif
    a = first;
}

template <int S> INLINE void exchange_all(Floats *rows) {
    if constexpr (S < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
            if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>{});
        exchange_all<2 * S>(rows);
    }
}

// The transpose of LANES vectors in place.
INLINE void transpose(Floats *rows) { exchange_all<1>(rows); }

// y[:count] = the sums of the lanes of so many vectors, times a scale and perhaps one of each, plus a bias if there is any.
INLINE void add_up(Floats *lanes, int count, float scale, const float *scales, const float *bias, float *y) {
    transpose(lanes);
    Floats total = lanes[0];
#pragma GCC unroll 16
    for (int i = 1; i < LANES; ++i) total += lanes[i];
    total *= splat(scale);
    if (scales) total *= load_some(scales, count);
    if (bias) total += load_some(bias, count);
    store_some(y, total, count);
}

// `to[k * width + t] = from[t * stride + k]` for t below `tokens`, 0 up to `width`, a multiple of LANES.
INLINE void transpose_in(const float *from, int64_t stride, int tokens, int64_t k_end, float *to, int width) {
    for (int first = 0; first < width; first += LANES) {
        const int here = tokens - first < LANES ? tokens - first : LANES;
        int64_t k = 0;
        for (; k + LANES <= k_end; k += LANES) {
            Floats rows[LANES];
#pragma GCC unroll 16
            for (int t = 0; t < LANES; ++t) rows[t] = t < here ? load(from + (first + t) * stride + k) : Floats{};
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) store(to + (k + i) * width + first, rows[i]);
        }
        for (; k < k_end; ++k)
            for (int t = 0; t < LANES; ++t)
                to[k * width + first + t] = t < here ? from[(first + t) * stride + k] : 0.0f;
    }
}

// `to[t * stride + r] = from[r * width + t]` for r below `rows` and t below `tokens`.
INLINE void transpose_out(const float *from, int width, int rows, int tokens, float *to, int64_t stride) {
    for (int first = 0; first < tokens; first += LANES) {
        const int here = tokens - first < LANES ? tokens - first : LANES;
        int r = 0;
        for (; r + LANES <= rows; r += LANES) {
            Floats tile[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) tile[i] = load(from + (r + i) * width + first);
            transpose(tile);
            for (int t = 0; t < here; ++t) store(to + (first + t) * stride + r, tile[t]);
        }
        for (; r < rows; ++r)
            for (int t = 0; t < here; ++t) to[(first + t) * stride + r] = from[r * width + first + t];
    }
}

INLINE float sum(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += v[lane];
    return total;
#endif
}

} // namespace
