// Vectors of the processor's width, and functions of them.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Numbers in a vector, and rows of a product that are summed at a time in the processor's registers.
#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int WIDTH = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 6;
#endif

template <int size>
struct Numbers {
    typedef float Floats __attribute__((vector_size(4 * size), aligned(4), may_alias));
    typedef int Integers __attribute__((vector_size(4 * size), aligned(4), may_alias));
    typedef uint16_t Halves __attribute__((vector_size(2 * size), aligned(2), may_alias));
    typedef int8_t Bytes __attribute__((vector_size(size), aligned(1), may_alias));
};
using Vector = Numbers<WIDTH>::Floats;
using Integers = Numbers<WIDTH>::Integers;
using Halves = Numbers<WIDTH>::Halves;
using Bytes = Numbers<WIDTH>::Bytes;

// The upper half of an fp32 number.
struct bf16 {
    uint16_t bits;
};

// The vector at a place of any alignment. Not a function: clang would take its result for an aligned one.
#define at(place) (*(Vector *)(place))
static Vector load(const float *place) { return at(place); }
static Vector load(const bf16 *place) {
    return (Vector)(__builtin_convertvector(*(const Halves *)place, Integers) << 16);
}
// A vector with x in every lane. Minus, because -0 + 0 would be +0.
static Vector broadcast(float x) { return x - Vector{}; }
// a * b + c, rounded once with AVX-512, with AVX2 and FMA, and with NEON, and else twice.
static Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
static float to_float(float x) { return x; }
static float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Rounds to the nearest number, of two equally near ones to the even one. NaN stays NaN.
static bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return {(uint16_t)(bits >> 16 | 64)};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static void store(float *place, float x) { *place = x; }
static void store(bf16 *place, float x) { *place = to_bf16(x); }

// Prefetches the lines of the second cache of some bytes. Inlined, because GCC drops calls of functions without results.
__attribute__((always_inline)) static inline void prefetch(const void *place, int bytes) {
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch((const char *)place + line, 0, 2);
}

// Adds halves to halves until one number is left.
template <int size>
static float sum(typename Numbers<size>::Floats v) {
    if constexpr (size == 1) {
        return v[0];
    } else {
        typename Numbers<size / 2>::Floats halves[2];
        memcpy(halves, &v, sizeof v);
        return sum<size / 2>(halves[0] + halves[1]);
    }
}

// The byte that stands for a weight of 0 in `add_products`.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int ZERO = 0;
#else
constexpr int ZERO = 128;
#endif

// Adds to each of the numbers its four products of bytes of w, 0 to 255 (with ZERO 0: -128 to 127), with those of x, -128
// to 127.
static Integers add_products(Integers sums, Integers w, Integers x) {
#if defined(__ARM_FEATURE_DOTPROD)
    return (Integers)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)x);
#elif defined(__AVX512VNNI__)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#else
    // Products of 16-bit numbers: of the bytes 0 and 2, and of the bytes 1 and 3.
    typedef int16_t Shorts __attribute__((vector_size(4 * WIDTH), may_alias));
    const Integers w_even = w & 0x00ff00ff, w_odd = (w >> 8) & 0x00ff00ff;
    const Integers x_even = (Integers)((Shorts)x << 8 >> 8), x_odd = (Integers)((Shorts)x >> 8);
#if defined(__AVX512F__) && defined(__AVX512BW__)
    sums += (Integers)_mm512_madd_epi16((__m512i)w_even, (__m512i)x_even);
    return sums + (Integers)_mm512_madd_epi16((__m512i)w_odd, (__m512i)x_odd);
#elif defined(__AVX2__)
    sums += (Integers)_mm256_madd_epi16((__m256i)w_even, (__m256i)x_even);
    return sums + (Integers)_mm256_madd_epi16((__m256i)w_odd, (__m256i)x_odd);
#elif defined(__SSE2__)
    sums += (Integers)_mm_madd_epi16((__m128i)w_even, (__m128i)x_even);
    return sums + (Integers)_mm_madd_epi16((__m128i)w_odd, (__m128i)x_odd);
#else
    sums += (w_even & 255) * (x_even << 16 >> 16) + (w_even >> 16) * (x_even >> 16);
    return sums + (w_odd & 255) * (x_odd << 16 >> 16) + (w_odd >> 16) * (x_odd >> 16);
#endif
#endif
}

// exp(x), 0 below -50 and exp(50) above 50: denormal numbers would cost a hundred times more. NaN stays NaN.
// Source: Moshier 1992, Cephes mathematical library, expf.
static Vector exponential(Vector x) {
    const Vector zero = {}, top = zero + 50.0f;
    Integers low = x < -50.0f;
    x = x > 50.0f ? top : x;
    const Vector n = multiply_add(x, broadcast(1.44269504088896341f), broadcast(12582912.0f)) - 12582912.0f;
    const Vector r = multiply_add(n, broadcast(2.12194440e-4f), multiply_add(n, broadcast(-0.693359375f), x));
    Vector p = multiply_add(r, broadcast(1.9875691500e-4f), broadcast(1.3981999507e-3f));
    p = multiply_add(p, r, broadcast(8.3334519073e-3f));
    p = multiply_add(p, r, broadcast(4.1665795894e-2f));
    p = multiply_add(p, r, broadcast(1.6666665459e-1f));
    p = multiply_add(p, r, broadcast(5.0000001201e-1f));
    p = multiply_add(p * r, r, r) + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    p *= (Vector)power;
    return low ? zero : p;
}

// GELU in its tanh form (Hendrycks & Gimpel 2016, section 2): x times the sigmoid of twice the argument of tanh.
static Vector gelu(Vector x) {
    constexpr float twice = -1.59576912160573f;
    return x / (1.0f + exponential(x * (twice + twice * 0.044715f * x * x)));
}
