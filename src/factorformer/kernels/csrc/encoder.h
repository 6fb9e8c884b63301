// A whole encoder in one call: attention and two products between norms, layer after layer, with nothing between.
//
// Activations lie features by tokens, the tokens of several sequences one after the other without padding, so that a
// weight, broadcast, meets the tokens in the lanes of a vector, and norms, GELU and rounding run down columns. A wave of
// sequences goes through all layers before the next one begins, and in each layer a block of tokens through all that lies
// between two attentions, so that its intermediate results stay in the second cache. Threads take waves of their own; a
// few long sequences they share, with a barrier where one needs what another made.

#pragma once

#include <atomic>
#include <ctime>

#include "attention.h"
#include "dense.h"
#include "tiles.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace {

enum Format : int64_t { FLOATS, PAIRS, BYTES }; // one, two or four values in a word

constexpr int64_t BLOCK = WIDEST * LANES; // tokens that go through products together

constexpr int64_t VALUES_IN_WORD[] = {1, 2, 4};

INLINE int64_t words_of(int64_t values, int64_t format) {
    return (values + VALUES_IN_WORD[format] - 1) / VALUES_IN_WORD[format];
}

// Of a matrix (out, in): its rows in whole words, one after the other, with zeros up to `depth` of them. Where products are
// made by tiles, that is a multiple of their words, and rows of zeros make the rows a multiple of theirs.
struct Packed {
    const uint32_t *words;
    const float *scales, *sums; // (out), of bytes: the value of 1, and the sum of a row's integers
    int64_t out, in, depth, format;
};

// A product with several matrices one after the other, and a bias.
struct Linear {
    Packed parts[LONGEST];
    int64_t count;
    const float *bias;
};

struct Norm {
    const float *weight, *bias;
    float epsilon;
};

struct EncoderLayer {
    Linear query, key, value, output, up, down;
    Norm after_attention, after_products;
};

// Fields of what is described by integers, pointers among them, in the order of the structures above.
struct Fields {
    const int64_t *at;

    int64_t number() { return *at++; }
    const float *floats() { return reinterpret_cast<const float *>(number()); }

    Packed packed() {
        const uint32_t *words = reinterpret_cast<const uint32_t *>(number());
        const float *scales = floats(), *sums = floats();
        const int64_t out = number(), in = number(), depth = number();
        return {words, scales, sums, out, in, depth, number()};
    }

    Linear linear() {
        Linear l;
        for (Packed &part : l.parts) part = packed();
        l.count = number();
        l.bias = floats();
        return l;
    }

    Norm norm() {
        Norm n{floats(), floats(), 0};
        const int32_t bits = static_cast<int32_t>(number());
        std::memcpy(&n.epsilon, &bits, sizeof bits);
        return n;
    }

    EncoderLayer layer() { return {linear(), linear(), linear(), linear(), linear(), linear(), norm(), norm()}; }
};

constexpr int64_t LINEAR_FIELDS = 7 * LONGEST + 2, LAYER_FIELDS = 6 * LINEAR_FIELDS + 2 * 3;

INLINE EncoderLayer layer_of(const Encoder &e, int64_t index) { return Fields{e.fields + index * LAYER_FIELDS}.layer(); }

// Some threads that work on the same sequences, and wait for each other.
struct Meeting {
    std::atomic<int> arrived{0}, round{0};
};

// What the time of a thread goes to; measured only where somebody asks.
enum Phase { PRODUCTS, ROUNDING, NORMS, ATTENTION, MOVING, WAITING, PHASES };

INLINE int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

struct Watch {
    bool on;
    int64_t last, spent[PHASES];

    explicit Watch(bool wanted) : on(wanted), last(wanted ? nanoseconds() : 0), spent{} {}

    // All since the last call was spent on this.
    void was(Phase phase) {
        if (!on) return;
        const int64_t now = nanoseconds();
        spent[phase] += now - last;
        last = now;
    }
};

struct Crew {
    Meeting *meeting;
    int size, me;
    Watch *watch;

    void meet() const {
        if (size == 1) return;
        wait();
        watch->was(WAITING);
    }

    void wait() const {
        const int round = meeting->round.load(std::memory_order_relaxed);
        if (meeting->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            meeting->arrived.store(0, std::memory_order_relaxed);
            meeting->round.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meeting->round.load(std::memory_order_acquire) == round; ++spins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
#if defined(__linux__)
            if (spins > 500) sched_yield(); // perhaps there are more threads than processors
#endif
        }
    }

