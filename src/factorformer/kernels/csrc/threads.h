// How a product is split among the threads of OpenMP, which are torch's own where this library is loaded after torch.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int FEW = 4; // up to so many tokens are multiplied one by one

// What a thread does of a product: a range of units, such as rows or blocks of tokens, in whole numbers of them.
struct Share {
    int64_t begin, end;

    explicit Share(int64_t all) : begin(0), end(all) {}

    Share(int64_t size, int64_t unit) {
        const int64_t units = (size + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
        begin = std::min(units * me / threads * unit, size);
        end = std::min(units * (me + 1) / threads * unit, size);
    }
};

} // namespace
