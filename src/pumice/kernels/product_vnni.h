/* The integer product with AVX-512 VNNI: one instruction adds up four bytes times four bytes in each of 16 rows.
 *
 * That instruction takes weights without sign. So the sums start at minus what the added 128 (or 8) contributes.
 *
 * With many rows (a prompt), weights and scales are unpacked first, some groups of WIDE tiles at a time: to a byte for
 * each weight, which Q8_0 has already, and fp32. What is multiplied and added, and in which order, stays the same.
 */
#include <immintrin.h>

#define WIDE 4
#define ROWS 3
#define UNPACK_ROWS 12 /* unpack weights for so many rows */
#ifndef IN_REGISTER    /* GCC would load a value again for each use, and there is one load for each product then */
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#endif

typedef struct {
    uint8_t numbers[SPAN][8][WIDE][64];
    float scales[SPAN][WIDE][TILE], offsets[SPAN][WIDE][TILE];
} __attribute__((aligned(64))) Unpacked;

INLINE __m512 halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)from)); }
INLINE __m512 bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
}

INLINE void tile_scales(const int kind, const uint8_t *from, int64_t groups, int64_t g, __m512 *scale, __m512 *offset) {
    if (kind == Q8_0 || kind == Q4_0) *scale = halves(from + g * 32);
    else if (kind == Q4_1) {
        *scale = halves(from + g * 64);
        *offset = halves(from + g * 64 + 32);
    } else {
        const uint8_t *whole = from + 32 * groups + g / SUPER * 64, *factor = from + g * 32;
        *scale = _mm512_mul_ps(halves(whole), bytes(factor));
        *offset = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), halves(whole + 32)), bytes(factor + 16));
    }
}

/* Four weights, 4 j to 4 j + 3 of group g, of each row of a tile. */
INLINE __m512i tile_weights(const int kind, const uint8_t *tile, int64_t g, int j) {
    if (kind == Q8_0) return _mm512_loadu_si512(tile + (g * 8 + j) * 64);
    __m512i numbers = _mm512_loadu_si512(tile + (g * 4 + j % 4) * 64);
    if (j >= 4) numbers = _mm512_srli_epi16(numbers, 4);
    return _mm512_and_si512(numbers, _mm512_set1_epi8(15));
}

/* Unpack groups [first, last) of WIDE tiles, for this thread. */
INLINE const Unpacked *unpack(const int kind, const uint8_t *data, int64_t inputs, int64_t first, int64_t last) {
    static _Thread_local Unpacked unpacked;
    const int64_t groups = inputs / GROUP;
    for (int64_t g = first; g < last; g++)
        for (int t = 0; t < WIDE; t++) {
            const uint8_t *tile = data + t * tile_bytes(kind, inputs);
            __m512 scale, offset = _mm512_setzero_ps();
            tile_scales(kind, tile + number_bytes(kind, inputs), groups, g, &scale, &offset);
            _mm512_storeu_ps(unpacked.scales[g - first][t], scale);
            _mm512_storeu_ps(unpacked.offsets[g - first][t], offset);
            if (kind == Q8_0) continue;
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                _mm512_storeu_si512(unpacked.numbers[g - first][j][t], tile_weights(kind, tile, g, j));
        }
    return &unpacked;
}

/* unpacked: of these groups and tiles, or null. */
INLINE void multiply(const int kind, const int rows, const int tiles, const uint8_t *data, const Unpacked *unpacked,
                     int64_t inputs, const Activations *x, int64_t row, int64_t first, int64_t last, float *sums) {
    const int64_t groups = inputs / GROUP, each = tile_bytes(kind, inputs);
    __m512 f[ROWS][WIDE];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) f[r][t] = _mm512_loadu_ps(sums + (r * tiles + t) * TILE);
    for (int64_t g = first; g < last; g++) {
        const int8_t *a = x->numbers + row * inputs + g * GROUP;
        __m512i dots[ROWS][WIDE];
        for (int r = 0; r < rows; r++) {
            const int32_t total = x->sums[(row + r) * groups + g];
            const __m512i start = _mm512_set1_epi32(kind == Q8_0 ? -128 * total : kind == Q4_0 ? -8 * total : 0);
            for (int t = 0; t < tiles; t++) dots[r][t] = start;
        }
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            __m512i weights[WIDE];
            for (int t = 0; t < tiles; t++) {
                weights[t] = unpacked && kind != Q8_0 ? _mm512_loadu_si512(unpacked->numbers[g - first][j][t])
                                                      : tile_weights(kind, data + t * each, g, j);
                if (rows > 1) IN_REGISTER(weights[t]);
            }
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, a + r * inputs + 4 * j, 4);
                const __m512i numbers = _mm512_set1_epi32(four);
                for (int t = 0; t < tiles; t++) dots[r][t] = _mm512_dpbusd_epi32(dots[r][t], weights[t], numbers);
            }
        }
        for (int t = 0; t < tiles; t++) {
            __m512 scale, offset;
            if (unpacked) {
                scale = _mm512_loadu_ps(unpacked->scales[g - first][t]);
                offset = _mm512_loadu_ps(unpacked->offsets[g - first][t]);
            } else tile_scales(kind, data + t * each + number_bytes(kind, inputs), groups, g, &scale, &offset);
            for (int r = 0; r < rows; r++) {
                __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][t]), scale);
                if (kind == Q4_1 || kind == Q4_K)
                    part = _mm512_fmadd_ps(offset, _mm512_set1_ps((float)x->sums[(row + r) * groups + g]), part);
                f[r][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(x->scales[(row + r) * groups + g]), f[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) _mm512_storeu_ps(sums + (r * tiles + t) * TILE, f[r][t]);
}
