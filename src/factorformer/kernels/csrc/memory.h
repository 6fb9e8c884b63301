// Scratch memory: kept by each thread for its next product, and never more than the largest product needed.

#pragma once

#include <cstdlib>
#include <new>

namespace {

struct Scratch {
    void *memory = nullptr;
    std::size_t size = 0;

    ~Scratch() { std::free(memory); }

    template <typename T> T *take(std::size_t count) {
        const std::size_t wanted = (count * sizeof(T) + 127) / 64 * 64;
        if (wanted > size) {
            std::free(memory);
            memory = std::aligned_alloc(64, wanted);
            size = memory ? wanted : 0;
            if (!memory) throw std::bad_alloc();
        }
        return static_cast<T *>(memory);
    }
};

} // namespace
