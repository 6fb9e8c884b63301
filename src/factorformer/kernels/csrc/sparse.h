// Products with a sparse matrix S (rows, atoms) that holds the same number of entries in each row.
//
// The support of a chunk of rows is decoded to offsets, which then meet one transposed block of tokens after the other.

#pragma once

#include <algorithm>

#include "factorformer.h"
#include "few.h"
#include "memory.h"
#include "simd.h"
#include "support.h"
#include "threads.h"

namespace {

constexpr int TOKENS = 2 * LANES;           // a block of tokens: its transpose stays in the first cache
constexpr int64_t SORTED_ROWS = 256;        // rows that are sorted by atom at once: their tokens stay in the first cache

// to[r][:] = the products of `R` rows with the tokens of a block.
template <int R, int V>
INLINE void multiply_rows(const float *tokens, const Chunk &chunk, int64_t row, int64_t nonzeros, float *to) {
    Floats sums[R][V] = {};
    const uint32_t *offsets[R];
    const float *values[R];
    for (int r = 0; r < R; ++r) {
        offsets[r] = chunk.offsets_of(row + r, nonzeros);
        values[r] = chunk.values_of(row + r, nonzeros);
    }
    for (int64_t j = 0; j < nonzeros; ++j) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Floats value = splat(values[r][j]);
            for (int v = 0; v < V; ++v) sums[r][v] += value * load(tokens + offsets[r][j] + v * LANES);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(to + (r * V + v) * LANES, sums[r][v]);
}

// y[t][first:last] for the tokens of a block, four rows at a time.
template <int V>
void multiply_block(const float *tokens, const Chunk &chunk, const Support &s, int64_t first, int64_t last, int count,
                    const float *bias, float *y) {
    constexpr int WIDTH = V * LANES;
    alignas(64) float tile[LANES * WIDTH];
    for (int64_t row = first; row < last; row += LANES) {
        const int here = static_cast<int>(std::min<int64_t>(last - row, LANES));
        int r = 0;
        for (; r + 4 <= here; r += 4) multiply_rows<4, V>(tokens, chunk, row + r, s.nonzeros, tile + r * WIDTH);
        for (; r < here; ++r) multiply_rows<1, V>(tokens, chunk, row + r, s.nonzeros, tile + r * WIDTH);
        if (bias)
            for (int i = 0; i < here * V; ++i)
                store(tile + i * LANES, load(tile + i * LANES) + splat(bias[row + i / V]));
        transpose_out(tile, WIDTH, here, count, y + row, s.rows);
    }
}

int32_t sparse(const float *x, int64_t n, const Support *support, const Values *v, const float *bias, float *y) {
    if (n <= FEW) return sparse_few(x, n, *support, *v, bias, y);
    const Support &s = *support;
    const int width = n <= LANES ? LANES : TOKENS;
    Outcome outcome;
#pragma omp parallel
    {
        static thread_local Chunk chunk;
        static thread_local Scratch block;
        // Many tokens are split among threads; with few, rows are, so that each is decoded once.
        const bool by_tokens = n >= 16 * TOKENS * omp_get_num_threads();
        const Share rows = by_tokens ? Share(1, 1) : Share(s.rows, LANES), spans(n, TOKENS);
        const int64_t first = by_tokens ? 0 : rows.begin, last = by_tokens ? s.rows : rows.end;
        const int64_t t_first = by_tokens ? spans.begin : 0, t_last = by_tokens ? spans.end : n;
        const int64_t step = Chunk::rows(s, std::max<int64_t>(last - first, 1), v->integers);
        float *tokens = block.take<float>(s.atoms * width);
        const bool enough = outcome.allows(chunk.reserve(s, *v, step) && tokens);
        for (int64_t row = first; row < last && enough; row += step) {
            const int64_t end = std::min(row + step, last);
            chunk.decode(s, *v, row, end, width);
            for (int64_t t = t_first; t < t_last; t += width) {
                const int count = static_cast<int>(std::min<int64_t>(width, t_last - t));
                transpose_in(x + t * s.atoms, s.atoms, count, s.atoms, tokens, width);
                const auto multiply = width == LANES ? multiply_block<1> : multiply_block<2>;
                multiply(tokens, chunk, s, row, end, count, bias, y + t * s.rows);
            }
        }
    }
    return outcome.code;
}

// sums (atoms, V * LANES) += the transpose of x[:, first:last] S[first:last] for one block of tokens.
template <int V>
void scatter_block(const float *x, int count, const Support &s, const Chunk &chunk, int64_t first, int64_t last,
                   float *sums) {
    constexpr int WIDTH = V * LANES;
    alignas(64) float block[LANES * WIDTH];
    for (int64_t start = first; start < last; start += LANES) {
        const int here = static_cast<int>(std::min<int64_t>(last - start, LANES));
        transpose_in(x + start, s.rows, count, here, block, WIDTH);
        for (int r = 0; r < here; ++r) {
            const uint32_t *offsets = chunk.offsets_of(start + r, s.nonzeros);
            const float *values = chunk.values_of(start + r, s.nonzeros);
            Floats tokens[V];
            for (int v = 0; v < V; ++v) tokens[v] = load(block + (r * V + v) * LANES);
            for (int64_t j = 0; j < s.nonzeros; ++j) {
                float *to = sums + offsets[j];
                const Floats value = splat(values[j]);
                for (int v = 0; v < V; ++v) store(to + v * LANES, load(to + v * LANES) + value * tokens[v]);
            }
        }
    }
}

// Rows of a chunk sorted by atom: sums over the entries of an atom stay in registers, and nothing is scattered.
struct Sorted {
    struct Entry {
        float value;
        uint32_t offset;
    };
    Scratch entries_memory, starts_memory;
    Entry *entries;
    uint32_t *counts, *starts; // (atoms + 2), and its last (atoms + 1)

