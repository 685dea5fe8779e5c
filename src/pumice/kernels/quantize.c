/* Quantise weights to a packed matrix, on all cores.
 *
 * Q8_0: the largest of 32 weights becomes 127. Q4_1 and Q4_K: find a scale and an offset of 32 weights with a small
 * squared error: try several scales, and improve each by least squares (as ggml's make_qkx2_quants, without weights).
 * The 16 rows of a tile are quantised together: a vector holds one weight of each, as the layout does.
 */
#include "packed.h"

#define TRIED 9          /* scales */
#define EXTRA_STEPS 0.2f /* a group's range is divided into 15 steps, and 15 plus or minus multiples of this */
#define PART 8           /* weights of a group that are written out in a loop over rows */

enum { FP32, FP16, BF16 };

typedef float Rows[TILE];         /* a number of each row */
typedef float Group[GROUP][TILE]; /* 32 weights of each row */

typedef struct { /* sums over a group's numbers n and its weights x minus an offset */
    Rows n, nn, nx;
} Sums;

/* Compilers vectorise a loop over rows only if no loop is inside. So a part of a group is unrolled there. */
#define EACH_ROW _Pragma("omp simd") for (int r = 0; r < TILE; r++)
#define EACH_PART for (int first = 0; first < GROUP; first += PART) EACH_ROW
#define OF_PART _Pragma("GCC unroll 8") for (int i = first; i < first + PART; i++)

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Read groups of one row, from the weight `from` on, as floats. Return whether all are finite and no larger than a
 * scale, which has 16 bits, can be. */
static int read_row(int type, const void *weights, int64_t from, int row, int groups, Group *to) {
    float x[SUPER * GROUP];
    const int count = groups * GROUP;
    uint32_t most = 0;
    if (type == FP32) memcpy(x, (const float *)weights + from, 4 * count);
    else if (type == FP16)
        for (int i = 0; i < count; i++) x[i] = from_half(((const uint16_t *)weights)[from + i]);
    else
        for (int i = 0; i < count; i++) x[i] = from_bf16(((const uint16_t *)weights)[from + i]);
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float *column = &to[0][0][row];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) column[i * TILE] = x[i];
    return most <= 0x477fe000; /* 65504 */
}

static inline float at_most(float value, float most) { return value > most ? most : value; }
static inline float at_least(float value, float least) { return value < least ? least : value; }

/* Round x to the nearest integer from `least` to `most`, ties to even. After adding 1.5 * 2^23, a float's last bits are
 * the integer, and floats compare as their bits do. Compilers have one instruction for the smaller of two integers, but
 * not of two floats, which may be NaN. */
#define MAGIC 12582912.0f
#define MAGIC_BITS 0x4b400000
static inline int32_t nearest(float x, int32_t least, int32_t most) {
    int32_t bits;
    x += MAGIC;
    memcpy(&bits, &x, 4);
    bits = bits > MAGIC_BITS + least ? bits : MAGIC_BITS + least;
    bits = bits < MAGIC_BITS + most ? bits : MAGIC_BITS + most;
    return bits - MAGIC_BITS;
}

static inline float reciprocal(float scale) { /* 0 if there is none */
    float factor = scale > 0 ? 1 / scale : 0;
    return factor <= 3e38f ? factor : 0;
}

/* Round a group to numbers from 0 to 15, for a scale and an offset, and add them up. */
static void sum_up(const Group x, const Rows scale, const Rows offset, Sums *to) {
    Rows factor;
    memset(to, 0, sizeof *to);
    EACH_ROW factor[r] = reciprocal(scale[r]);
    EACH_PART {
        float n = to->n[r], nn = to->nn[r], nx = to->nx[r];
        OF_PART {
            float away = x[i][r] - offset[r], number = (float)nearest(away * factor[r], 0, 15);
            n += number;
            nn += number * number;
            nx += number * away;
        }
        to->n[r] = n;
        to->nn[r] = nn;
        to->nx[r] = nx;
    }
}