    // The part of `count` things that is this thread's, in whole numbers of `unit`.
    void share(int64_t count, int64_t unit, int64_t &first, int64_t &last) const {
        const int64_t units = (count + unit - 1) / unit;
        first = std::min(units * me / size * unit, count);
        last = std::min(units * (me + 1) / size * unit, count);
    }
};

// x * Phi(x) for what is rounded afterwards: Phi(x) - 1/2 as a polynomial in x^2 times x, within 5e-5 up to |x| = 9.
INLINE Floats gelu_roughly(Floats x) {
    const Floats near = minimum(maximum(x, splat(-4.5f)), splat(4.5f)), square = near * near;
    Floats series = splat(3.03630707e-11f);
    for (float term : {-3.31458743e-09f, 1.59098044e-07f, -4.45171860e-06f, 8.14253199e-05f, -1.03759443e-03f,
                       9.58522383e-03f, -6.59847148e-02f, 3.98712663e-01f})
        series = series * square + splat(term);
    return x * (series * near + splat(0.5f));
}

// The exponential for what is rounded afterwards, with a relative error of 3e-6.
INLINE Floats exponential_roughly(Floats x) {
    const Floats scaled = maximum(splat(-87.0f), x) * splat(1.44269504f);
    const Floats shifted = scaled + splat(12582912.0f), f = scaled - (shifted - splat(12582912.0f));
    Floats series = splat(0.00957004f);
    for (float term : {0.05591791f, 0.24024746f, 0.69312181f, 0.99999926f}) series = series * f + splat(term);
    return (Floats)((Words)series + ((Words)shifted << 23));
}

INLINE Words load_words(const uint32_t *from) {
    Words w;
    std::memcpy(&w, from, sizeof w);
    return w;
}

// The upper halves of two floats, rounded to the nearest: a word of two bfloat16.
INLINE Words pair_of(Floats low, Floats high) {
    const Words a = (Words)low, b = (Words)high;
    return ((a + 0x8000u) >> 16) | ((b + 0x8000u) & 0xffff0000u);
}

// total + the products of the two bfloat16 of each lane.
INLINE Floats dot2(Floats total, Words x, uint32_t weights) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(weights)));
#else
    const uint32_t low = weights << 16, high = weights & 0xffff0000u;
    float first, second;
    std::memcpy(&first, &low, sizeof first);
    std::memcpy(&second, &high, sizeof second);
    return total + (Floats)(x << 16) * splat(first) + (Floats)(x & 0xffff0000u) * splat(second);
#endif
}

// A block of V vectors of tokens as products read it.
struct Tokens {
    const uint32_t *words; // (depth, V * LANES), rows `apart`
    int64_t apart;
    const float *scale, *zero; // of bytes
};

// What becomes of a product: to (out, V * LANES), rows `apart`, after a bias, what is added, and GELU.
struct Finish {
    float *to;
    int64_t apart;
    const float *bias;
    bool add, gelu, roughly;
};

template <int V> INLINE void finish_row(const Finish &f, int64_t row, const Floats *y) {
    float *to = f.to + row * f.apart;
    const Floats bias = splat(f.bias ? f.bias[row] : 0.0f);
    for (int v = 0; v < V; ++v) {
        Floats value = y[v] + bias;
        if (f.add) value += load(to + v * LANES);
        if (f.gelu) value = f.roughly ? gelu_roughly(value) : gelu_of(value);
        store(to + v * LANES, value);
    }
}

// A row of sums of integers as floats; a zero point adds its multiple of the sum of the weights.
template <int V> INLINE void finish_bytes(const Packed &m, const Tokens &x, int64_t row, const Ints *sums, const Finish &f) {
    Floats y[V];
    for (int v = 0; v < V; ++v) {
        const Floats value = __builtin_convertvector(sums[v], Floats);
        const Floats zero = load(x.zero + v * LANES), scale = load(x.scale + v * LANES);
        y[v] = (value - zero * splat(m.sums[row])) * (scale * splat(m.scales[row]));
    }
    finish_row<V>(f, row, y);
}

template <int R, int V> INLINE void byte_rows(const Packed &m, const Tokens &x, int64_t row, const Finish &f) {
    Ints sums[R][V];
    const int8_t *weights = reinterpret_cast<const int8_t *>(m.words + row * m.depth);
    byte_sums<R, V>(x.words, x.apart, weights, 4 * m.depth, 4, m.depth, sums);
    for (int r = 0; r < R; ++r) finish_bytes<V>(m, x, row + r, sums[r], f);
}

