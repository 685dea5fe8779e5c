/* Vectors of floats, as many as a register holds, and bfloat16. */
#ifndef PUMICE_VECTORS_H
#define PUMICE_VECTORS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

/* GCC 12 keeps arrays of longer vectors in memory, which is many times slower. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES)));
typedef uint32_t word_vector __attribute__((vector_size(4 * LANES)));

static inline vector load(const float *from) {
    vector numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

static inline float total(vector numbers) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)numbers);
#else
    /* In halves: one after another, the additions would wait for each other. */
    typedef float quarter __attribute__((vector_size(16)));
    quarter sums[LANES / 4];
    memcpy(sums, &numbers, sizeof sums);
    quarter sum = LANES == 8 ? sums[0] + sums[LANES / 4 - 1] : sums[0];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
#endif
}

static inline uint16_t to_bf16(float value) { /* to the nearest, ties to even; values are finite here */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vector load_bf16(const uint16_t *from) {
#if LANES == 16 /* GCC 12 makes two halves of a conversion and joins them */
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif LANES == 8 && defined(__AVX2__)
    return (vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    half_vector halves;
    memcpy(&halves, from, sizeof halves);
    word_vector bits = __builtin_convertvector(halves, word_vector) << 16;
    vector numbers;
    memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
#endif
}

/* exp(x) for x <= 0, to 2e-7 of it, in a form that compilers turn into vectors (Cephes' expf). NaN stays NaN, so that a
 * damaged key does not pass for one that nobody looks at. */
static inline float exp_negative(float x) {
    x = x < -87 ? -87 : x;
    const float shift = 12582912; /* 1.5 * 2^23: adding it rounds to a whole number */
    float whole = x * 1.44269504f + shift - shift;
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return (sum * rest * rest + rest + 1) * power;
}

/* 2^x for x <= 0, to 3e-7 of it (a minimax polynomial), and 2^-126 below that. NaN stays NaN. */
static inline float exp2_negative(float x) {
    x = x < -126 ? -126 : x;
    const float shift = 12582912; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
    float shifted = x + shift, rest = x - (shifted - shift);
    float sum = 1.327637926e-3f;
    sum = sum * rest + 9.675510101e-3f;
    sum = sum * rest + 5.550713267e-2f;
    sum = sum * rest + 2.402212032e-1f;
    sum = sum * rest + 6.931469673e-1f;
    sum = sum * rest + 1.000000072f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return sum * power;
}
#endif
