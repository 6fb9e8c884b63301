// Softmax attention of one query block after the other: scores never leave the second cache.
//
// Queries are in lanes, so that a softmax runs down a column of vectors, and keys and values are read as they lie.

#pragma once

#include "dense.h"

namespace {

template <int V>
void attention_block(const Attention &a, int64_t batch, int64_t head, int64_t first, float *queries, float *scores,
                     float *result) {
    constexpr int WIDTH = V * LANES;
    const int count = static_cast<int>(std::min<int64_t>(WIDTH, a.queries - first));
    const int64_t shared = head / (a.heads / a.key_heads);
    const float *q = a.q + batch * a.q_stride[0] + head * a.q_stride[1] + first * a.q_stride[2];
    const float *k = a.k + batch * a.k_stride[0] + shared * a.k_stride[1];
    const float *v = a.v + batch * a.v_stride[0] + shared * a.v_stride[1];
    transpose_in(q, a.q_stride[2], count, a.width, queries, WIDTH);
    in_pieces<ROWS_WITH<V>>(0, a.keys, [&](int64_t key, auto rows) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        float_rows<R, V>(queries, k + key * a.k_stride[2], a.k_stride[2], 1, a.width, scores + key * WIDTH);
    });
    Floats high[V], total[V] = {};
    for (int i = 0; i < V; ++i) high[i] = splat(-3e38f); // finite, for tokens that may see no key
    const uint8_t *allowed = a.mask ? a.mask + batch * a.mask_stride[0] + head * a.mask_stride[1] : nullptr;
    for (int64_t key = 0; key < a.keys; ++key)
        for (int i = 0; i < V; ++i) {
            float *at = scores + key * WIDTH + i * LANES;
            Floats s = load(at) * splat(a.scale);
            if (allowed && a.mask_stride[2] == 0) {
                if (!allowed[key * a.mask_stride[3]]) s = splat(-INFINITY);
            } else if (allowed)
                for (int lane = 0; lane < LANES && i * LANES + lane < count; ++lane)
                    if (!allowed[(first + i * LANES + lane) * a.mask_stride[2] + key * a.mask_stride[3]])
                        s[lane] = -INFINITY;
            high[i] = maximum(s, high[i]);
            store(at, s);
        }
    for (int64_t key = 0; key < a.keys; ++key)
        for (int i = 0; i < V; ++i) {
            float *at = scores + key * WIDTH + i * LANES;
            const Floats p = exponential(load(at) - high[i]);
            total[i] += p;
            store(at, p);
        }
    in_pieces<ROWS_WITH<V>>(0, a.width, [&](int64_t column, auto rows) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        float_rows<R, V>(scores, v + column, 1, a.v_stride[2], a.keys, result + column * WIDTH);
    });
    for (int64_t column = 0; column < a.width; ++column)
        for (int i = 0; i < V; ++i) {
            float *at = result + column * WIDTH + i * LANES;
            store(at, load(at) / total[i]);
        }
    const int64_t across = a.heads * a.width;
    transpose_out(result, WIDTH, static_cast<int>(a.width), count, a.y + (batch * a.queries + first) * across + head * a.width,
                  across);
}

template <int V> int32_t attention_blocks(const Attention &a) {
    constexpr int WIDTH = V * LANES;
    const int64_t blocks = (a.queries + WIDTH - 1) / WIDTH, tasks = a.batch * a.heads * blocks;
    Outcome outcome;
#pragma omp parallel
    {
        static thread_local Scratch memory[3];
        float *queries = memory[0].take<float>(a.width * WIDTH), *scores = memory[1].take<float>(a.keys * WIDTH);
        float *result = memory[2].take<float>(a.width * WIDTH);
        const bool enough = outcome.allows(queries && scores && result);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task)
            if (enough)
                attention_block<V>(a, task / blocks / a.heads, task / blocks % a.heads, task % blocks * WIDTH, queries,
                                   scores, result);
    }
    return outcome.code;
}

int32_t attention(const Attention *a) {
    if (a->queries <= LANES) return attention_blocks<1>(*a);
    if (a->queries <= 2 * LANES || WIDEST == 2) return attention_blocks<2>(*a);
    return attention_blocks<WIDEST>(*a);
}

} // namespace