/* Find scale and offset of a group. positive_offset: whether the offset may be above zero, which Q4_K cannot hold. */
static void fit(const Group x, int positive_offset, Rows scale, Rows offset) {
    Rows low, range, total, square, best;

    /* 1. Find the range. From here on weights count from its lower end. */
    memcpy(low, x[0], sizeof low);
    memcpy(range, x[0], sizeof range);
    EACH_PART {
        float least = low[r], most = range[r];
        OF_PART {
            least = at_most(x[i][r], least);
            most = at_least(x[i][r], most);
        }
        low[r] = least;
        range[r] = most;
    }
    EACH_ROW {
        low[r] = positive_offset ? low[r] : at_most(low[r], 0);
        range[r] -= low[r];
        scale[r] = range[r] / 15;
        offset[r] = low[r];
        best[r] = INFINITY;
        total[r] = square[r] = 0;
    }
    EACH_PART {
        float s = total[r], ss = square[r];
        OF_PART {
            float away = x[i][r] - low[r];
            s += away;
            ss += away * away;
        }
        total[r] = s;
        square[r] = ss;
    }

    /* 2. Each scale gives numbers. Least squares gives the best line through these, and its error. Keep the best. */
    for (int tried = 0; tried < TRIED; tried++) {
        const float steps = 15 + ((tried & 1) ? 1 : -1) * EXTRA_STEPS * ((tried + 1) / 2);
        Rows step;
        Sums sums;
        EACH_ROW step[r] = range[r] / steps;
        sum_up(x, step, low, &sums);
        EACH_ROW {
            float n = sums.n[r], nn = sums.nn[r], nx = sums.nx[r], s = total[r], spread = GROUP * nn - n * n;
            float a = (GROUP * nx - n * s) / spread, b = (nn * s - n * nx) / spread;
            float a0 = (nx + low[r] * n) / nn; /* if the offset has to be zero */
            int zero = !positive_offset & (b + low[r] > 0);
            a = zero ? a0 : a;
            b = zero ? -low[r] : b;
            float error = square[r] - 2 * (a * nx + b * s) + a * a * nn + 2 * a * b * n + GROUP * b * b;
            int better = (spread > 0) & (a > 0) & (error < best[r]);
            best[r] = better ? error : best[r];
            scale[r] = better ? a : scale[r];
            offset[r] = better ? b + low[r] : offset[r];
        }
    }
}

/* Round a group to numbers from 0 to 15 and lay them out, two in a byte. Rows from `rows` on become zeros. */
static void put_q4(const Group x, const Rows scale, const Rows offset, int rows, uint8_t *to) {
    for (int j = 0; j < GROUP / 8; j++) {
        uint32_t words[TILE];
        EACH_ROW {
            float factor = reciprocal(scale[r]);
            uint32_t word = 0;
            for (int b = 0; b < 4; b++) {
                uint32_t lower = (uint32_t)nearest((x[4 * j + b][r] - offset[r]) * factor, 0, 15);
                uint32_t upper = (uint32_t)nearest((x[4 * j + b + GROUP / 2][r] - offset[r]) * factor, 0, 15);
                word |= (lower | upper << 4) << 8 * b;
            }
            words[r] = r < rows ? word : 0;
        }
        memcpy(to + j * sizeof words, words, sizeof words);
    }
}

static void quantize_q8_0(const Group x, int rows, uint8_t *to, uint16_t *scales) {
    Rows factor;
    memset(factor, 0, sizeof factor);
    EACH_PART {
        float most = factor[r];
        OF_PART most = at_least(fabsf(x[i][r]), most);
        factor[r] = most;
    }
    for (int r = 0; r < rows; r++) {
        scales[r] = to_half(factor[r] / 127);
        factor[r] = reciprocal(from_half(scales[r]));
    }
    for (int j = 0; j < GROUP / 4; j++) {
        uint32_t words[TILE];
        EACH_ROW {
            uint32_t word = 0;
            for (int b = 0; b < 4; b++)
                word |= (uint32_t)(128 + nearest(x[4 * j + b][r] * factor[r], -127, 127)) << 8 * b;
            words[r] = r < rows ? word : 0;
        }
        memcpy(to + j * sizeof words, words, sizeof words);
    }
}

static void quantize_q4_1(const Group x, int rows, uint8_t *to, uint16_t *scales, uint16_t *offsets) {
    Rows scale, offset;
    fit(x, 1, scale, offset);
    for (int r = 0; r < rows; r++) {
        scale[r] = from_half(scales[r] = to_half(scale[r]));
        offset[r] = from_half(offsets[r] = to_half(offset[r]));
    }
    put_q4(x, scale, offset, rows, to);
}

/* Compute the squared error of a group with this scale and offset. */
static void error_of(const Group x, const Rows scale, const Rows offset, Rows error) {
    Rows factor;
    memset(error, 0, sizeof factor);
    EACH_ROW factor[r] = reciprocal(scale[r]);
    EACH_PART {
        float sum = error[r];
        OF_PART {
            float away = x[i][r] - offset[r], left = away - scale[r] * (float)nearest(away * factor[r], 0, 15);
            sum += left * left;
        }
        error[r] = sum;
    }
}

