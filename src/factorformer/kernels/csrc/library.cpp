// What the library exports, and the choice of a variant for the processor at hand.

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "factorformer.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" { // null where a variant was left out
extern const Table baseline __attribute__((weak));
#if defined(__x86_64__)
extern const Table avx2 __attribute__((weak)), avx512 __attribute__((weak)), avx512_vnni __attribute__((weak)),
    avx512_vbmi2 __attribute__((weak)), avx512_bf16 __attribute__((weak)), amx __attribute__((weak)), amx_emulated __attribute__((weak));
#endif
}

#if defined(__x86_64__)
// Whether the processor has AMX for bytes and bfloat16, and the system lets this process use it.
static bool has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25; // bfloat16, tiles, bytes
    if ((d & wanted) != wanted) return false;
#if defined(__linux__)
    constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

static const Table *choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("bmi2");
    const bool bytes = wide && __builtin_cpu_supports("avx512vnni");
    const bool places = bytes && __builtin_cpu_supports("avx512vbmi2");
    const bool pairs = places && __builtin_cpu_supports("avx512bf16");
    const bool can[] = {pairs && has_tiles(), pairs, pairs, places, bytes, wide,
                        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), true};
    // Tiles in plain C++ are for tests, and in no library that holds anything else.
    const Table *const all[] = {&amx,         &amx_emulated, &avx512_bf16, &avx512_vbmi2,
                                &avx512_vnni, &avx512,       &avx2,        &baseline};
    const char *wanted = std::getenv("FACTORFORMER_CPU"); // the name of a variant
    for (int i = 0; i < 8; ++i)
        if (can[i] && all[i] && (!wanted || !*wanted || !std::strcmp(wanted, all[i]->name)) && all[i]->works()) return all[i];
#endif
    return &baseline;
}

static const Table *const table = choose();

#if defined(__linux__) && defined(_OPENMP) && (defined(__clang__) ? _OPENMP >= 201811 : __GNUC__ >= 9)
extern "C" int omp_pause_resource_all(omp_pause_resource_t) __attribute__((weak)); // missing in older libraries

// No thread but one survives a fork, and the child would wait for the others forever, in products of torch as well. So
// they end before it, and the next product makes new ones.
static void end_threads() {
    if (omp_pause_resource_all) omp_pause_resource_all(omp_pause_hard);
}

__attribute__((constructor)) static void expect_forks() { pthread_atfork(end_threads, nullptr, nullptr); }
#endif

// What the library was made of: callers compare it with the sources that they came with.
EXPORT const char *factorformer_sources() { return FACTORFORMER_SOURCES; }

EXPORT const char *factorformer_variant() { return table->name; }

// Structures are passed as arrays of integers, pointers among them, in the order of their fields: a caller without a C
// compiler makes them once and keeps them.
static Support support_of(const int64_t *f) {
    return {reinterpret_cast<const uint8_t *>(f[0]), f[1], f[2], f[3], f[4], static_cast<int32_t>(f[5])};
}

static Values values_of(const int64_t *f) {
    return {reinterpret_cast<const void *>(f[6]), reinterpret_cast<const float *>(f[7]), static_cast<int32_t>(f[8])};
}

EXPORT int32_t factorformer_sparse(const float *x, int64_t n, const int64_t *fields, const float *bias, float *y) {
    const Support s = support_of(fields);
    const Values v = values_of(fields);
    return table->sparse(x, n, &s, &v, bias, y);
}

EXPORT int32_t factorformer_sparse_transposed(const float *x, int64_t n, const int64_t *fields, float *y) {
    const Support s = support_of(fields);
    const Values v = values_of(fields);
    return table->sparse_transposed(x, n, &s, &v, y);
}

EXPORT int32_t factorformer_sparse_outer(const float *left, const float *right, int64_t n, const int64_t *fields, float *y) {
    const Support s = support_of(fields);
    return table->sparse_outer(left, right, n, &s, y);
}

static Matrix matrix_of(const int64_t *f) {
    return {reinterpret_cast<const void *>(f[0]), reinterpret_cast<const float *>(f[1]), f[2], f[3],
            static_cast<int32_t>(f[4]), static_cast<int32_t>(f[5])};
}

constexpr int64_t AT_ONCE = 4096; // rows that are looked up together: scratch memory is of no more than these

