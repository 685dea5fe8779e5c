/* Multiply activations by a packed matrix, in integers, with the best kernel for the processor.
 *
 * The sum behind each result has a fixed order. It does not depend on the other rows of the call, on threads or on
 * tiles. So a token gets the same numbers in a prompt and in an answer.
 */
#ifndef PUMICE_PRODUCT_H
#define PUMICE_PRODUCT_H
#include "activations.h"

#define AHEAD 4096 /* bytes: with one row, prefetch weights so far ahead, earlier than the processor's own guess */
#define LINE 64    /* bytes of a cache line */
#define SPAN 128   /* groups to multiply before the next rows, so that the tiles' bytes stay in the CPU's cache */

#if defined(PUMICE_PLAIN)
#define KERNEL "plain C"
#include "product_plain.h"
#elif defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define KERNEL "AVX-512 VNNI"
#include "product_vnni.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#ifdef __AVXVNNI__
#define KERNEL "AVX-VNNI"
#else
#define KERNEL "AVX2"
#endif
#include "product_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#define KERNEL "NEON dot product"
#include "product_neon.h"
#else
#define KERNEL "plain C"
#include "product_plain.h"
#endif

#ifndef UNPACK_ROWS /* a kernel that reads packed weights, whatever the number of rows */
typedef void Unpacked;
#define UNPACK_ROWS INT64_MAX
#define unpack(kind, data, inputs, first, last) ((void)(data), (void *)0)
#endif

/* Rows [row, row + rows) times tiles [tile, tile + tiles): y (rows, stride) = or += the product, and the bias. */
INLINE void block(const int kind, const int rows, const int tiles, const Packed *w, int64_t tile,
                  const Unpacked *unpacked, const Activations *x, int64_t row, int64_t first, int64_t last, float *y,
                  int64_t stride, int add) {
    float sums[ROWS * WIDE * TILE];
    const int64_t column = tile * TILE, left = w->outputs - column;
    const int64_t count = left < tiles * TILE ? left : tiles * TILE;
    memset(sums, 0, rows * tiles * TILE * sizeof *sums);
    if (first || add) /* y is read only where it is needed: it is seldom in the cache */
        for (int r = 0; r < rows; r++)
            for (int64_t c = 0; c < count; c++) sums[r * tiles * TILE + c] = y[(row + r) * stride + column + c];
    const uint8_t *data = w->data + tile * tile_bytes(kind, w->inputs);
    multiply(kind, rows, tiles, data, unpacked, w->inputs, x, row, first, last, sums);
    const float *bias = last * GROUP == w->inputs ? w->bias : 0;
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < count; c++)
            y[(row + r) * stride + column + c] = sums[r * tiles * TILE + c] + (bias ? bias[column + c] : 0);
}

/* All rows of some tiles. */
INLINE void panel(const int kind, const int tiles, const Packed *w, int64_t tile, const Activations *x, int64_t rows,
                  float *y, int64_t stride, int add) {
    const int64_t groups = w->inputs / GROUP;
    for (int64_t first = 0; first < groups; first += SPAN) {
        const int64_t last = first + SPAN < groups ? first + SPAN : groups;
        int64_t row = 0;
        if (tiles == WIDE && rows >= UNPACK_ROWS) {
            const uint8_t *data = w->data + tile * tile_bytes(kind, w->inputs);
            const Unpacked *unpacked = unpack(kind, data, w->inputs, first, last);
            for (; row + ROWS <= rows; row += ROWS)
                block(kind, ROWS, tiles, w, tile, unpacked, x, row, first, last, y, stride, add);
        }
        for (; row + ROWS <= rows; row += ROWS)
            block(kind, ROWS, tiles, w, tile, 0, x, row, first, last, y, stride, add);
        for (; row < rows; row++) block(kind, 1, tiles, w, tile, 0, x, row, first, last, y, stride, add);
    }
}

#define PANELS(KIND)                                                                                                   \
    case KIND:                                                                                                         \
        for (; tile + WIDE <= last; tile += WIDE) panel(KIND, WIDE, w, tile, x, rows, y, stride, add);                 \
        for (; tile < last; tile++) panel(KIND, 1, w, tile, x, rows, y, stride, add);                                  \
        break;

/* Tiles [tile, last) of all rows: y (rows, stride) = x (rows, inputs) times the matrix (outputs, inputs). */
static __attribute__((noinline)) void product(const Packed *w, int64_t tile, int64_t last, const Activations *x,
                                              int64_t rows, float *y, int64_t stride, int add) {
    switch (w->kind) { /* constants, so that each kind's code is its own */
        PANELS(Q8_0)
        PANELS(Q4_0)
        PANELS(Q4_1)
        PANELS(Q4_K)
    }
}

static inline int64_t tiles_of(const Packed *w) { return (w->outputs + TILE - 1) / TILE; }
#endif
