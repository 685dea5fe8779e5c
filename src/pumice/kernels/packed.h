/* The layout of packed (quantised) matrices, in memory and in files.
 *
 * The blocks are GGUF's. 32 weights of a row share a scale (Q8_0, Q4_0), or a scale and an offset (Q4_1). In Q4_K, 256
 * weights share both, and each 32 of them have factors of 6 bits for both. The layout loses nothing: it converts back
 * to the same blocks.
 *
 * A tile is 16 rows. Its bytes, for inputs of G = K / 32 groups:
 *
 *   numbers  Q8_0: [G][8][16][4], unsigned, 128 added: four weights of a row side by side, then the next row
 *            others: [G][4][16][4]; byte b of [g][j][row] holds weight 32 g + 4 j + b of the row in its lower half and
 *            weight 32 g + 16 + 4 j + b in its upper half
 *   scales   Q8_0, Q4_0: fp16 [G][16];  Q4_1: fp16 [G][scale, offset][16]
 *            Q4_K: bytes [G][scale, offset][16], then fp16 [G / 8][scale, offset][16]; offsets are subtracted
 *
 * A tile's bytes are padded to a multiple of 64. Rows beyond the last are zeros.
 */
#ifndef PUMICE_PACKED_H
#define PUMICE_PACKED_H
#include "compiler.h"
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(_OPENMP) && defined(__clang__)
#error "the OpenMP of clang is another library than the one that PyTorch has loaded"
#endif

#define GROUP 32
#define SUPER 8 /* groups of a block of Q4_K */
#define TILE 16

enum { Q8_0, Q4_0, Q4_1, Q4_K };

typedef struct {
    int64_t kind, outputs, inputs;
    const uint8_t *data;
    const float *bias; /* (outputs) or null */
} Packed;

static inline int64_t number_bytes(int64_t kind, int64_t inputs) { /* of a tile */
    return kind == Q8_0 ? TILE * inputs : TILE * inputs / 2;
}

static inline int64_t tile_bytes(int64_t kind, int64_t inputs) {
    int64_t groups = inputs / GROUP, scales = 2 * TILE * groups;
    if (kind == Q4_1) scales *= 2;
    if (kind == Q4_K) scales += 4 * TILE * groups / SUPER;
    return number_bytes(kind, inputs) + (scales + 63) / 64 * 64;
}

/* fp16 to fp32 and back, to the nearest, ties to even. */
static inline float from_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= sign | ((half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0);
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_half(float value) { /* value: finite; clamped to the largest fp16 */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    float size = fabsf(value);
    if (size >= 65504) return sign | 0x7bff;
    if (size < 0x1p-14f) return sign | (uint16_t)rintf(size * 0x1p24f);
    memcpy(&bits, &size, 4);
    bits += 0xfff + (bits >> 13 & 1);
    return sign | (uint16_t)((bits >> 13) - (112u << 10));
}
#endif