template <typename LookUp> static int32_t in_blocks(int64_t n, const LookUp &look_up) {
    int32_t code = 0;
    for (int64_t t = 0; t < n && !code; t += AT_ONCE) code = look_up(t, n - t < AT_ONCE ? n - t : AT_ONCE);
    return code;
}

EXPORT int32_t factorformer_sparse_rows(const int64_t *index, int64_t n, const int64_t *fields, const int64_t *dictionary,
                                     float *y) {
    const Support s = support_of(fields);
    const Values v = values_of(fields);
    const Matrix d = matrix_of(dictionary);
    return in_blocks(n, [&](int64_t t, int64_t count) {
        return table->sparse_rows(index + t, count, &s, &v, &d, y + t * d.in);
    });
}

// Four pointers, then the integers of the structure in their order.
static Kronecker kronecker_of(const int64_t *f) {
    return {reinterpret_cast<const void *>(f[0]),  reinterpret_cast<const void *>(f[1]),
            reinterpret_cast<const float *>(f[2]), reinterpret_cast<const float *>(f[3]),
            f[4], f[5], f[6], f[7], f[8], f[9], static_cast<int32_t>(f[10])};
}

EXPORT int32_t factorformer_kronecker(const float *x, int64_t n, const int64_t *fields, const float *bias, float *y) {
    const Kronecker k = kronecker_of(fields);
    return table->kronecker(x, n, &k, bias, y);
}

EXPORT int32_t factorformer_kronecker_rows(const int64_t *index, int64_t n, const int64_t *fields, float *y) {
    const Kronecker k = kronecker_of(fields);
    return in_blocks(n, [&](int64_t t, int64_t count) {
        return table->kronecker_rows(index + t, count, &k, y + t * k.width);
    });
}

EXPORT int32_t factorformer_dense_rows(const int64_t *index, int64_t n, const int64_t *fields, const int64_t *right, float *y) {
    const Matrix m = matrix_of(fields), r = right ? matrix_of(right) : Matrix{};
    const int64_t width = right ? r.out : m.in;
    return in_blocks(n, [&](int64_t t, int64_t count) {
        return table->dense_rows(index + t, count, &m, right ? &r : nullptr, y + t * width);
    });
}

// Six fields for each matrix, up to four matrices.
EXPORT int32_t factorformer_chain(const float *x, int64_t n, const int64_t *fields, int64_t count, const float *bias,
                               float *y) {
    Matrix m[4];
    for (int64_t i = 0; i < count; ++i) m[i] = matrix_of(fields + 6 * i);
    return table->chain(x, n, m, count, bias, y);
}

EXPORT void factorformer_extremes(const float *x, int64_t rows, int64_t width, float *ends) {
    table->extremes(x, rows, width, ends);
}

EXPORT void factorformer_round_rows(const float *x, int64_t rows, int64_t width, const float *reach, const float *levels,
                                    const float *bounds, int64_t count, int32_t in_int8, float *y) {
    const Levels l = {levels, bounds, count};
    table->round_rows(x, rows, width, reach, &l, in_int8, y);
}

// The fields of an encoder, and those of its layers after them.
EXPORT int32_t factorformer_encode(const int64_t *f, const float *x, const int64_t *rows, const int64_t *starts,
                                   int64_t sequences, float *y) {
    const Encoder e = {f[0], f[1], f[2], f[3], f[4], f[5], reinterpret_cast<const float *>(f[6]), f[7], f[8],
                       reinterpret_cast<int64_t *>(f[9]), f[10], f + 11};
    return table->encode(&e, x, rows, starts, sequences, y);
}

EXPORT void factorformer_gelu(const float *x, int64_t n, float *y) { table->gelu(x, n, y); }

// Five pointers, then the integers of the structure in their order.
EXPORT int32_t factorformer_attention(const int64_t *f, float scale) {
    Attention a = {reinterpret_cast<const float *>(f[0]),
                   reinterpret_cast<const float *>(f[1]),
                   reinterpret_cast<const float *>(f[2]),
                   reinterpret_cast<const uint8_t *>(f[3]),
                   reinterpret_cast<float *>(f[4]),
                   f[5],
                   f[6],
                   f[7],
                   f[8],
                   f[9],
                   f[10],
                   {f[11], f[12], f[13]},
                   {f[14], f[15], f[16]},
                   {f[17], f[18], f[19]},
                   {f[20], f[21], f[22], f[23]},
                   scale};
    return table->attention(&a);
}