    // Memory for so many rows at a time; whether there is any.
    bool reserve(const Support &s, int64_t count) {
        entries = entries_memory.take<Entry>(count * s.nonzeros);
        counts = starts_memory.take<uint32_t>(s.atoms + 2);
        return entries && counts;
    }

    void sort(const Support &s, const Chunk &chunk, int64_t first, int64_t last, uint32_t width) {
        starts = counts + 1;
        std::fill(starts - 1, starts + s.atoms + 1, 0);
        for (int64_t row = first; row < last; ++row) {
            const uint32_t *offsets = chunk.offsets_of(row, s.nonzeros);
            for (int64_t j = 0; j < s.nonzeros; ++j) ++starts[offsets[j] / TOKENS + 1];
        }
        for (int64_t atom = 0; atom < s.atoms; ++atom) starts[atom + 1] += starts[atom];
        for (int64_t row = first; row < last; ++row) {
            const uint32_t *offsets = chunk.offsets_of(row, s.nonzeros);
            const float *values = chunk.values_of(row, s.nonzeros);
            const uint32_t offset = static_cast<uint32_t>(row - first) * width;
            for (int64_t j = 0; j < s.nonzeros; ++j) entries[starts[offsets[j] / TOKENS]++] = {values[j], offset};
        }
        --starts; // each start has moved to the next one's
        starts[0] = 0;
    }