// As `float_sums` and `byte_sums`, of pairs of bfloat16: R words, `between` from one to the next.
template <int R, int V, typename Word>
INLINE void pair_sums(const uint32_t *tokens, int64_t apart, const Word *words, int64_t between, int64_t step, int64_t depth,
                      Floats (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = Floats{};
    for (int64_t k = 0; k < depth; ++k, tokens += apart, words += step) {
        __builtin_prefetch(words + R * between + (R - 1) * step * k);
        Words x[V];
        for (int v = 0; v < V; ++v) x[v] = load_words(tokens + v * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            uint32_t w;
            std::memcpy(&w, words + r * between, sizeof w);
            for (int v = 0; v < V; ++v) sums[r][v] = dot2(sums[r][v], x[v], w);
        }
    }
}

template <int R, int V> INLINE void pair_rows(const Packed &m, const Tokens &x, int64_t row, const Finish &f) {
    Floats sums[R][V];
    pair_sums<R, V>(x.words, x.apart, m.words + row * m.depth, m.depth, 1, m.depth, sums);
    for (int r = 0; r < R; ++r) finish_row<V>(f, row + r, sums[r]);
}

#if defined(FACTORFORMER_TILES)
constexpr int64_t ROW_UNIT = TILE_ROWS;

// R times 16 rows from `row` on with T vectors of tokens; those from `last` on are not wanted.
template <bool PAIRS_OF, int R, int T>
INLINE void tile_rows(const Packed &m, const Tokens &x, int64_t row, int64_t last, const Finish &f) {
    alignas(64) uint32_t sums[R * TILE_ROWS * 32];
    tile_sums<PAIRS_OF, R, T>(m.words + row * m.depth, m.depth, x.words, x.apart, sums);
    for (int64_t r = 0; r < R * TILE_ROWS && row + r < last; ++r) {
        if constexpr (PAIRS_OF) {
            Floats y[T];
            std::memcpy(y, sums + r * 32, sizeof y);
            finish_row<T>(f, row + r, y);
        } else {
            Ints y[T];
            std::memcpy(y, sums + r * 32, sizeof y);
            finish_bytes<T>(m, x, row + r, y, f);
        }
    }
}

template <bool PAIRS_OF, int V>
INLINE void all_tile_rows(const Packed &m, const Tokens &x, int64_t first, int64_t last, const Finish &f) {
    constexpr int T = V > 1 ? 2 : 1;
    for (; first < last; first += 2 * TILE_ROWS)
        for (int v = 0; v < V; v += T) {
            const int64_t at = v * LANES;
            const Tokens tokens{x.words + at, x.apart, x.scale + at, x.zero + at};
            const Finish finish{f.to + at, f.apart, f.bias, f.add, f.gelu, f.roughly};
            if (last - first > TILE_ROWS) tile_rows<PAIRS_OF, 2, T>(m, tokens, first, last, finish);
            else tile_rows<PAIRS_OF, 1, T>(m, tokens, first, last, finish);
        }
}
#else
constexpr int64_t ROW_UNIT = 1;
#endif

// Rows [first, last) of a product with a block of tokens.
template <int V> void product_rows(const Packed &m, const Tokens &x, int64_t first, int64_t last, const Finish &f) {
#if defined(FACTORFORMER_TILES)
    if (m.format == BYTES) return all_tile_rows<false, V>(m, x, first, last, f);
    if (m.format == PAIRS) return all_tile_rows<true, V>(m, x, first, last, f);
#endif
    in_pieces<ROWS_WITH<V>>(first, last, [&](int64_t row, auto count) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        if (m.format == BYTES) return byte_rows<R, V>(m, x, row, f);
        if (m.format == PAIRS) return pair_rows<R, V>(m, x, row, f);
        Floats sums[R][V];
        const float *weights = reinterpret_cast<const float *>(m.words) + row * m.in;
        float_sums<R, V>(reinterpret_cast<const float *>(x.words), x.apart, weights, m.in, 1, m.in, sums);
        for (int r = 0; r < R; ++r) finish_row<V>(f, row + r, sums[r]);
    });
}

