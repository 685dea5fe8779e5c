/* The one AVX-VNNI instruction of product_avx2.h by instructions of AVX2, so that its logic is tested without it. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#define __AVXVNNI__ 1

static inline __m256i e_dpbusd(__m256i sum, __m256i weights, __m256i numbers) {
    uint8_t w[32];
    int8_t n[32];
    int32_t s[8];
    memcpy(w, &weights, 32);
    memcpy(n, &numbers, 32);
    memcpy(s, &sum, 32);
    for (int i = 0; i < 32; i++) s[i / 4] += w[i] * n[i];
    memcpy(&sum, s, 32);
    return sum;
}
#define _mm256_dpbusd_avx_epi32 e_dpbusd
