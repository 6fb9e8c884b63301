// Scratch memory: kept by each thread for its next product, and never more than the largest product needed.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "factorformer.h"

namespace {

struct Scratch {
    void *memory = nullptr;
    std::size_t size = 0;

    ~Scratch() { std::free(memory); }

    // Null where there is not enough memory: no exception may leave a parallel region.
    template <typename T> T *take(std::size_t count) noexcept {
        const std::size_t wanted = (count * sizeof(T) + 127) / 64 * 64;
        if (wanted > size) {
            std::free(memory);
            memory = std::aligned_alloc(64, wanted);
            size = memory ? wanted : 0;
        }
        return static_cast<T *>(memory);
    }
};

// What a kernel returns. A thread without memory leaves its share of the product undone and says so here; it goes on to
// meet the barriers that the others wait at.
struct Outcome {
    std::atomic<int32_t> code{0};

    bool allows(bool enough) {
        if (!enough) code = NO_MEMORY;
        return enough;
    }
};

} // namespace