// One vector of tokens (values, LANES), rows `apart`, as words, `WIDTH` apart.
INLINE void encode_bytes(const float *from, int64_t apart, int64_t values, uint32_t *words, int64_t width, float *scale,
                         float *zero) {
    Floats low[2] = {}, high[2] = {}, wrong[2] = {}; // `wrong` is 0, or not a number if a value is not or is infinite
    int64_t k = 0;
    for (; k + 2 <= values; k += 2)
        for (int i = 0; i < 2; ++i) {
            const Floats x = load(from + (k + i) * apart);
            low[i] = minimum(low[i], x);
            high[i] = maximum(high[i], x);
            wrong[i] += x * Floats{};
        }
    if (k < values) {
        const Floats x = load(from + k * apart);
        low[0] = minimum(low[0], x);
        high[0] = maximum(high[0], x);
        wrong[0] += x * Floats{};
    }
    Floats factor, shift;
    choose_range(minimum(low[0], low[1]), maximum(high[0], high[1]), factor, shift);
    store(scale, factor + (wrong[0] + wrong[1]));
    store(zero, shift);
    const Floats inverse = splat(1.0f) / factor;
    for (k = 0; k + 4 <= values; k += 4) {
        Words packed = quantize(load(from + k * apart), inverse, shift);
#pragma GCC unroll 3
        for (int i = 1; i < 4; ++i) packed |= quantize(load(from + (k + i) * apart), inverse, shift) << (8 * i);
        std::memcpy(words + k / 4 * width, &packed, sizeof packed);
    }
    if (k < values) {
        Words packed = quantize(load(from + k * apart), inverse, shift);
        for (int i = 1; k + i < values; ++i) packed |= quantize(load(from + (k + i) * apart), inverse, shift) << (8 * i);
        std::memcpy(words + k / 4 * width, &packed, sizeof packed);
    }
}

INLINE void encode_pairs(const float *from, int64_t apart, int64_t values, uint32_t *words, int64_t width) {
    for (int64_t k = 0; k < values; k += 2) {
        const Words packed = pair_of(load(from + k * apart), k + 1 < values ? load(from + (k + 1) * apart) : Floats{});
        std::memcpy(words + k / 2 * width, &packed, sizeof packed);
    }
}

// What is done to a block of tokens, in memory that those who work on it share.
struct Room {
    uint32_t *words; // (deepest, width of a block)
    float *scale, *zero, *between, *inner;
};

template <int V> struct Block {
    static constexpr int WIDTH = V * LANES;
    const Crew &crew;
    const Room &room;

    // The block (values, WIDTH), rows `apart`, as a product reads it; whoever reads it waits for the others first.
    Tokens encode(const float *from, int64_t apart, const Packed &m) const {
        if (m.format == FLOATS) return {reinterpret_cast<const uint32_t *>(from), apart, nullptr, nullptr};
        for (int v = crew.me; v < V; v += crew.size) {
            const int64_t at = v * LANES;
            if (m.format == BYTES)
                encode_bytes(from + at, apart, m.in, room.words + at, WIDTH, room.scale + at, room.zero + at);
            else encode_pairs(from + at, apart, m.in, room.words + at, WIDTH);
            for (int64_t k = words_of(m.in, m.format); k < m.depth; ++k)
                std::memset(room.words + k * WIDTH + at, 0, sizeof(Words));
        }
        crew.watch->was(ROUNDING);
        crew.meet();
        return {room.words, WIDTH, room.scale, room.zero};
    }

    void product(const Packed &m, const Tokens &x, const Finish &f) const {
        int64_t first, last;
        crew.share(m.out, m.format == FLOATS ? ROWS_WITH<V> : std::max<int64_t>(ROW_UNIT, ROWS_WITH<V>), first, last);
        product_rows<V>(m, x, first, last, f);
        crew.watch->was(PRODUCTS);
    }

    // All parts of a product, the first of them of tokens that are encoded already.
    void linear(const Linear &l, Tokens x, Finish f) const {
        for (int64_t i = 0; i + 1 < l.count; ++i) {
            // Two parts of `between` take turns: what one product reads, the next may not overwrite.
            float *to = room.between + i % 2 * (room.inner - room.between) / 2;
            product(l.parts[i], x, {to, WIDTH, nullptr, false, false, false});
            crew.meet();
            x = encode(to, WIDTH, l.parts[i + 1]);
        }
        f.bias = l.bias;
        product(l.parts[l.count - 1], x, f);
        crew.meet();
    }

    // Columns of (width, WIDTH) to mean 0 and variance 1, times a weight, plus a bias.
    void normalize(float *x, int64_t apart, int64_t width, const Norm &n) const {
        for (int v = crew.me; v < V; v += crew.size) {
            float *at = x + v * LANES;
            Floats total = {}, squares = {};
            for (int64_t k = 0; k < width; ++k) total += load(at + k * apart);
            const Floats mean = total * splat(1.0f / width);
            for (int64_t k = 0; k < width; ++k) {
                const Floats d = load(at + k * apart) - mean;
                squares += d * d;
            }
            Floats inverse;
            for (int lane = 0; lane < LANES; ++lane) inverse[lane] = 1.0f / std::sqrt(squares[lane] / width + n.epsilon);
            for (int64_t k = 0; k < width; ++k) {
                float *place = at + k * apart;
                store(place, (load(place) - mean) * (inverse * splat(n.weight[k])) + splat(n.bias[k]));
            }
        }
        crew.watch->was(NORMS);
        crew.meet();
    }

    void before_attention(const EncoderLayer &l, const float *x, float *qkv, int64_t apart, int64_t width) const {
        const Linear *const all[] = {&l.query, &l.key, &l.value};
        Tokens tokens{};
        for (int i = 0; i < 3; ++i) {
            // Inner results overwrite the words that all three read.
            if (i == 0 || all[i - 1]->count > 1 || all[i]->parts[0].format != all[i - 1]->parts[0].format)
                tokens = encode(x, apart, all[i]->parts[0]);
            linear(*all[i], tokens, {qkv + i * width * apart, apart, nullptr, false, false, false});
        }
    }

    void after_attention(const EncoderLayer &l, const float *context, float *x, int64_t apart, int64_t width) const {
        linear(l.output, encode(context, apart, l.output.parts[0]), {x, apart, nullptr, true, false, false});
        normalize(x, apart, width, l.after_attention);
        const bool roughly = l.down.parts[0].format != FLOATS;
        linear(l.up, encode(x, apart, l.up.parts[0]), {room.inner, WIDTH, nullptr, false, true, roughly});
        linear(l.down, encode(room.inner, WIDTH, l.down.parts[0]), {x, apart, nullptr, true, false, false});
        normalize(x, apart, width, l.after_products);
    }
};

