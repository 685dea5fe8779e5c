/* Attention of a vision transformer: each patch of a tile sees all patches of its tile.
 *
 * Products are of bfloat16 where the processor multiplies it, two numbers at a time, and of fp32 elsewhere. Sums and the
 * softmax are fp32. A query's sums have a fixed order, whatever queries and tiles stand beside it.
 *
 * Shapes: B tiles, T patches of a tile, H heads, d head width, d' = d rounded up to LANES, T' = T rounded up to PANEL.
 */
#include "compiler.h"
#include "vectors.h"
#include <stdlib.h>

#define ROWS 6
#define WIDE (LANES == 16 ? 4 : 2) /* vectors of a panel: ROWS * WIDE sums fill the registers */
#define PANEL (WIDE * LANES)

#if defined(__AVX512BF16__) && !defined(PUMICE_PLAIN)
#define STEP 2 /* numbers that one instruction multiplies and adds to each sum */
typedef uint16_t number;
typedef __m512i numbers;
INLINE void narrow(const float *from, number *to) { /* LANES numbers */
    _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}
INLINE numbers load_numbers(const number *from) { return _mm512_loadu_si512(from); }
INLINE numbers repeat(const number *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return _mm512_set1_epi32(pair);
}
INLINE vector add_product(vector sum, numbers x, numbers y) {
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
#define STEP 1
typedef float number;
typedef vector numbers;
INLINE void narrow(const float *from, number *to) { memcpy(to, from, sizeof(vector)); }
INLINE numbers load_numbers(const number *from) { return load(from); }
INLINE numbers repeat(const number *from) { return *from - (vector){0}; }
INLINE vector add_product(vector sum, numbers x, numbers y) { return sum + x * y; }
#endif

/* Multiply x (rows, stride), of which a row has `steps` STEP numbers, by a panel (steps, width, STEP) of which `wide` vectors
 * are taken: sums (rows, wide). */
INLINE void multiply(const int rows, const int wide, const number *x, int64_t stride, const number *panel, int64_t width,
                     int64_t steps, vector sums[ROWS][WIDE]) {
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) sums[r][w] = (vector){0};
    for (int64_t i = 0; i < steps; i++) {
        numbers columns[WIDE];
        for (int w = 0; w < wide; w++) columns[w] = load_numbers(panel + (i * width + w * LANES) * STEP);
        for (int r = 0; r < rows; r++) {
            const numbers each = repeat(x + r * stride + i * STEP);
            for (int w = 0; w < wide; w++) sums[r][w] = add_product(sums[r][w], each, columns[w]);
        }
    }
}

typedef struct {
    const float *q, *k, *v; /* (B, T, H, d) */
    float *y;               /* (B, T, H, d) */
    int64_t patches, heads, size;
    int64_t padded, longest; /* d', T' */
} Task;

/* What a thread needs for a head. */
typedef struct {
    number *keys;    /* (T' / PANEL, d' / STEP, PANEL, STEP) */
    number *values;  /* (T' / STEP, d', STEP) */
    number *queries; /* (ROWS, d') */
    number *weights; /* (ROWS, T') */
    float *scores;   /* (ROWS, T') */
} Head;

static int64_t head_bytes(const Task *task) {
    const int64_t count = 2 * task->longest * task->padded + ROWS * (task->padded + task->longest);
    return count * (int64_t)sizeof(number) + ROWS * task->longest * (int64_t)sizeof(float);
}

static Head head_in(float *memory, const Task *task) {
    number *keys = (number *)(memory + ROWS * task->longest), *values = keys + task->longest * task->padded;
    number *queries = values + task->longest * task->padded;
    return (Head){keys, values, queries, queries + ROWS * task->padded, memory};
}

#define SOON 8 /* rows: fetched so far ahead, as each lies in other memory than the one before */

INLINE void fetch(const float *row, int64_t size) {
    for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(row + i);
}

/* A padded row (d') of numbers, from a head's vector (d). */
INLINE void make_row(const Task *task, const float *from, float factor, number *to) {
    int64_t i = 0;
    for (; i + LANES <= task->size; i += LANES) {
        const vector part = load(from + i) * factor;
        narrow((const float *)&part, to + i);
    }
    if (i == task->padded) return;
    float part[LANES] = {0};
    for (int64_t n = 0; i + n < task->size; n++) part[n] = from[i + n] * factor;
    narrow(part, to + i);
}