/* A group's scale is d s and its offset -m o. Rounding s and o moved both: take the neighbours that fit best. */
static void refine(const Group x, const Rows d, const Rows m, Rows s, Rows o) {
    Rows near_s, near_o, scale, offset, error, best, best_s, best_o;
    for (int near = 0; near < 9; near++) {
        EACH_ROW {
            near_s[r] = at_most(at_least(s[r] + near % 3 - 1, 0), 63);
            near_o[r] = at_most(at_least(o[r] + near / 3 - 1, 0), 63);
            scale[r] = d[r] * near_s[r];
            offset[r] = -m[r] * near_o[r];
        }
        error_of(x, scale, offset, error);
        EACH_ROW {
            int better = (near == 0) | (error[r] < best[r]);
            best[r] = better ? error[r] : best[r];
            best_s[r] = better ? near_s[r] : best_s[r];
            best_o[r] = better ? near_o[r] : best_o[r];
        }
    }
    memcpy(s, best_s, sizeof best_s);
    memcpy(o, best_o, sizeof best_o);
}

/* Quantise 256 weights of each row to Q4_K: scales and offsets of 8 groups as factors of 6 bits. */
static void quantize_q4_k(const Group *x, int rows, uint8_t *to, uint8_t *factors, uint16_t *halves) {
    Rows scale[SUPER], offset[SUPER], d, m;

    /* 1. Fit each group. The largest scale and the largest offset become 63. */
    memset(d, 0, sizeof d);
    memset(m, 0, sizeof m);
    for (int g = 0; g < SUPER; g++) {
        fit(x[g], 0, scale[g], offset[g]);
        EACH_ROW {
            d[r] = at_least(scale[g][r], d[r]);
            m[r] = at_least(-offset[g][r], m[r]);
        }
    }
    for (int r = 0; r < rows; r++) {
        d[r] = from_half(halves[r] = to_half(d[r] / 63));
        m[r] = from_half(halves[TILE + r] = to_half(m[r] / 63));
    }

    /* 2. Round scales and offsets to factors, and the weights by these. */
    for (int g = 0; g < SUPER; g++) {
        Rows s, o;
        EACH_ROW {
            s[r] = at_most(rintf(scale[g][r] * reciprocal(d[r])), 63);
            o[r] = at_most(rintf(-offset[g][r] * reciprocal(m[r])), 63);
        }
        refine(x[g], d, m, s, o);
        EACH_ROW {
            scale[g][r] = d[r] * s[r];
            offset[g][r] = -m[r] * o[r];
        }
        for (int r = 0; r < rows; r++) {
            factors[2 * g * TILE + r] = (uint8_t)s[r];
            factors[(2 * g + 1) * TILE + r] = (uint8_t)o[r];
        }
        put_q4(x[g], scale[g], offset[g], rows, to + g * TILE * GROUP / 2);
    }
}

/* Quantise a tile of `rows` rows, from the weight `from` on. Return its first row with a weight that is not finite, or
 * TILE. */
static int pack_tile(int kind, int type, const void *weights, int64_t from, int rows, int64_t inputs, uint8_t *tile) {
    const int64_t groups = inputs / GROUP, together = kind == Q4_K ? SUPER : 1;
    uint8_t *scales = tile + number_bytes(kind, inputs);
    int bad = TILE;
    Group x[SUPER] = {0};
    for (int64_t g = 0; g < groups; g += together) {
        for (int r = 0; r < rows; r++)
            if (!read_row(type, weights, from + r * inputs + g * GROUP, r, together, x) && r < bad) bad = r;
        if (bad < TILE) continue; /* from now on only look for the first bad row */
        uint16_t *halves = (uint16_t *)scales + g * TILE;
        if (kind == Q8_0) quantize_q8_0(x[0], rows, tile + g * TILE * GROUP, halves);
        else if (kind == Q4_1)
            quantize_q4_1(x[0], rows, tile + g * TILE * GROUP / 2, halves + g * TILE, halves + (g + 1) * TILE);
        else {
            halves = (uint16_t *)(scales + 2 * TILE * groups) + g / SUPER * 2 * TILE;
            quantize_q4_k(x, rows, tile + g * TILE * GROUP / 2, scales + 2 * g * TILE, halves);
        }
    }
    return bad;
}

/* data: filled with zeros by the caller. Return the first row with a weight that is not finite, or -1. */
int64_t pumice_quantize(int kind, int type, int64_t outputs, int64_t inputs, const void *weights, uint8_t *data,
                        int threads) {
    const int64_t each = tile_bytes(kind, inputs);
    int64_t bad_row = outputs;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(min : bad_row)
    for (int64_t row = 0; row < outputs; row += TILE) {
        const int rows = outputs - row < TILE ? (int)(outputs - row) : TILE;
        const int first = pack_tile(kind, type, weights, row * inputs, rows, inputs, data + row / TILE * each);
        if (first < TILE && row + first < bad_row) bad_row = row + first;
    }
    return bad_row == outputs ? -1 : bad_row;
}