// Sequences that go through the encoder together: `stride` is between features.
struct Wave {
    const int64_t *starts; // in the tokens of the wave, and their number in the end
    int64_t sequences, stride;
    float *x, *qkv; // (width, stride), (3 width, stride)

    int64_t tokens() const { return starts[sequences]; }
};

// What attention of one head and sequence reads besides the wave, of one thread.
struct HeadRoom {
    float *scores;                       // (longest, BLOCK), afterwards their exponentials
    uint32_t *queries, *keys, *weights;  // pairs of features, of features, of keys: (size / 2, BLOCK), (size / 2, apart), ...
    uint16_t *values;                    // (size, apart)
    int64_t apart;
};

#if defined(__AVX512BF16__)
constexpr bool PAIRED = true; // products of bfloat16 are faster than those of floats
#else
constexpr bool PAIRED = false;
#endif

INLINE void pair_rows_of(const float *from, int64_t apart, int64_t rows, int64_t columns, uint32_t *to, int64_t to_apart) {
    for (int64_t d = 0; d < rows; d += 2)
        for (int64_t t = 0; t < columns; t += LANES) {
            const float *at = from + d * apart + t;
            const Words packed = pair_of(load(at), d + 1 < rows ? load(at + apart) : Floats{});
            std::memcpy(to + d / 2 * to_apart + t, &packed, sizeof packed);
        }
}

// Keys and values of a head in bfloat16; a last value after an odd number is 0.
INLINE void pair_head(const float *keys, const float *values, int64_t apart, int64_t size, int64_t length, const HeadRoom &room) {
    pair_rows_of(keys, apart, size, length, room.keys, room.apart);
    for (int64_t d = 0; d < size; ++d) {
        uint16_t *to = room.values + d * room.apart;
        for (int64_t t = 0; t < length; t += LANES) {
            const Words bits = ((Words)load_some(values + d * apart + t, length - t) + 0x8000u) >> 16;
            typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
            const Halves halves = __builtin_convertvector(bits, Halves);
            std::memcpy(to + t, &halves, sizeof halves);
        }
    }
}