/* Lay out the keys and values of a head. What pads them is zeros. */
static void lay_out(const Task *task, const float *keys, const float *values, const Head *head) {
    const int64_t stride = task->heads * task->size, padded = task->padded;
    memset(head->keys, 0, task->longest * padded * sizeof(number));
    for (int64_t t = 0; t < task->patches; t += STEP) {
        number *rows = head->queries, *value = head->values + t * padded;
        for (int64_t n = SOON; n < SOON + STEP; n++) {
            fetch(keys + (t + n) * stride, task->size);
            fetch(values + (t + n) * stride, task->size);
        }
        for (int64_t n = 0; n < STEP && t + n < task->patches; n++) {
            number *key = head->keys + ((t + n) / PANEL * padded * PANEL) + (t + n) % PANEL * STEP;
            make_row(task, keys + (t + n) * stride, 1, rows);
            for (int64_t i = 0; i < padded; i += STEP) memcpy(key + i * PANEL, rows + i, STEP * sizeof *rows);
        }
        for (int64_t n = 0; n < STEP; n++)
            if (t + n < task->patches) make_row(task, values + (t + n) * stride, 1, rows + n * padded);
            else memset(rows + n * padded, 0, padded * sizeof *rows);
        for (int64_t i = 0; i < padded; i++)
            for (int64_t n = 0; n < STEP; n++) value[i * STEP + n] = rows[n * padded + i];
    }
}

/* `rows` queries of a head. q, y: of its first one. */
INLINE void attend_rows(const int rows, const Task *task, const float *q, float *y, const Head *head) {
    const int64_t stride = task->heads * task->size, padded = task->padded, count = task->patches;
    const float scale = 1.44269504f / sqrtf(task->size);
    vector sums[ROWS][WIDE];

    /* 1. Scores. */
    for (int r = 0; r < rows; r++) {
        make_row(task, q + r * stride, scale, head->queries + r * padded);
        fetch(q + (r + ROWS) * stride, task->size);
    }
    for (int64_t t = 0; t < count; t += PANEL) {
        multiply(rows, WIDE, head->queries, padded, head->keys + t * padded, PANEL, padded / STEP, sums);
        for (int r = 0; r < rows; r++) memcpy(head->scores + r * task->longest + t, sums[r], sizeof sums[r]);
    }

    /* 2. Softmax, of base 2: queries are multiplied by log2(e). */
    float totals[ROWS];
    for (int r = 0; r < rows; r++) {
        float *row = head->scores + r * task->longest, most = -INFINITY;
        number *weights = head->weights + r * task->longest;
#pragma omp simd reduction(max : most)
        for (int64_t n = 0; n < count; n++) most = row[n] > most ? row[n] : most;
        for (int64_t n = count; n % LANES; n++) row[n] = -INFINITY;
        vector sum = {0};
        for (int64_t n = 0; n < count; n += LANES) {
            float part[LANES];
#pragma omp simd
            for (int64_t i = 0; i < LANES; i++) part[i] = exp2_negative(row[n + i] - most);
            sum += load(part);
            narrow(part, weights + n);
        }
        totals[r] = total(sum);
    }

    /* 3. Values. */
    const int64_t steps = (count + STEP - 1) / STEP;
    for (int64_t i = 0; i < padded; i += PANEL) {
        const int64_t left = task->size - i < PANEL ? task->size - i : PANEL;
        if (padded - i >= PANEL)
            multiply(rows, WIDE, head->weights, task->longest, head->values + i * STEP, padded, steps, sums);
        else
            for (int64_t w = 0; w < (padded - i) / LANES; w++) {
                vector column[ROWS][WIDE];
                multiply(rows, 1, head->weights, task->longest, head->values + (i + w * LANES) * STEP, padded, steps,
                         column);
                for (int r = 0; r < rows; r++) sums[r][w] = column[r][0];
            }
        for (int r = 0; r < rows; r++) {
            float mixed[PANEL];
            for (int w = 0; w * LANES < left; w++) {
                const vector part = sums[r][w] / totals[r];
                memcpy(mixed + w * LANES, &part, sizeof part);
            }
            memcpy(y + r * stride + i, mixed, left * sizeof *mixed);
        }
    }
}

/* y (B, T, H, d) = attention of q, k and v of the same shape. Return 0, or 1 if memory cannot be allocated. */
int pumice_attend_tiles(const float *q, const float *k, const float *v, float *y, int64_t tiles, int64_t patches,
                        int64_t heads, int64_t size, int threads) {
    const int64_t padded = (size + LANES - 1) / LANES * LANES, longest = (patches + PANEL - 1) / PANEL * PANEL;
    const Task task = {q, k, v, y, patches, heads, size, padded, longest};
    const int64_t each = (head_bytes(&task) + 63) / 64 * 64, stride = heads * size;
    char *memory = malloc(threads * each);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < tiles * heads; item++) {
        const Head head = head_in((float *)(memory + omp_get_thread_num() * each), &task);
        const int64_t from = item / heads * patches * stride + item % heads * size;
        lay_out(&task, k + from, v + from, &head);
        int64_t row = 0;
        for (; row + ROWS <= patches; row += ROWS)
            attend_rows(ROWS, &task, q + from + row * stride, y + from + row * stride, &head);
        for (; row < patches; row++)
            attend_rows(1, &task, q + from + row * stride, y + from + row * stride, &head);
    }
    free(memory);
    return 0;
}
