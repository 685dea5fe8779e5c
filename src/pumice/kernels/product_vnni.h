/* The integer product with AVX-512 VNNI: one instruction adds up four bytes times four bytes in each of 16 rows.
 *
 * That instruction takes weights without sign. So the sums start at minus what the added 128 (or 8) contributes.
 *
 * With many rows (a prompt), weights and scales are unpacked first, some groups of WIDE tiles at a time: to a byte for
 * each weight, which Q8_0 has already, and fp32. What is multiplied and added, and in which order, stays the same.
 *
 * In Q4_K, weights and activations have scales for 256 numbers, so only sums of 256 are multiplied by them. That saves two
 * operations in fp32 for each group, row and tile: a tenth of the time.
 */
#include <immintrin.h>

_Static_assert(SPAN % SUPER == 0, "a span holds whole blocks of Q4_K");

#define WIDE 4
#define ROWS 3
#define UNPACK_ROWS 12 /* unpack weights for so many rows */
#ifndef IN_REGISTER    /* GCC would load a value again for each use, and there is one load for each product then */
#define IN_REGISTER(value) __asm__("" : "+v"(value))
#endif

typedef struct {
    uint8_t numbers[SPAN][8][WIDE][64];
    float scales[SPAN][WIDE][TILE], offsets[SPAN][WIDE][TILE];
    int16_t pairs[SPAN / 2][WIDE][TILE][2];    /* of Q4_K: the offsets' factors, of two groups each */
    float supers[SPAN / SUPER][2][WIDE][TILE]; /* of Q4_K: scales and offsets of 256 weights */
} __attribute__((aligned(64))) Unpacked;

INLINE __m512 halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)from)); }
INLINE __m512 bytes(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from)));
}

/* The scale, and the offset if there is one, of group g in each row of a tile. Of Q4_K, the factor for the scale. */
INLINE void tile_scales(const int kind, const uint8_t *from, int64_t g, __m512 *scale, __m512 *offset) {
    if (kind == Q8_0 || kind == Q4_0) *scale = halves(from + g * 32);
    else if (kind == Q4_1) {
        *scale = halves(from + g * 64);
        *offset = halves(from + g * 64 + 32);
    } else *scale = bytes(from + g * 32);
}

/* Q4_K: the factors for the offsets of groups g and g + 1, side by side in 16 bits. */
INLINE __m512i tile_pairs(const uint8_t *from, int64_t g) {
    const __m512i even = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(from + g * 32 + 16)));
    const __m512i odd = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(from + g * 32 + 48)));
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

/* Q4_K: the scale (which = 0) or the offset (1) of the 256 weights that group g belongs to. */
INLINE __m512 tile_super(const uint8_t *from, int64_t groups, int64_t g, int which) {
    return halves(from + 32 * groups + g / SUPER * 64 + 32 * which);
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
            const uint8_t *tile = data + t * tile_bytes(kind, inputs), *from = tile + number_bytes(kind, inputs);
            __m512 scale, offset = _mm512_setzero_ps();
            tile_scales(kind, from, g, &scale, &offset);
            _mm512_storeu_ps(unpacked.scales[g - first][t], scale);
            if (kind == Q4_1) _mm512_storeu_ps(unpacked.offsets[g - first][t], offset);
            if (kind == Q4_K && g % 2 == 0)
                _mm512_storeu_si512(unpacked.pairs[(g - first) / 2][t], tile_pairs(from, g));
            if (kind == Q4_K && g % SUPER == 0)
                for (int n = 0; n < 2; n++)
                    _mm512_storeu_ps(unpacked.supers[(g - first) / SUPER][n][t], tile_super(from, groups, g, n));
            if (kind == Q8_0) continue; /* its numbers are bytes already */
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                _mm512_storeu_si512(unpacked.numbers[g - first][j][t], tile_weights(kind, tile, g, j));
        }
    return &unpacked;
}