// Attention of V vectors of queries of one head and sequence; the result takes the place of the queries.
template <int V>
void attend(const Encoder &e, const Wave &w, int64_t start, int64_t length, int64_t head, int64_t first, bool paired,
            const HeadRoom &room) {
    constexpr int WIDTH = V * LANES;
    const int64_t size = e.width / e.heads, apart = w.stride;
    float *queries = w.qkv + head * size * apart + start + first, *scores = room.scores;
    const float *keys = w.qkv + (e.width + head * size) * apart + start, *values = keys + e.width * apart;
    const float *bias = e.bias ? e.bias + head * (2 * e.reach + 1) + e.reach + first : nullptr; // of key 0
    Floats high[V], total[V] = {};
    for (int v = 0; v < V; ++v) high[v] = splat(-3e38f);
    if (paired) pair_rows_of(queries, apart, size, WIDTH, room.queries, WIDTH);
    in_pieces<ROWS_WITH<V>>(0, length, [&](int64_t key, auto count) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        Floats sums[R][V];
        if (paired) pair_sums<R, V>(room.queries, WIDTH, room.keys + key, 1, room.apart, (size + 1) / 2, sums);
        else float_sums<R, V>(queries, apart, keys + key, 1, apart, size, sums);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                const Floats s = bias ? sums[r][v] + load(bias - key - r + v * LANES) : sums[r][v];
                high[v] = maximum(s, high[v]);
                store(scores + (key + r) * WIDTH + v * LANES, s);
            }
    });
    if (paired)
        for (int64_t key = 0; key < length; key += 2)
            for (int v = 0; v < V; ++v) {
                const float *at = scores + key * WIDTH + v * LANES;
                const Floats p = exponential_roughly(load(at) - high[v]);
                const Floats q = key + 1 < length ? exponential_roughly(load(at + WIDTH) - high[v]) : Floats{};
                total[v] += p + q;
                const Words packed = pair_of(p, q);
                std::memcpy(room.weights + key / 2 * WIDTH + v * LANES, &packed, sizeof packed);
            }
    else
        for (int64_t key = 0; key < length; ++key)
            for (int v = 0; v < V; ++v) {
                float *at = scores + key * WIDTH + v * LANES;
                const Floats p = exponential(load(at) - high[v]);
                total[v] += p;
                store(at, p);
            }
    for (int v = 0; v < V; ++v) total[v] = splat(1.0f) / total[v];
    const int64_t left = length - first;
    in_pieces<ROWS_WITH<V>>(0, size, [&](int64_t column, auto count) __attribute__((always_inline)) {
        constexpr int R = decltype(count)::value;
        Floats sums[R][V];
        if (paired)
            pair_sums<R, V>(room.weights, WIDTH, room.values + column * room.apart, room.apart, 2, (length + 1) / 2, sums);
        else float_sums<R, V>(scores, WIDTH, values + column * apart, apart, 1, length, sums);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) {
                float *to = queries + (column + r) * apart + v * LANES;
                if (left >= (v + 1) * LANES) store(to, sums[r][v] * total[v]);
                else if (left > v * LANES) store_some(to, sums[r][v] * total[v], left - v * LANES);
            }
    });
}

INLINE void attend_all(const Encoder &e, const Wave &w, const Crew &crew, const HeadRoom &room) {
    const int64_t size = e.width / e.heads;
    const bool paired = PAIRED && !e.exact, by_head = w.sequences * e.heads >= 2 * crew.size;
    int64_t task = 0;
    for (int64_t s = 0; s < w.sequences; ++s) {
        const int64_t start = w.starts[s], length = w.starts[s + 1] - start;
        for (int64_t head = 0; head < e.heads; ++head) {
            bool prepared = !paired;
            for (int64_t first = 0; first < length;) {
                const int64_t vectors = (length - first + LANES - 1) / LANES;
                const int64_t taken = vectors >= WIDEST ? WIDEST : vectors >= 2 ? 2 : 1;
                if (task % crew.size == crew.me) {
                    const float *keys = w.qkv + (e.width + head * size) * w.stride + start;
                    if (!prepared) pair_head(keys, keys + e.width * w.stride, w.stride, size, length, room);
                    prepared = true;
                    if (taken == WIDEST) attend<WIDEST>(e, w, start, length, head, first, paired, room);
                    else if (taken == 2) attend<2>(e, w, start, length, head, first, paired, room);
                    else attend<1>(e, w, start, length, head, first, paired, room);
                }
                task += !by_head;
                first += taken * LANES;
            }
            task += by_head;
        }
    }
    crew.watch->was(ATTENTION);
    crew.meet();
}

// Blocks of a wave: calls `work` with the first token of each and, as a type, the number of its vectors.
template <typename Work> INLINE void in_blocks_of(int64_t tokens, const Work &work) {
    for (int64_t first = 0; first < tokens;) {
        const int64_t vectors = (tokens - first + LANES - 1) / LANES;
        if (vectors >= WIDEST) work(first, std::integral_constant<int, WIDEST>{}), first += WIDEST * LANES;
        else if (vectors >= 2) work(first, std::integral_constant<int, 2>{}), first += 2 * LANES;
        else work(first, std::integral_constant<int, 1>{}), first += LANES;
    }
}

