/* Quantise weights to a packed matrix, on all cores.
 *
 * Q8_0: the largest of 32 weights becomes 127. Q4_1 and Q4_K: find a scale and an offset of 32 weights with a small
 * squared error: try several scales, and improve each by least squares (as ggml's make_qkx2_quants, without weights).
 */
#include "packed.h"

#define TRIED 9          /* scales */
#define EXTRA_STEPS 0.2f /* a group's range is divided into 15 steps, and 15 plus or minus multiples of this */

enum { FP32, FP16, BF16 };

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Read `count` weights, from the `first` on, as floats. Return whether all are finite. */
static int weights_of(int type, const void *weights, int64_t first, int count, float *to) {
    uint32_t most = 0;
    if (type == FP32) memcpy(to, (const float *)weights + first, 4 * count);
    else if (type == FP16)
        for (int i = 0; i < count; i++) to[i] = from_half(((const uint16_t *)weights)[first + i]);
    else
        for (int i = 0; i < count; i++) to[i] = from_bf16(((const uint16_t *)weights)[first + i]);
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, to + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000;
}

static inline float at_most(float value, float most) { return value > most ? most : value; }
static inline float at_least(float value, float least) { return value < least ? least : value; }

/* Round the weights x to numbers from 0 to 15, for a scale and an offset. */
static inline void numbers_of(const float *x, float scale, float offset, float *numbers) {
    float factor = scale > 0 ? 1 / scale : 0;
    if (!(factor <= 3e38f)) factor = 0;
#pragma omp simd
    for (int i = 0; i < GROUP; i++) numbers[i] = at_most(at_least(rintf((x[i] - offset) * factor), 0), 15);
}

/* Find scale and offset of a group. positive_offset: whether the offset may be above zero, which Q4_K cannot hold. */
static void fit(const float *x, int positive_offset, float *scale, float *offset) {
    float least = x[0], most = x[0], sum = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int i = 0; i < GROUP; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < GROUP; i++) sum += x[i];
    if (!positive_offset && least > 0) least = 0;
    *scale = (most - least) / 15;
    *offset = least;
    if (!(*scale > 1e-30f)) {
        *scale = 0;
        return;
    }
    float best = INFINITY;
    for (int n = 0; n < TRIED; n++) {
        float numbers[GROUP], n1 = 0, n2 = 0, nx = 0;
        float step = n ? (most - least) / (15 + ((n & 1) ? 1 : -1) * EXTRA_STEPS * ((n + 1) / 2)) : *scale;
        numbers_of(x, step, least, numbers);
#pragma omp simd reduction(+ : n1, n2, nx)
        for (int i = 0; i < GROUP; i++) {
            n1 += numbers[i];
            n2 += numbers[i] * numbers[i];
            nx += numbers[i] * x[i];
        }
        float spread = GROUP * n2 - n1 * n1;
        if (!(spread > 0)) continue;
        float a = (GROUP * nx - n1 * sum) / spread, b = (n2 * sum - n1 * nx) / spread;
        if (!positive_offset && b > 0) {
            b = 0;
            a = nx / n2;
        }
        if (!(a > 0)) continue;
        float error = 0;
#pragma omp simd reduction(+ : error)
        for (int i = 0; i < GROUP; i++) {
            float away = x[i] - a * numbers[i] - b;
            error += away * away;
        }
        if (error < best) {
            best = error;
            *scale = a;
            *offset = b;
        }
    }
}

/* Lay out a group of a row: four bytes side by side, and the next four a tile's width further. */
static inline void put_bytes(const uint8_t *bytes, int count, uint8_t *to, int row) {
    for (int i = 0; i < count; i += 4) memcpy(to + i * TILE + 4 * row, bytes + i, 4);
}

static void put_q4(const float *numbers, uint8_t *to, int row) {
    uint8_t bytes[GROUP / 2];
    for (int i = 0; i < GROUP / 2; i++)
        bytes[i] = (uint8_t)((int32_t)numbers[i] | (int32_t)numbers[i + GROUP / 2] << 4);
    put_bytes(bytes, GROUP / 2, to, row);
}

static void quantize_q8_0(const float *x, uint8_t *to, uint16_t *scale, int row) {
    uint8_t bytes[GROUP];
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < GROUP; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    *scale = to_half(most / 127);
    float factor = from_half(*scale) > 0 ? 1 / from_half(*scale) : 0;
#pragma omp simd
    for (int i = 0; i < GROUP; i++)
        bytes[i] = (uint8_t)(128 + (int32_t)at_most(at_least(rintf(x[i] * factor), -127), 127));
    put_bytes(bytes, GROUP, to, row);
}

