/* Round activations to 8 bits, with a scale for each 32 of a row. Every integer product multiplies with these.
 *
 * The largest of a group becomes 127. Prompts and answers get the same numbers, on every processor.
 */
#ifndef PUMICE_ACTIVATIONS_H
#define PUMICE_ACTIVATIONS_H
#include "packed.h"

typedef struct {
    int8_t *numbers; /* (rows, inputs) */
    float *scales;   /* (rows, inputs / 32) */
    int32_t *sums;   /* (rows, inputs / 32), of a group's numbers */
} Activations;

#define SMALLEST 1e-30f /* if the largest is smaller, the group becomes zeros: 127 / largest would overflow */

static inline int64_t activation_bytes(int64_t rows, int64_t inputs) {
    return rows * (inputs + inputs / GROUP * 8);
}

/* Place the arrays in `memory` of `activation_bytes`. */
static inline Activations activations_in(void *memory, int64_t rows, int64_t inputs) {
    int64_t groups = rows * inputs / GROUP;
    float *scales = memory;
    return (Activations){(int8_t *)(scales + 2 * groups), scales, (int32_t *)(scales + groups)};
}

/* Round `groups` groups of a row, which begin at x, to numbers [32 first, ...) of row `row`. */
static inline void quantize_groups(const float *x, int64_t inputs, int64_t row, int64_t first, int64_t groups,
                                   const Activations *to) {
    int8_t *numbers = to->numbers + row * inputs + first * GROUP;
    float *scales = to->scales + row * inputs / GROUP + first;
    int32_t *sums = to->sums + row * inputs / GROUP + first;
    for (int64_t g = 0; g < groups; g++, x += GROUP, numbers += GROUP) {
        int32_t bits[GROUP], most = 0, sum = 0;
        memcpy(bits, x, sizeof bits); /* the bits of positive floats compare as integers, which compilers vectorise */
        for (int i = 0; i < GROUP; i++) {
            int32_t size = bits[i] & 0x7fffffff;
            most = size > most ? size : most;
        }
        float largest;
        memcpy(&largest, &most, 4);
        float factor = largest < SMALLEST ? 0 : 127 / largest;
        for (int i = 0; i < GROUP; i++) {
            int32_t number = (int32_t)rintf(x[i] * factor);
            numbers[i] = (int8_t)number;
            sum += number;
        }
        scales[g] = largest < SMALLEST ? 0 : largest / 127;
        sums[g] = sum;
    }
}

static inline void quantize_row(const float *x, int64_t inputs, int64_t row, const Activations *to) {
    quantize_groups(x, inputs, row, 0, inputs / GROUP, to);
}
#endif
