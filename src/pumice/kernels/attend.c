/* Causal attention of many new tokens of one sequence, as a prompt has them, over a KV cache in bfloat16.
 *
 * Both products run in fp32, ROWS queries and PANEL keys (or values) at a time, so that sums stay in registers. Keys that
 * no query of a tile sees are skipped: half of the work of a prompt. A query's sums have a fixed order, whatever queries
 * stand beside it.
 *
 * Shapes: T new tokens, H heads, K key/value heads, G = H / K, C cells, d head width, S keys.
 */
#include "attend.h"
#include "compiler.h"
#include "vectors.h"
#include <stdlib.h>

#define ROWS 6
#define WIDE (LANES == 16 ? 4 : 2) /* vectors of a panel: ROWS * WIDE sums fill the registers */
#define PANEL (WIDE * LANES)
#define CHUNK 256 /* queries that are one thread's work */

static int64_t cell(const Task *task, int64_t token) {
    return task->table[token / task->block] * task->block + token % task->block;
}

/* Lay out keys [first, last) of a head as panels (d, PANEL) of fp32. Keys beyond the last are zeros. */
static void transpose_keys(const Task *task, const uint16_t *keys, int64_t first, int64_t last, float *panels) {
    for (int64_t t = first; t < last; t += PANEL, panels += task->size * PANEL)
        for (int64_t n = 0; n < PANEL; n++) {
            const uint16_t *key = t + n < last ? keys + cell(task, t + n) * task->size : 0;
            for (int64_t i = 0; i < task->size; i++) {
                uint32_t bits = key ? (uint32_t)key[i] << 16 : 0;
                memcpy(panels + i * PANEL + n, &bits, 4);
            }
        }
}

/* Scores of `rows` queries with a panel of keys. */
INLINE void score(const int rows, const float *q, int64_t q_token, const float *panel, int64_t size, float *scores,
                  int64_t stride) {
    vector sums[ROWS][WIDE];
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < size; i++)
        for (int w = 0; w < WIDE; w++) {
            const vector keys = load(panel + i * PANEL + w * LANES);
            for (int r = 0; r < rows; r++) sums[r][w] += q[r * q_token + i] * keys;
        }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < WIDE; w++) memcpy(scores + r * stride + w * LANES, &sums[r][w], sizeof(vector));
}

/* Add up values [first, last), numbers [from, from + wide LANES) of each, times the weights: y = sum / total. */
INLINE void mix(const int rows, const int wide, const Task *task, const uint16_t *values, const float *weights,
                int64_t stride, int64_t first, int64_t last, int64_t from, const float *totals, float *y) {
    vector sums[ROWS][WIDE];
    memset(sums, 0, sizeof sums);
    for (int64_t t = first, end; t < last; t = end) {
        end = (t / task->block + 1) * task->block < last ? (t / task->block + 1) * task->block : last;
        const uint16_t *value = values + cell(task, t) * task->size + from;
        for (int64_t n = t - first; n < end - first; n++, value += task->size)
            for (int w = 0; w < wide; w++) {
                const vector numbers = load_bf16(value + w * LANES);
                for (int r = 0; r < rows; r++) sums[r][w] += weights[r * stride + n] * numbers;
            }
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) {
            const vector mixed = sums[r][w] / totals[r];
            memcpy(y + r * task->heads * task->size + from + w * LANES, &mixed, sizeof mixed);
        }
}

/* `rows` queries of one head, from `query` on. panels: the keys from `start` on. */
INLINE void attend_tile(const int rows, const Task *task, int64_t head, int64_t query, int64_t start,
                        const float *panels, float *scores, int64_t stride) {
    const float *q = task->q + head * task->q_head + query * task->q_token, scale = 1 / sqrtf(task->size);
    const uint16_t *values = task->values + head / (task->heads / task->kv_heads) * task->capacity * task->size;
    const int64_t last = task->past + query + rows; /* behind the last key that one of them sees */
    float totals[ROWS];

    /* 1. The first panel that the first query sees, and all others. */
    int64_t first = 0;
    if (task->window && task->past + query + 1 - task->window > 0) first = task->past + query + 1 - task->window;
    first = start + (first - start) / PANEL * PANEL;
    for (int64_t t = first; t < last; t += PANEL)
        score(rows, q, task->q_token, panels + (t - start) * task->size, task->size, scores + t - first, stride);

    /* 2. Softmax of what each query sees; the rest gets a weight of zero. */
    for (int r = 0; r < rows; r++) {
        float *row = scores + r * stride, most = -INFINITY, total = 0;
        const int64_t end = task->past + query + r + 1 - first;
        int64_t begin = task->window ? end - task->window : 0;
        if (begin < 0) begin = 0;
#pragma omp simd reduction(max : most)
        for (int64_t n = begin; n < end; n++) most = row[n] > most ? row[n] : most;
#pragma omp simd
        for (int64_t n = begin; n < end; n++) row[n] = exp_negative((row[n] - most) * scale);
        for (int64_t n = 0; n < begin; n++) row[n] = 0;
        for (int64_t n = end; n < last - first; n++) row[n] = 0;
        for (int64_t n = begin; n < end; n++) total += row[n];
        totals[r] = total;
    }

    /* 3. Values. */
    float *y = task->y + (query * task->heads + head) * task->size;
    int64_t from = 0;
    for (; from + PANEL <= task->size; from += PANEL)
        mix(rows, WIDE, task, values, scores, stride, first, last, from, totals, y);
    for (; from < task->size; from += LANES) mix(rows, 1, task, values, scores, stride, first, last, from, totals, y);
}

static int64_t longest_of(const Task *task) {
    return (task->past + task->tokens + PANEL - 1) / PANEL * PANEL + PANEL;
}

int64_t pumice_attend_bytes(const Task *task) {
    return (task->size + ROWS) * longest_of(task) * (int64_t)sizeof(float);
}

void pumice_attend_part(const Task *task, float *memory) {
    const int64_t chunks = (task->tokens + CHUNK - 1) / CHUNK, items = chunks * task->kv_heads;
    const int64_t longest = longest_of(task);
    float *panels = memory, *scores = memory + task->size * longest;
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < items; item++) {
        /* Later queries see more keys, so they are begun first. */
        const int64_t query = (chunks - 1 - item / task->kv_heads) * CHUNK, kv_head = item % task->kv_heads;
        const int64_t end = query + CHUNK < task->tokens ? query + CHUNK : task->tokens;
        const int64_t group = task->heads / task->kv_heads, oldest = task->past + query + 1 - task->window;
        const int64_t start = task->window && oldest > 0 ? oldest : 0;
        transpose_keys(task, task->keys + kv_head * task->capacity * task->size, start, task->past + end, panels);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            int64_t row = query;
            for (; row + ROWS <= end; row += ROWS)
                attend_tile(ROWS, task, head, row, start, panels, scores, longest);
            for (; row < end; row++) attend_tile(1, task, head, row, start, panels, scores, longest);
        }
    }
}

/* Return 0, or 1 if memory cannot be allocated. */
int pumice_attend(const Task *task, int threads) {
    const int64_t each = pumice_attend_bytes(task);
    char *memory = malloc(threads * each);
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    pumice_attend_part(task, (float *)(memory + omp_get_thread_num() * each));
    free(memory);
    return 0;
}