static void quantize_q4_1(const float *x, uint8_t *to, uint16_t *scale, uint16_t *offset, int row) {
    float a, b, numbers[GROUP];
    fit(x, 1, &a, &b);
    *scale = to_half(a);
    *offset = to_half(b);
    numbers_of(x, from_half(*scale), from_half(*offset), numbers);
    put_q4(numbers, to, row);
}

/* Return the squared error of a group with this scale and offset. */
static float error_of(const float *x, float scale, float offset) {
    float numbers[GROUP], error = 0;
    numbers_of(x, scale, offset, numbers);
#pragma omp simd reduction(+ : error)
    for (int i = 0; i < GROUP; i++) {
        float away = x[i] - scale * numbers[i] - offset;
        error += away * away;
    }
    return error;
}

/* Quantise 256 weights to Q4_K: scales and offsets of 8 groups as factors of 6 bits. */
static void quantize_q4_k(const float *x, uint8_t *to, uint8_t *factors, uint16_t *halves, int row) {
    float scale[SUPER], offset[SUPER], numbers[GROUP], most_scale = 0, most_offset = 0;
    for (int g = 0; g < SUPER; g++) {
        fit(x + g * GROUP, 0, scale + g, offset + g);
        most_scale = at_least(most_scale, scale[g]);
        most_offset = at_least(most_offset, -offset[g]);
    }
    halves[row] = to_half(most_scale / 63);
    halves[TILE + row] = to_half(most_offset / 63);
    const float d = from_half(halves[row]), m = from_half(halves[TILE + row]);
    for (int g = 0; g < SUPER; g++) {
        const float *group = x + g * GROUP;
        int s = d > 0 ? (int)at_most(rintf(scale[g] / d), 63) : 0, o = m > 0 ? (int)at_most(rintf(-offset[g] / m), 63) : 0;
        float best = error_of(group, d * s, -m * o);
        const int s0 = s, o0 = o;
        for (int near = 0; near < 9; near++) { /* rounding moved scale and offset: neighbours may fit better */
            int a = s0 + near % 3 - 1, b = o0 + near / 3 - 1;
            if (near == 4 || a < 0 || b < 0 || a > 63 || b > 63) continue;
            float error = error_of(group, d * a, -m * b);
            if (error < best) {
                best = error;
                s = a;
                o = b;
            }
        }
        factors[2 * g * TILE + row] = (uint8_t)s;
        factors[(2 * g + 1) * TILE + row] = (uint8_t)o;
        numbers_of(group, d * s, -m * o, numbers);
        put_q4(numbers, to + g * TILE * GROUP / 2, row);
    }
}

/* Quantise one row of a tile. Return whether its weights are finite. */
static int pack_row(int kind, int type, const void *weights, int64_t from, int64_t inputs, uint8_t *tile, int row) {
    const int64_t groups = inputs / GROUP;
    uint8_t *scales = tile + number_bytes(kind, inputs);
    uint16_t *halves = (uint16_t *)scales;
    float x[SUPER * GROUP];
    if (kind == Q4_K) {
        halves = (uint16_t *)(scales + 2 * TILE * groups);
        for (int64_t g = 0; g < groups; g += SUPER) {
            if (!weights_of(type, weights, from + g * GROUP, SUPER * GROUP, x)) return 0;
            quantize_q4_k(x, tile + g * TILE * GROUP / 2, scales + 2 * g * TILE, halves + g / SUPER * 2 * TILE, row);
        }
        return 1;
    }
    for (int64_t g = 0; g < groups; g++) {
        if (!weights_of(type, weights, from + g * GROUP, GROUP, x)) return 0;
        if (kind == Q8_0) quantize_q8_0(x, tile + g * TILE * GROUP, halves + g * TILE + row, row);
        else {
            uint16_t *both = halves + 2 * g * TILE + row;
            quantize_q4_1(x, tile + g * TILE * GROUP / 2, both, both + TILE, row);
        }
    }
    return 1;
}

/* data: filled with zeros by the caller. Return the first row with a weight that is not finite, or -1. */
int64_t pumice_quantize(int kind, int type, int64_t outputs, int64_t inputs, const void *weights, uint8_t *data,
                        int threads) {
    const int64_t each = tile_bytes(kind, inputs);
    int64_t bad_row = outputs;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(min : bad_row)
    for (int64_t row = 0; row < outputs; row += TILE)
        for (int64_t r = row; r < row + TILE && r < outputs; r++)
            if (!pack_row(kind, type, weights, r * inputs, inputs, data + row / TILE * each, (int)(r - row)) && r < bad_row)
                bad_row = r;
    return bad_row == outputs ? -1 : bad_row;
}
