/* Multiply a few rows by a matrix of fp32. */
#ifndef PUMICE_DENSE_H
#define PUMICE_DENSE_H
#include "vectors.h"

#define TILE 4     /* outputs that are computed together */
#define ROWS 6     /* rows that are computed together: they fill the 32 registers of AVX-512 */
#define AHEAD 4096 /* bytes: prefetch weights so far ahead; twice as fast as the processor's own guess */
#define LINE 64    /* bytes of a cache line */

typedef struct {
    int64_t outputs, inputs;
    const float *weight; /* (outputs, inputs) */
    const float *bias;   /* (outputs) or null */
} Dense;

/* y (rows, stride) = or += x (rows, inputs) times TILE outputs from `first` on; rows <= ROWS. */
static inline __attribute__((always_inline)) void dense_tile(const Dense *layer, int64_t first, const int rows,
                                                             const float *x, float *y, int64_t stride, int add) {
    const int64_t inputs = layer->inputs;
    const float *weight = layer->weight + first * inputs;
    vector sums[TILE][ROWS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < inputs; k += LANES) {
        vector w[TILE];
        for (uint64_t i = 0; i < sizeof *weight * TILE * LANES; i += LINE)
            __builtin_prefetch((const char *)(weight + TILE * k) + i + AHEAD);
        for (int i = 0; i < TILE; i++) w[i] = load(weight + i * inputs + k);
        for (int r = 0; r < rows; r++) {
            vector numbers = load(x + r * inputs + k);
            for (int i = 0; i < TILE; i++) sums[i][r] += w[i] * numbers;
        }
    }
    for (int i = 0; i < TILE; i++)
        for (int r = 0; r < rows; r++) {
            float *to = y + r * stride + first + i;
            *to = (add ? *to : 0) + total(sums[i][r]) + (layer->bias ? layer->bias[first + i] : 0);
        }
}

/* Tiles [tile, last) of all rows. The sums of a row have the same order whatever the other rows are: compilers contract
 * every `dense_tile` alike, which a test checks. */
static void dense_product(const Dense *layer, int64_t tile, int64_t last, const float *x, int64_t rows, float *y,
                          int64_t stride, int add) {
    for (int64_t n = tile * TILE; n < last * TILE; n += TILE)
        for (int64_t r = 0; r < rows; r += ROWS) {
            const float *from = x + r * layer->inputs;
            float *to = y + r * stride;
            switch (rows - r < ROWS ? rows - r : ROWS) { /* constants, so that sums stay in registers */
            case 1: dense_tile(layer, n, 1, from, to, stride, add); break;
            case 2: dense_tile(layer, n, 2, from, to, stride, add); break;
            case 3: dense_tile(layer, n, 3, from, to, stride, add); break;
            case 4: dense_tile(layer, n, 4, from, to, stride, add); break;
            case 5: dense_tile(layer, n, 5, from, to, stride, add); break;
            default: dense_tile(layer, n, ROWS, from, to, stride, add);
            }
        }
}
#endif