// Threads take blocks of their own, or share each.
template <typename Work> INLINE void for_blocks(const Wave &w, const Crew &crew, const Crew &alone, const Work &work) {
    const bool shared = (w.tokens() + WIDEST * LANES - 1) / (WIDEST * LANES) < crew.size;
    int64_t block = 0;
    in_blocks_of(w.tokens(), [&](int64_t first, auto vectors) __attribute__((always_inline)) {
        if (shared || block++ % crew.size == crew.me) work(first, vectors, shared ? crew : alone, shared);
    });
    crew.meet();
}

// `to[k * stride + t] = from[rows[t]][k]`, or the other way round.
INLINE void gather(const float *from, const int64_t *rows, int64_t first, int64_t last, int64_t width, float *to,
                   int64_t stride) {
    for (; first < last; first += LANES) {
        const int here = static_cast<int>(std::min<int64_t>(LANES, last - first));
        for (int64_t k = 0; k < width; k += LANES) {
            const int64_t left = width - k;
            Floats tile[LANES];
            for (int t = 0; t < LANES; ++t) tile[t] = t < here ? load_some(from + rows[first + t] * width + k, left) : Floats{};
            transpose(tile);
            for (int i = 0; i < LANES && i < left; ++i) store(to + (k + i) * stride + first, tile[i]);
        }
    }
}

INLINE void scatter(const float *from, int64_t stride, const int64_t *rows, int64_t first, int64_t last, int64_t width,
                    float *to) {
    for (; first < last; first += LANES) {
        const int here = static_cast<int>(std::min<int64_t>(LANES, last - first));
        for (int64_t k = 0; k < width; k += LANES) {
            const int64_t left = width - k;
            Floats tile[LANES];
            for (int i = 0; i < LANES; ++i) tile[i] = i < left ? load(from + (k + i) * stride + first) : Floats{};
            transpose(tile);
            for (int t = 0; t < here; ++t) store_some(to + rows[first + t] * width + k, tile[t], left);
        }
    }
}

struct Rooms {
    Room shared, own;
    HeadRoom head;
};

INLINE void encode_wave(const Encoder &e, const Wave &w, const int64_t *rows, const float *x, float *y, const Crew &crew,
                        const Rooms &rooms) {
    const Crew alone{nullptr, 1, 0, crew.watch};
    int64_t first, last;
    crew.share(w.tokens(), LANES, first, last);
    gather(x, rows, first, last, e.width, w.x, w.stride);
    crew.watch->was(MOVING);
    crew.meet();
    EncoderLayer layer{}, next = layer_of(e, 0);
    for (int64_t l = 0; l <= e.layers; ++l) {
        for_blocks(w, crew, alone, [&](int64_t at, auto vectors, const Crew &who, bool together)
                                       __attribute__((always_inline)) {
            const Block<decltype(vectors)::value> block{who, together ? rooms.shared : rooms.own};
            if (l > 0) block.after_attention(layer, w.qkv + at, w.x + at, w.stride, e.width);
            if (l < e.layers) block.before_attention(next, w.x + at, w.qkv + at, w.stride, e.width);
        });
        if (l == e.layers) break;
        attend_all(e, w, crew, rooms.head);
        layer = next;
        if (l + 1 < e.layers) next = layer_of(e, l + 1);
    }
    scatter(w.x, w.stride, rows, first, last, e.width, y);
    crew.watch->was(MOVING);
    crew.meet();
}

constexpr int64_t TOGETHER = 128; // tokens of a wave, unless one sequence has more

// Between rows of features: an odd number of vectors, so that they fall on different lines of a cache, and room beyond
// the last token for what is read and written in whole vectors.
INLINE int64_t stride_of(int64_t tokens) { return ((tokens + BLOCK) / LANES | 1) * LANES; }

INLINE bool take_room(const Encoder &e, Scratch &memory, Room &room) {
    const int64_t words = e.deepest * BLOCK, between = 2 * e.between * BLOCK, inner = e.inner * BLOCK;
    float *at = memory.take<float>(words + 2 * BLOCK + between + inner);
    if (!at) return false;
    room.words = reinterpret_cast<uint32_t *>(at);
    room.scale = at + words;
    room.zero = room.scale + BLOCK;
    room.between = room.zero + BLOCK;
    room.inner = room.between + between;
    return true;
}

