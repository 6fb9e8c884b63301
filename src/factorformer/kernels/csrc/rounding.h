// What products read of factors that are stored in integers, to which training rounds them in every step: the very
// values that torch makes of them, by the same divisions and products.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "factorformer.h"
#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t GROUP = 32; // values of a row that have a reach of their own
constexpr int64_t MUCH = 1 << 15; // from so many values on all threads take part

// The nearest whole number, of two such the even one, of values below 2^22.
INLINE Floats whole(Floats x) {
    const Floats large = splat(12582912.0f);
    return (x + large) - large;
}

// The value of each group that is farthest from 0, the positive one of two: ends (rows, groups) of x (rows, width).
void extremes(const float *x, int64_t rows, int64_t width, float *ends) {
    const int64_t groups = (width + GROUP - 1) / GROUP;
#pragma omp parallel if (rows * width >= MUCH)
    {
        const Share share(rows, 1);
        for (int64_t row = share.begin; row < share.end; ++row)
            for (int64_t g = 0; g < groups; ++g) {
                Floats low{}, high{}, wrong{};
                const int64_t end = std::min((g + 1) * GROUP, width);
                for (int64_t k = g * GROUP; k < end; k += LANES) {
                    const Floats v = load_some(x + row * width + k, end - k);
                    low = minimum(v, low);
                    high = maximum(v, high);
                    wrong += v - v; // comparisons lose what is not a number
                }
                float least = 0, most = 0, nothing = 0;
                for (int lane = 0; lane < LANES; ++lane) {
                    least = std::min(least, low[lane]);
                    most = std::max(most, high[lane]);
                    nothing += wrong[lane];
                }
                ends[row * groups + g] = (most >= -least ? most : least) + nothing;
            }
    }
}

// y (rows, width): x rounded to levels times the reach of its group, and that to 8 bits with a scale for each row.
void round_rows(const float *x, int64_t rows, int64_t width, const float *reach, const Levels *l, int32_t in_int8,
                float *y) {
    const int64_t groups = (width + GROUP - 1) / GROUP;
#pragma omp parallel if (rows * width >= MUCH)
    {
        const Share share(rows, 1);
        for (int64_t row = share.begin; row < share.end; ++row) {
            const float *from = x + row * width;
            float *to = y + row * width;
            Floats high{}, wrong{};
            for (int64_t k = 0; k < width; k += LANES) {
                Floats v = load_some(from + k, width - k);
                if (reach) {
                    const float r = reach[row * groups + k / GROUP];
                    const Floats part = v / splat(std::fabs(r) < FLT_MIN ? FLT_MIN : r);
                    v = splat(l->levels[0]);
                    for (int64_t i = 1; i < l->count; ++i)
                        v = part > splat(l->bounds[i - 1]) ? splat(l->levels[i]) : v;
                    v *= splat(r);
                    store_some(to + k, v, width - k);
                }
                high = maximum(maximum(v, -v), high);
                wrong += v - v;
            }
            if (!in_int8) continue;
            float most = 0, nothing = 0;
            for (int lane = 0; lane < LANES; ++lane) {
                most = std::max(most, high[lane]);
                nothing += wrong[lane];
            }
            const Floats scale = splat(most / 127.0f + nothing), divisor = splat(scale[0] > 0 ? scale[0] : 1.0f);
            for (int64_t k = 0; k < width; k += LANES) {
                const Floats v = load_some((reach ? to : from) + k, width - k);
                const Floats code = minimum(maximum(whole(v / divisor), splat(-127.0f)), splat(127.0f));
                store_some(to + k, code * scale, width - k);
            }
        }
    }
}

} // namespace