    // sums (atoms, TOKENS) += for a transposed block (last - first, TOKENS).
    void multiply(const float *block, int64_t atoms, float *sums) const {
        for (int64_t atom = 0; atom < atoms; ++atom) {
            const Entry *entry = entries + starts[atom], *end = entries + starts[atom + 1];
            float *to = sums + atom * TOKENS;
            Floats total[4][2] = {{load(to), load(to + LANES)}};
            for (; entry + 4 <= end; entry += 4)
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    for (int v = 0; v < 2; ++v)
                        total[i][v] += splat(entry[i].value) * load(block + entry[i].offset + v * LANES);
            for (; entry < end; ++entry)
                for (int v = 0; v < 2; ++v) total[0][v] += splat(entry->value) * load(block + entry->offset + v * LANES);
            for (int v = 0; v < 2; ++v)
                store(to + v * LANES, (total[0][v] + total[1][v]) + (total[2][v] + total[3][v]));
        }
    }
};

int32_t sparse_transposed(const float *x, int64_t n, const Support *support, const Values *v, float *y) {
    if (n <= FEW) return sparse_transposed_few(x, n, *support, *v, y);
    static thread_local Scratch partial_sums;
    const Support &s = *support;
    const int width = n <= LANES ? LANES : TOKENS, threads = omp_get_max_threads();
    const int64_t blocks = (n + width - 1) / width;
    // Few tokens: threads take rows, so that each is decoded once, and their sums are added up.
    const bool by_rows = threads > 1 && blocks <= std::min(8 * threads, 64);
    const int64_t size = s.atoms * width * (by_rows ? blocks : 1);
    float *partial = by_rows ? partial_sums.take<float>(size * threads) : nullptr;
    if (by_rows && !partial) return NO_MEMORY;
    Outcome outcome;
#pragma omp parallel num_threads(threads)
    {
        static thread_local Chunk chunk;
        static thread_local Sorted sorted;
        static thread_local Scratch own, block_memory;
        const Share rows = by_rows ? Share(s.rows, LANES) : Share(1, 1), spans(n, width);
        const int64_t first = by_rows ? rows.begin : 0, last = by_rows ? rows.end : s.rows;
        const int64_t t_first = by_rows ? 0 : spans.begin, t_last = by_rows ? n : spans.end;
        const bool sorts = t_last - t_first > TOKENS;
        const int64_t step = Chunk::rows(s, std::max<int64_t>(last - first, 1), v->integers);
        const int64_t piece = sorts ? SORTED_ROWS : step;
        float *block = block_memory.take<float>(sorts ? piece * TOKENS : 0);
        // All tokens of a span meet one chunk of rows before the next is decoded, in spans whose sums fit the cache.
        const int64_t span = by_rows ? n : width * std::max<int64_t>(1, DECODED / 4 / (s.atoms * width));
        float *sums = by_rows ? partial + omp_get_thread_num() * size : own.take<float>(s.atoms * span);
        const bool enough =
            outcome.allows(block && sums && chunk.reserve(s, *v, piece) && (!sorts || sorted.reserve(s, piece)));
        for (int64_t t_begin = t_first; t_begin < t_last && enough; t_begin += span) {
            const int64_t t_end = std::min(t_begin + span, t_last);
            std::memset(sums, 0, (t_end - t_begin + width - 1) / width * width * s.atoms * sizeof(float));
            for (int64_t row = first; row < last; row += piece) {
                const int64_t end = std::min(row + piece, last);
                chunk.decode(s, *v, row, end, width);
                if (sorts) sorted.sort(s, chunk, row, end, TOKENS);
                for (int64_t t = t_begin; t < t_end; t += width) {
                    const int count = static_cast<int>(std::min<int64_t>(width, t_end - t));
                    float *to = sums + (t - t_begin) * s.atoms;
                    const float *from = x + t * s.rows;
                    if (sorts) {
                        transpose_in(from + row, s.rows, count, end - row, block, TOKENS);
                        sorted.multiply(block, s.atoms, to);
                    } else {
                        const auto scatter = width == LANES ? scatter_block<1> : scatter_block<2>;
                        scatter(from, count, s, chunk, row, end, to);
                    }
                }
            }
            if (!by_rows)
                for (int64_t t = t_begin; t < t_end; t += width)
                    transpose_out(sums + (t - t_begin) * s.atoms, width, static_cast<int>(s.atoms),
                                  static_cast<int>(std::min<int64_t>(width, t_end - t)), y + t * s.atoms, s.atoms);
        }
        if (by_rows) {
#pragma omp barrier
            const Share part(blocks, 1);
            for (int64_t b = part.begin; b < part.end; ++b) {
                float *total = partial + b * width * s.atoms;
                for (int thread = 1; thread < omp_get_num_threads(); ++thread)
                    for (int64_t i = 0; i < width * s.atoms; i += LANES)
                        store(total + i, load(total + i) + load(total + thread * size + i));
                transpose_out(total, width, static_cast<int>(s.atoms),
                              static_cast<int>(std::min<int64_t>(width, n - b * width)), y + b * width * s.atoms, s.atoms);
            }
        }
    }
    return outcome.code;
}

int32_t sparse_outer(const float *left, const float *right, int64_t n, const Support *support, float *y) {
    constexpr int64_t SPAN = 16 * LANES; // tokens of which both transposes are held
    const Support &s = *support;
    Outcome outcome;
#pragma omp parallel
    {
        static thread_local Scratch atoms_block, rows_block, offsets;
        const Share share(s.rows, LANES);
        float *atoms = atoms_block.take<float>(s.atoms * SPAN), *rows = rows_block.take<float>(LANES * SPAN);
        uint32_t *positions = offsets.take<uint32_t>(s.nonzeros + SLACK);
        const bool enough = outcome.allows(atoms && rows && positions);
        if (share.begin < share.end)
            std::memset(y + share.begin * s.nonzeros, 0, (share.end - share.begin) * s.nonzeros * sizeof(float));
        for (int64_t t = 0; t < n && share.begin < share.end && enough; t += SPAN) {
            const int count = static_cast<int>(std::min(SPAN, n - t));
            const int width = (count + LANES - 1) / LANES * LANES;
            transpose_in(right + t * s.atoms, s.atoms, count, s.atoms, atoms, width);
            for (int64_t block = share.begin; block < share.end; block += LANES) {
                const int here = static_cast<int>(std::min<int64_t>(LANES, share.end - block));
                transpose_in(left + t * s.rows + block, s.rows, count, here, rows, width);
                for (int r = 0; r < here; ++r) {
                    decode_positions(s, block + r, width, positions);
                    for (int64_t j = 0; j < s.nonzeros; ++j) {
                        const float *a = atoms + positions[j], *b = rows + r * width;
                        Floats total[2] = {};
                        int i = 0;
                        for (; i + 2 * LANES <= width; i += 2 * LANES)
                            for (int v = 0; v < 2; ++v) total[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
                        if (i < width) total[0] += load(a + i) * load(b + i);
                        y[(block + r) * s.nonzeros + j] += sum(total[0] + total[1]);
                    }
                }
            }
        }
    }
    return outcome.code;
}

} // namespace