INLINE bool take_head(const Encoder &e, Scratch &memory, int64_t longest, HeadRoom &room) {
    const int64_t size = e.width / e.heads, pairs = (size + 1) / 2;
    room.apart = (longest + 2 * LANES) / LANES * LANES;
    const int64_t scores = longest * BLOCK, queries = pairs * BLOCK, keys = pairs * room.apart;
    const int64_t weights = (longest + 1) / 2 * BLOCK, values = (size * room.apart + 1) / 2;
    room.scores = memory.take<float>(scores + queries + keys + weights + values);
    if (!room.scores) return false;
    room.queries = reinterpret_cast<uint32_t *>(room.scores + scores);
    room.keys = room.queries + queries;
    room.weights = room.keys + keys;
    room.values = reinterpret_cast<uint16_t *>(room.weights + weights);
    return true;
}

INLINE bool take_wave(const Encoder &e, Scratch &memory, int64_t tokens, Wave &wave) {
    wave.stride = stride_of(tokens);
    wave.x = memory.take<float>(4 * e.width * wave.stride);
    wave.qkv = wave.x + e.width * wave.stride;
    return wave.x != nullptr;
}

// y and x are (rows, width); `rows` are those of the tokens of all sequences, and sequence s has the tokens from
// starts[s] to starts[s + 1]. Rows of no token are left as they are.
int32_t encode(const Encoder *encoder, const float *x, const int64_t *rows, const int64_t *starts, int64_t sequences, float *y) {
    const Encoder &e = *encoder;
    int64_t longest = 0;
    for (int64_t s = 0; s < sequences; ++s) longest = std::max(longest, starts[s + 1] - starts[s]);
    const int64_t tokens = starts[sequences], vectors = (tokens + LANES - 1) / LANES;
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), vectors * e.threads));
    const int64_t target = std::max(longest, std::min(TOGETHER, (tokens / threads + LANES - 1) / LANES * LANES));
    // Waves of whole sequences, as many tokens as may go together; together they work where a thread would have more
    // than its part.
    static thread_local Scratch lists;
    int64_t *begins = lists.take<int64_t>(sequences + 1 + threads), *loads = begins + sequences + 1;
    if (!begins) return NO_MEMORY;
    int64_t waves = 0;
    for (int64_t s = 0; s < sequences;) {
        begins[waves++] = s;
        const int64_t first = starts[s++];
        while (s < sequences && starts[s + 1] - first <= target) ++s;
    }
    begins[waves] = sequences;
    std::fill(loads, loads + threads, 0);
    for (int64_t w = 0; w < waves; ++w) *std::min_element(loads, loads + threads) += starts[begins[w + 1]] - starts[begins[w]];
    const bool shared = *std::max_element(loads, loads + threads) * threads > tokens * 5 / 4;
    Outcome outcome;
    Meeting meeting;
    std::atomic<int64_t> next{0};
    static thread_local Scratch common[3];
    Rooms together{};
    Wave whole{starts, sequences, 0, nullptr, nullptr};
    if (shared && !(take_room(e, common[0], together.shared) && take_wave(e, common[1], tokens, whole))) return NO_MEMORY;
    // Others wait in the end: teams of changing sizes would end threads, and begin them anew.
#pragma omp parallel
    if (omp_get_thread_num() < threads) {
        static thread_local Scratch own[4];
        Watch watch(e.spent != nullptr);
        const Tiles tiles;
        static_cast<void>(tiles);
        Rooms rooms = together;
        bool enough = take_head(e, own[0], longest, rooms.head) && take_room(e, own[1], rooms.own);
        if (shared) {
            const int size = static_cast<int>(std::min<int64_t>(omp_get_num_threads(), threads));
            const Crew crew{&meeting, size, omp_get_thread_num(), &watch};
            outcome.allows(enough);
            crew.meet();
            if (!outcome.code) encode_wave(e, whole, rows, x, y, crew, rooms);
        } else {
            Wave wave{};
            enough = enough && take_wave(e, own[2], target, wave);
            int64_t *own_starts = own[3].take<int64_t>(sequences + 1);
            if (outcome.allows(enough && own_starts))
                for (int64_t w; (w = next.fetch_add(1)) < waves;) {
                    const int64_t *from = starts + begins[w];
                    wave.sequences = begins[w + 1] - begins[w];
                    for (int64_t s = 0; s <= wave.sequences; ++s) own_starts[s] = from[s] - from[0];
                    wave.starts = own_starts;
                    encode_wave(e, wave, rows + from[0], x, y, Crew{nullptr, 1, 0, &watch}, rooms);
                }
        }
        for (int phase = 0; e.spent && phase < PHASES; ++phase)
            __atomic_fetch_add(e.spent + phase, watch.spent[phase], __ATOMIC_RELAXED);
    }
    return outcome.code;
}

} // namespace
