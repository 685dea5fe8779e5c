/* The integer product with AVX2, and with AVX-VNNI where the processor has that too.
 *
 * AVX2 multiplies bytes in pairs, whose sums have 16 bits. Weights of 4 bits: eight pairs sum to at most
 * 8 * 2 * 15 * 127 = 30480, so a whole group fits in 16 bits. Weights of 8 bits: only one pair fits
 * (2 * 128 * 127 = 32512). The instruction takes the first factor without sign, so the sign of a weight is moved to the
 * activation. AVX-VNNI adds four products to 32 bits. What was added to the weights is subtracted at the end.
 */
#include <immintrin.h>

#define WIDE 1
#define ROWS 4

INLINE __m256 halves(const uint8_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE __m256 bytes(const uint8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

/* Add products of weights without sign and activations: of 8 bits, with 128 added, and of 4 bits. */
#ifdef __AVXVNNI__
#define ADDED_TO_8 128 /* what is still in the sums of 8 bits */
INLINE __m256i add_8(__m256i sum, __m256i weights, __m256i numbers) {
    return _mm256_dpbusd_avx_epi32(sum, weights, numbers);
}
INLINE __m256i add_4(__m256i sum, __m256i weights, __m256i numbers) { return add_8(sum, weights, numbers); }
INLINE __m256i group_4(__m256i sum) { return sum; }
#else
#define ADDED_TO_8 0
INLINE __m256i add_8(__m256i sum, __m256i weights, __m256i numbers) {
    const __m256i signs = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signs), _mm256_sign_epi8(numbers, signs));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE __m256i add_4(__m256i sum, __m256i weights, __m256i numbers) { /* in 16 bits */
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, numbers));
}
INLINE __m256i group_4(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

/* Scales and offsets of eight rows: the first or second half of a tile. */
INLINE void tile_scales(const int kind, const uint8_t *from, int64_t groups, int64_t g, const int half, __m256 *scale,
                        __m256 *offset) {
    if (kind == Q8_0 || kind == Q4_0) *scale = halves(from + g * 32 + half * 16);
    else if (kind == Q4_1) {
        *scale = halves(from + g * 64 + half * 16);
        *offset = halves(from + g * 64 + 32 + half * 16);
    } else {
        const uint8_t *whole = from + 32 * groups + g / SUPER * 64 + half * 16, *factor = from + g * 32 + half * 8;
        *scale = _mm256_mul_ps(halves(whole), bytes(factor));
        *offset = _mm256_mul_ps(_mm256_sub_ps(_mm256_setzero_ps(), halves(whole + 32)), bytes(factor + 16));
    }
}

INLINE void multiply(const int kind, const int rows, const int tiles, const uint8_t *data, const void *unpacked,
                     int64_t inputs, const Activations *x, int64_t row, int64_t first, int64_t last, float *sums) {
    const int64_t groups = inputs / GROUP;
    const uint8_t *from = data + number_bytes(kind, inputs);
    const __m256i low = _mm256_set1_epi8(15);
    __m256 f[ROWS][2];
    (void)tiles, (void)unpacked;
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) f[r][h] = _mm256_loadu_ps(sums + r * TILE + 8 * h);
    for (int64_t g = first; g < last; g++) {
        const uint8_t *w = data + g * TILE * (kind == Q8_0 ? GROUP : GROUP / 2);
        const int8_t *a = x->numbers + row * inputs + g * GROUP;
        __m256i dots[ROWS][2];
        if (rows == 1)
            for (int i = 0; i < TILE * (kind == Q8_0 ? GROUP : GROUP / 2); i += LINE) __builtin_prefetch(w + i + AHEAD);
        for (int r = 0; r < rows; r++) dots[r][0] = dots[r][1] = _mm256_setzero_si256();
        if (kind == Q8_0) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++, w += 64) {
                __m256i weights[2];
                for (int h = 0; h < 2; h++) weights[h] = _mm256_loadu_si256((const __m256i *)(w + 32 * h));
                for (int r = 0; r < rows; r++) {
                    int32_t four;
                    memcpy(&four, a + r * inputs + 4 * j, 4);
                    const __m256i numbers = _mm256_set1_epi32(four);
                    for (int h = 0; h < 2; h++) dots[r][h] = add_8(dots[r][h], weights[h], numbers);
                }
            }
        } else {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++, w += 64) {
                __m256i lower[2], upper[2];
                for (int h = 0; h < 2; h++) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)(w + 32 * h));
                    lower[h] = _mm256_and_si256(both, low);
                    upper[h] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                }
                for (int r = 0; r < rows; r++) {
                    int32_t four, later;
                    memcpy(&four, a + r * inputs + 4 * j, 4);
                    memcpy(&later, a + r * inputs + 16 + 4 * j, 4);
                    const __m256i numbers = _mm256_set1_epi32(four), others = _mm256_set1_epi32(later);
                    for (int h = 0; h < 2; h++)
                        dots[r][h] = add_4(add_4(dots[r][h], lower[h], numbers), upper[h], others);
                }
            }
            for (int r = 0; r < rows; r++)
                for (int h = 0; h < 2; h++) dots[r][h] = group_4(dots[r][h]);
        }
        __m256 scale[2], offset[2];
        for (int h = 0; h < 2; h++) tile_scales(kind, from, groups, g, h, &scale[h], &offset[h]);
        for (int r = 0; r < rows; r++) {
            const int32_t total = x->sums[(row + r) * groups + g];
            const __m256 by = _mm256_set1_ps(x->scales[(row + r) * groups + g]);
            for (int h = 0; h < 2; h++) {
                __m256i dot = dots[r][h];
                const int added = kind == Q8_0 ? ADDED_TO_8 : kind == Q4_0 ? 8 : 0;
                if (added) dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(added * total));
                __m256 part = _mm256_mul_ps(_mm256_cvtepi32_ps(dot), scale[h]);
                if (kind == Q4_1 || kind == Q4_K)
                    part = _mm256_fmadd_ps(offset[h], _mm256_set1_ps((float)total), part);
                f[r][h] = _mm256_fmadd_ps(part, by, f[r][h]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int h = 0; h < 2; h++) _mm256_storeu_ps(sums + r * TILE + 8 * h, f[r][h]);
}
