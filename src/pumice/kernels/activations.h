/* Round activations to 8 bits. Every integer product multiplies with these.
 *
 * Each 32 of a row have a scale. Before a matrix in Q4_K, whose own scales are for 256 weights, each 256 have one, as in
 * llama.cpp. The largest of them becomes 127. Prompts and answers get the same numbers, on every processor.
 */
#ifndef PUMICE_ACTIVATIONS_H
#define PUMICE_ACTIVATIONS_H
#include "packed.h"

typedef struct {
    int8_t *numbers; /* (rows, inputs) */
    float *scales;   /* (rows, inputs / 32), of each group, also where groups share one */
    int16_t *sums;   /* (rows, inputs / 32), of a group's numbers */
    int64_t share;   /* groups that share a scale: 1, or SUPER */
} Activations;

#define SMALLEST 1e-30f /* if the largest is smaller, the group becomes zeros: 127 / largest would overflow */

/* Whole floats, because floats follow in the same memory. */
static inline int64_t activation_bytes(int64_t rows, int64_t inputs) {
    const int64_t size = sizeof(float), bytes = rows * (inputs + inputs / GROUP * (size + (int64_t)sizeof(int16_t)));
    return (bytes + size - 1) / size * size;
}

/* How many groups of a matrix's input share a scale. */
static inline int64_t share_of(const Packed *matrix) { return matrix->kind == Q4_K ? SUPER : 1; }

/* Place the arrays in `memory` of `activation_bytes`. */
static inline Activations activations_in(void *memory, int64_t rows, int64_t inputs, int64_t share) {
    const int64_t groups = rows * inputs / GROUP;
    float *scales = memory;
    int16_t *sums = (int16_t *)(scales + groups);
    return (Activations){(int8_t *)(sums + groups), scales, sums, share};
}

/* Round `groups` groups, which begin at x, to numbers [32 begin, ...) of row `row`. Both are multiples of the share. */
static inline void quantize_groups(const float *x, int64_t inputs, int64_t row, int64_t begin, int64_t groups,
                                   const Activations *to) {
    int8_t *numbers = to->numbers + row * inputs + begin * GROUP;
    float *scales = to->scales + row * inputs / GROUP + begin;
    int16_t *sums = to->sums + row * inputs / GROUP + begin;
    for (int64_t first = 0; first < groups; first += to->share) {
        const int64_t last = first + to->share;
        int32_t most = 0;
        for (int64_t g = first; g < last; g++) {
            int32_t bits[GROUP]; /* those of positive floats compare as integers, which compilers vectorise */
            memcpy(bits, x + g * GROUP, sizeof bits);
            for (int i = 0; i < GROUP; i++) {
                const int32_t size = bits[i] & 0x7fffffff;
                most = size > most ? size : most;
            }
        }
        float largest;
        memcpy(&largest, &most, 4);
        const float factor = largest < SMALLEST ? 0 : 127 / largest;
        for (int64_t g = first; g < last; g++) {
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) {
                const int32_t number = (int32_t)rintf(x[g * GROUP + i] * factor);
                numbers[g * GROUP + i] = (int8_t)number;
                sum += number;
            }
            scales[g] = largest < SMALLEST ? 0 : largest / 127;
            sums[g] = (int16_t)sum;
        }
    }
}

static inline void quantize_row(const float *x, int64_t inputs, int64_t row, const Activations *to) {
    quantize_groups(x, inputs, row, 0, inputs / GROUP, to);
}
#endif