/* Q4_K: add what 256 weights, from group g on, contribute to the sums `to` (rows, stride) of a tile. parts (rows, WIDE):
 * their products with the scales' factors. Offsets are multiplied in 16 bits, two groups at a time. from: the tile's
 * scales. unpacked: groups from `first` on, of which tile t is this one; or null. */
INLINE void add_super(const int rows, const uint8_t *from, const Unpacked *unpacked, int t, int64_t groups,
                      const Activations *x, int64_t row, int64_t first, int64_t g, const __m512 *parts, float *to,
                      int64_t stride) {
    __m512i pairs[SUPER / 2];
    __m512 whole[2];
    for (int n = 0; n < SUPER / 2; n++)
        pairs[n] = unpacked ? _mm512_loadu_si512(unpacked->pairs[(g - first) / 2 + n][t]) : tile_pairs(from, g + 2 * n);
    for (int n = 0; n < 2; n++)
        whole[n] = unpacked ? _mm512_loadu_ps(unpacked->supers[(g - first) / SUPER][n][t])
                            : tile_super(from, groups, g, n);
    for (int r = 0; r < rows; r++) {
        const int64_t at = (row + r) * groups + g;
        __m512i offset = _mm512_setzero_si512();
        for (int n = 0; n < SUPER / 2; n++) {
            int32_t two;
            memcpy(&two, x->sums + at + 2 * n, 4);
            offset = _mm512_dpwssd_epi32(offset, pairs[n], _mm512_set1_epi32(two));
        }
        __m512 part = _mm512_mul_ps(whole[0], parts[r * WIDE]);
        part = _mm512_fnmadd_ps(whole[1], _mm512_cvtepi32_ps(offset), part);
        part = _mm512_fmadd_ps(part, _mm512_set1_ps(x->scales[at]), _mm512_loadu_ps(to + r * stride));
        _mm512_storeu_ps(to + r * stride, part);
    }
}

/* unpacked: of these groups and tiles, or null. */
INLINE void multiply(const int kind, const int rows, const int tiles, const uint8_t *data, const Unpacked *unpacked,
                     int64_t inputs, const Activations *x, int64_t row, int64_t first, int64_t last, float *sums) {
    const int64_t groups = inputs / GROUP, each = tile_bytes(kind, inputs);
    const uint8_t *scales = data + number_bytes(kind, inputs);
    __m512 f[ROWS][WIDE]; /* the sums; in Q4_K what the 256 weights at hand add to them, before their scales */
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++)
            f[r][t] = kind == Q4_K ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r * tiles + t) * TILE);
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
                if (kind == Q4_1) offset = _mm512_loadu_ps(unpacked->offsets[g - first][t]);
            } else tile_scales(kind, scales + t * each, g, &scale, &offset);
            for (int r = 0; r < rows; r++) {
                __m512 part = _mm512_cvtepi32_ps(dots[r][t]);
                if (kind == Q4_K) {
                    f[r][t] = _mm512_fmadd_ps(part, scale, f[r][t]);
                    continue;
                }
                part = _mm512_mul_ps(part, scale);
                if (kind == Q4_1)
                    part = _mm512_fmadd_ps(offset, _mm512_set1_ps((float)x->sums[(row + r) * groups + g]), part);
                f[r][t] = _mm512_fmadd_ps(part, _mm512_set1_ps(x->scales[(row + r) * groups + g]), f[r][t]);
            }
        }
        if (kind == Q4_K && g % SUPER == SUPER - 1)
            for (int t = 0; t < tiles; t++) {
                add_super(rows, scales + t * each, unpacked, t, groups, x, row, first, g - SUPER + 1, &f[0][t],
                          sums + t * TILE, tiles * TILE);
                for (int r = 0; r < rows; r++) f[r][t] = _mm512_setzero_ps();
            }
    }
    for (int r = 0; r < rows && kind != Q4_K; r++)
        for (int t = 0; t < tiles; t++) _mm512_storeu_ps(sums + (r * tiles + t) * TILE, f[r][t]);
}
