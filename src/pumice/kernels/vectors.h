/* Vectors of 16 floats (compilers split them for shorter registers), and bfloat16. */
#ifndef PUMICE_VECTORS_H
#define PUMICE_VECTORS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES)));
typedef uint32_t word_vector __attribute__((vector_size(4 * LANES)));

static inline vector load(const float *from) {
    vector numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

static inline float total(vector numbers) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)numbers);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += numbers[i];
    return sum;
#endif
}

static inline uint16_t to_bf16(float value) { /* to the nearest, ties to even; values are finite here */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vector load_bf16(const uint16_t *from) {
    half_vector halves;
    memcpy(&halves, from, sizeof halves);
    word_vector bits = __builtin_convertvector(halves, word_vector) << 16;
    vector numbers;
    memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
}
#endif
