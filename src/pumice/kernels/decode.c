/* Run a decoder on the new tokens of several sequences, on a CPU, in one call.
 *
 * It computes what `Decoder.forward` and `Decoder.logits` do, with activations in fp32. Matrices are packed and the KV
 * cache is bfloat16; if DENSE is defined, both are fp32. One call, because a step in PyTorch is some 1,500 small
 * operations, which take longer than reading the weights. The sums of a row have a fixed order. They do not depend on
 * the other rows, nor on the number of threads.
 *
 * The cache is made of blocks of cells, a cell for each token, and a sequence's table names its blocks in order. So
 * sequences share what they begin with (vLLM, arXiv 2309.06180).
 *
 * Shapes: R rows (one new token each), D width, H heads, K key/value heads, d head width, M width of the MLP,
 * V vocabulary, C cells of the cache, G = H / K heads that share keys and values.
 */
#include "compiler.h"
#include "vectors.h"
#ifdef DENSE
#include "dense.h"
#include <stdlib.h>
typedef Dense Linear;
typedef float cached;
typedef const float *Input; /* of a product */
#define load_cached load
#define to_cached(value) (value)
#define input_bytes(rows, inputs) ((rows) * (inputs) * (int64_t)sizeof(float))
#define input_in(memory, rows, inputs, share) ((float *)(memory))
#define share_of(layer) 0
#define shared_by(input) 0
#define set_input(x, inputs, r, to) memcpy((float *)(to) + (r) * (inputs), x, (inputs) * sizeof(float))
#define product(layer, tile, last, x, rows, y, stride, add) dense_product(layer, tile, last, x, rows, y, stride, add)
static inline int64_t tiles_of(const Dense *layer) { return layer->outputs / TILE; }
#else
#include "attend.h"
#include "product.h"
typedef Packed Linear;
typedef uint16_t cached; /* bfloat16 */
typedef Activations Input;
#define load_cached load_bf16
#define to_cached to_bf16
#define input_bytes activation_bytes
#define input_in activations_in
#define shared_by(input) (input).share
#define set_input(x, inputs, r, to) quantize_row(x, inputs, r, &(to))
#define product(layer, tile, last, x, rows, y, stride, add) product(layer, tile, last, &(x), rows, y, stride, add)
#endif

typedef struct {
    const float *attention_norm, *mlp_norm; /* (D) */
    const float *q_norm, *k_norm;           /* (d) or null */
    Linear q, k, v, o, gate, up, down;
} Block;

typedef struct {
    int64_t depth, width, heads, kv_heads, head_dim, mlp_width, vocabulary, capacity, block, window; /* window: 0 none */
    float eps;
    const float *inv_freq; /* (d / 2), radians per position */
    const Block *blocks;
    const float *norm; /* (D) */
    Linear head;
    cached *keys, *values; /* (depth, K, C, d) */
} Model;

/* RMSNorm of one vector of `size` numbers. */
static void norm(const float *x, const float *weight, int64_t size, float eps, float *y) {
    vector squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1 / sqrtf(total(squares) / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

/* SwiGLU: SiLU of the gate times the other half. */
static void gate(const float *gates, const float *values, int64_t count, float *y) {
    for (int64_t i = 0; i < count; i++) {
        const float size = fabsf(gates[i]), e = exp_negative(-size), sigmoid = (gates[i] < 0 ? e : 1) / (1 + e);
        y[i] = gates[i] * sigmoid * values[i];
    }
}

/* Apply rotary position embedding to the vector of a head. angles: size / 2 cosines, then as many sines. */
static void rotate(float *x, int64_t size, const float *angles) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float c = angles[i], s = angles[half + i], first = x[i], second = x[i + half];
        x[i] = first * c - second * s;
        x[i + half] = second * c + first * s;
    }
}

#define PIECE 256 /* tokens whose attention is one thread's work; the results of pieces are joined in their order */
#define QUERIES 4 /* of a group that are computed together */
#define KEYS 4    /* that are multiplied together */
#define SCORES (PIECE + KEYS - 1) /* room for the scores of a query: keys come KEYS at a time */

/* What one item of attention reads: tokens [first, last) of a sequence, which all lie in one piece. keys and values are
 * those of one head and layer (C, d). table: the sequence's blocks. */
typedef struct {
    const cached *keys, *values;
    const int64_t *table;
    int64_t first, last;
} Span;

static inline int64_t cell_of(const int64_t *table, int64_t block, int64_t t) {
    return table[t / block] * block + t % block;
}

/* The key of token t; behind the end, the first: asking for it again costs nothing. */
static inline const cached *keys_at(const Span *span, int64_t t, int64_t block, int64_t size) {
    return span->keys + cell_of(span->table, block, t < span->last ? t : span->first) * size;
}

/* Ask memory for `size` numbers that are needed soon. They are placed in the second level: too many for the first. */
INLINE void ask_for(const cached *numbers, int64_t size) {
    for (int64_t i = 0; i < size; i += LINE / sizeof *numbers) __builtin_prefetch(numbers + i, 0, 2);
}

/* The totals of KEYS vectors, in a third of the steps that they take one by one. */
INLINE void totals(const vector *sums, float *to) {
#if LANES == 16
    __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
    __m512d ab = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)(_mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d));
    __m512d all = (__m512d)((__m512)_mm512_unpacklo_pd(ab, cd) + (__m512)_mm512_unpackhi_pd(ab, cd));
    __m256 half = (__m256)_mm512_castpd512_pd256(all) + (__m256)_mm512_extractf64x4_pd(all, 1);
    _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif LANES == 8
    __m256 ab = _mm256_hadd_ps((__m256)sums[0], (__m256)sums[1]), cd = _mm256_hadd_ps((__m256)sums[2], (__m256)sums[3]);
    __m256 all = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
    for (int n = 0; n < KEYS; n++) to[n] = total(sums[n]);
#endif
}

/* Products of `queries` queries with `count` neighbouring keys: scores (queries, SCORES), of which up to KEYS - 1 behind
 * the last are overwritten. soon: numbers, as many as the keys', that are needed soon. */
INLINE void score(const int queries, const float *q, const cached *keys, int64_t count, int64_t size,
                  float *scores, const cached *soon) {
    for (int64_t t = 0; t < count; t += KEYS) {
        const cached *key[KEYS];
        vector sums[QUERIES][KEYS];
        ask_for(soon + t * size, KEYS * size);
        for (int n = 0; n < KEYS; n++) {
            key[n] = keys + (t + n < count ? t + n : count - 1) * size;
            for (int g = 0; g < queries; g++) sums[g][n] = (vector){0};
        }
#pragma GCC unroll 4 /* heads have 64 or 128 numbers: a loop of so few turns costs a fifth of the time */
        for (int64_t i = 0; i < size; i += LANES)
            for (int n = 0; n < KEYS; n++) {
                vector numbers = load_cached(key[n] + i);
                for (int g = 0; g < queries; g++) sums[g][n] += load(q + g * size + i) * numbers;
            }
        for (int g = 0; g < queries; g++) totals(sums[g], scores + g * SCORES + t);
    }
}

/* Add `count` neighbouring values, each times its weight (queries, SCORES), to `columns` vectors of the sums
 * (queries, stride), which stay in registers. */
INLINE void mix_columns(const int queries, const int columns, const float *weights, const cached *values,
                        int64_t count, int64_t size, float *sums, int64_t stride, const cached *soon) {
    vector sum[QUERIES][8];
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < columns; c++) sum[g][c] = load(sums + g * stride + c * LANES);
    for (int64_t t = 0; t < count; t++) {
        ask_for(soon + t * size, columns * LANES);
        for (int c = 0; c < columns; c++) {
            vector value = load_cached(values + t * size + c * LANES);
            for (int g = 0; g < queries; g++) sum[g][c] += weights[g * SCORES + t] * value;
        }
    }
    for (int g = 0; g < queries; g++)
        for (int c = 0; c < columns; c++) memcpy(sums + g * stride + c * LANES, &sum[g][c], sizeof(vector));
}

INLINE void mix(const int queries, const float *weights, const cached *values, int64_t count, int64_t size,
                float *sums, int64_t stride, const cached *soon) {
#define MIX_COLUMNS(COLUMNS)                                                                                           \
    for (; i + COLUMNS * LANES <= size; i += COLUMNS * LANES)                                                          \
        mix_columns(queries, COLUMNS, weights, values + i, count, size, sums + i, stride, soon + i);
    int64_t i = 0;
    if (queries <= 2) MIX_COLUMNS(8)
    MIX_COLUMNS(4)
    MIX_COLUMNS(1)
}

/* Softmax attention of a group's queries (G, d) over a span; each key and value is read once for the whole group. block:
 * tokens of a block. next: what this thread reads after it. scores: room for (G, SCORES). out (G, stride): for each query
 * d sums, their weights' sum, the largest score. While keys are read, memory is asked for the values; and while values
 * are read, for the next keys: blocks lie anywhere, so the processor cannot guess what comes next. */
static void attend(const float *q, const Span *span, const Span *next, int64_t block, int64_t group, int64_t size,
                   float *scores, float *out, int64_t stride) {
    const float scale = 1 / sqrtf(size);
    const int64_t first = span->first, last = span->last;
#define EACH_RUN(CALL, SOON)                                                                                           \
    for (int64_t t = first, end; t < last; t = end) {                                                                  \
        end = (t / block + 1) * block < last ? (t / block + 1) * block : last;                                         \
        const int64_t cell = cell_of(span->table, block, t) * size;                                                    \
        const cached *soon = SOON;                                                                                     \
        for (int64_t g = 0; g < group; g += QUERIES) switch (group - g) { /* constants: sums stay in registers */       \
            case 1: CALL(1); break;                                                                                    \
            case 2: CALL(2); break;                                                                                    \
            case 3: CALL(3); break;                                                                                    \
            default: CALL(QUERIES);                                                                                    \
            }                                                                                                          \
    }
#define SCORE(N) score(N, q + g * size, span->keys + cell, end - t, size, scores + g * SCORES + t - first, soon)
#define MIX(N)                                                                                                         \
    mix(N, scores + g * SCORES + t - first, span->values + cell, end - t, size, out + g * stride, stride, soon)
    EACH_RUN(SCORE, span->values + cell)
    for (int64_t g = 0; g < group; g++) {
        float *weights = scores + g * SCORES, *sums = out + g * stride, most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < last - first; t++) most = weights[t] > most ? weights[t] : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < last - first; t++) {
            weights[t] = exp_negative((weights[t] - most) * scale);
            sum += weights[t];
        }
        memset(sums, 0, size * sizeof *sums);
        sums[size] = sum;
        sums[size + 1] = most * scale;
    }
    EACH_RUN(MIX, keys_at(next, next->first + t - first, block, size))
}

/* Join what `pieces` pieces (pieces, stride) gave for one query: y (d). */
static void join(const float *parts, int64_t pieces, int64_t stride, int64_t size, float *y) {
    float most = -INFINITY, sum = 0;
    for (int64_t p = 0; p < pieces; p++)
        if (parts[p * stride + size + 1] > most) most = parts[p * stride + size + 1];
    memset(y, 0, size * sizeof *y);
    for (int64_t p = 0; p < pieces; p++) {
        const float *part = parts + p * stride, weight = exp_negative(part[size + 1] - most);
        sum += weight * part[size];
        for (int64_t i = 0; i < size; i++) y[i] += weight * part[i];
    }
    for (int64_t i = 0; i < size; i++) y[i] /= sum;
}

/* What item `item` of a layer's attention reads; items are (rows of `ids`, pieces, K). The span is empty where a sequence is
 * shorter than the longest, or its window begins later. */
static Span span_of(const Model *m, int64_t layer, int64_t item, int64_t pieces, const int64_t *ids,
                    const int64_t *positions, const int64_t *blocks, const int64_t *tables) {
    const int64_t K = m->kv_heads, r = ids[item / (pieces * K)], length = positions[r] + 1;
    const int64_t head = (layer * K + item % K) * m->capacity * m->head_dim;
    int64_t first = item / K % pieces * PIECE, last = length < first + PIECE ? length : first + PIECE;
    if (m->window && length - m->window > first) first = length - m->window;
    if (first >= last) first = last = 0; /* a table need not reach so far */
    return (Span){m->keys + head, m->values + head, blocks + tables[r], first, last};
}

#define FEW 8   /* rows whose product's input each thread makes for itself, which is cheaper than a barrier */
#define CHUNK 4 /* tiles that a thread takes at a time if rows are many: one that loses its core takes fewer */

/* The tiles [first, last) of a layer that this thread computes if rows are few. */
static void share(const Linear *layer, int64_t *first, int64_t *last) {
    int64_t tiles = tiles_of(layer), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = tiles * thread / threads;
    *last = tiles * (thread + 1) / threads;
}

/* This thread's share of a product. */
static void part(const Linear *layer, int64_t rows, Input x, float *y, int64_t stride, int add) {
    int64_t first, last;
    if (rows <= FEW) {
        share(layer, &first, &last);
        product(layer, first, last, x, rows, y, stride, add);
        return;
    }
    const int64_t tiles = tiles_of(layer);
#pragma omp for schedule(dynamic) nowait
    for (first = 0; first < tiles; first += CHUNK) {
        last = first + CHUNK < tiles ? first + CHUNK : tiles;
        product(layer, first, last, x, rows, y, stride, add);
    }
}

/* What a row of a product's input is made of: x, normed if there are weights, or gated if there are two halves. */
typedef struct {
    const float *x, *weight; /* (rows, stride) */
    int64_t stride, size;    /* of a row, and of the input */
    int gated;
    float eps;
} Source;

static __attribute__((noinline)) void make_row(const Source *from, int64_t r, float *row, Input to) {
    const float *x = from->x + r * from->stride;
    if (from->weight) norm(x, from->weight, from->size, from->eps, row);
    else if (from->gated) gate(x, x + from->size, from->size, row);
    set_input(from->weight || from->gated ? row : x, from->size, r, to);
}

/* Make the input of a layer's product. own, row: memory of this thread; shared: of all, used if rows are many. */
static Input make_input(const Linear *layer, Source from, int64_t rows, void *own, void *shared, float *row) {
    (void)layer;
    if (rows <= FEW) {
        Input input = input_in(own, rows, from.size, share_of(layer));
        for (int64_t r = 0; r < rows; r++) make_row(&from, r, row, input);
        return input;
    }
    Input input = input_in(shared, rows, from.size, share_of(layer));
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) make_row(&from, r, row, input);
    return input;
}

/* Make the input of the next layer that reads the same rows. It is what was made for the layer before, unless their
 * matrices need scales for other groups. Threads may still read what was made, so it is replaced after a barrier. */
static Input next_input(const Linear *layer, Input made, Source from, int64_t rows, void *own, void *shared,
                        float *row) {
    if (share_of(layer) == shared_by(made)) return made;
#pragma omp barrier
    return make_input(layer, from, rows, own, shared, row);
}

/* New tokens of one sequence that attend together, as a prompt's: rows [first, first + count). */
typedef struct {
    int64_t first, count;
} Run;

/* Return whether the code can use more than one thread. */
int pumice_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* x (R, D): embedded tokens; overwritten. positions (R): of each token in its sequence. blocks: the tables of all
 * sequences, one after the other. tables (R): where that of a row's sequence begins. runs: of packed decoders only. single
 * (single_count): the other rows. due (due_count): the rows whose logits (due_count, V) are needed, in order. Return 0, or
 * 1 if memory cannot be allocated. */
int pumice_decode(const Model *m, int64_t rows, float *x, const int64_t *positions, const int64_t *blocks,
                  const int64_t *tables, int64_t run_count, const Run *runs, int64_t single_count,
                  const int64_t *single, int64_t due_count, const int64_t *due, float *logits, int threads) {
    const int64_t D = m->width, H = m->heads, K = m->kv_heads, d = m->head_dim, M = m->mlp_width;
    const int64_t joined = (H + 2 * K) * d, inner = H * d, G = H / K, stride = d + 2;

    /* 1. Allocate buffers that all threads share, and one for each thread (a row, scores, a product's input). */
    int64_t longest = 0, widest = D > M ? D : M;
    for (int64_t r = 0; r < rows; r++)
        if (positions[r] >= longest) longest = positions[r] + 1;
    if (inner > widest) widest = inner;
    const int64_t pieces = (longest + PIECE - 1) / PIECE, apart = single_count > due_count ? single_count : due_count;
    int64_t attend_bytes = G * SCORES * (int64_t)sizeof(float);
#ifndef DENSE
    for (int64_t n = 0; n < run_count; n++) {
        const Task task = {.past = positions[runs[n].first], .tokens = runs[n].count, .size = d};
        if (pumice_attend_bytes(&task) > attend_bytes) attend_bytes = pumice_attend_bytes(&task);
    }
#endif
    const int64_t few = rows < FEW ? rows : FEW;
    const int64_t each = widest * (int64_t)sizeof(float) + attend_bytes + input_bytes(few, widest) + 64;
    const int64_t floats = rows * (joined + inner + 2 * M + d) + apart * H * pieces * stride;
    float *qkv = malloc(floats * sizeof(float) + (rows > FEW ? input_bytes(rows, widest) : 0));
    char *own = malloc(threads * each);
    if (!qkv || !own) {
        free(qkv);
        free(own);
        return 1;
    }
    float *mixed = qkv + rows * joined, *mlp = mixed + rows * inner, *angles = mlp + rows * 2 * M;
    float *parts = angles + rows * d; /* (apart, H, pieces, stride) */
    void *shared = qkv + floats;

    /* 2. Rotary angles are the same in all layers. */
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d / 2; i++) {
            angles[r * d + i] = cosf(positions[r] * m->inv_freq[i]);
            angles[r * d + d / 2 + i] = sinf(positions[r] * m->inv_freq[i]);
        }

#pragma omp parallel num_threads(threads)
    {
        float *row = (float *)(own + omp_get_thread_num() * each), *scores = row + widest;
        void *memory = (char *)scores + attend_bytes;
        int64_t computed = rows; /* rows of x: in the end, only the due ones */
        for (int64_t layer = 0; layer < m->depth; layer++) {
            const Block *block = m->blocks + layer;
            const int is_last = layer + 1 == m->depth;

            /* 3. Queries, keys and values. */
            Source from = {x, block->attention_norm, D, D, 0, m->eps};
            Input input = make_input(&block->q, from, rows, memory, shared, row);
            part(&block->q, rows, input, qkv, joined, 0);
            input = next_input(&block->k, input, from, rows, memory, shared, row);
            part(&block->k, rows, input, qkv + inner, joined, 0);
            input = next_input(&block->v, input, from, rows, memory, shared, row);
            part(&block->v, rows, input, qkv + inner + K * d, joined, 0);
#pragma omp barrier

            /* 4. Rotate queries and keys by their position. Write keys and values to the KV cache. */
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * (H + K); item++) {
                int64_t r = item / (H + K), h = item % (H + K);
                float *head = qkv + r * joined + h * d;
                const float *weight = h < H ? block->q_norm : block->k_norm;
                if (weight) norm(head, weight, d, m->eps, head);
                rotate(head, d, angles + r * d);
                if (h < H) continue;
                int64_t block = blocks[tables[r] + positions[r] / m->block];
                int64_t cell = (layer * K + h - H) * m->capacity + block * m->block + positions[r] % m->block;
                for (int64_t i = 0; i < d; i++) m->keys[cell * d + i] = to_cached(head[i]);
                for (int64_t i = 0; i < d; i++) m->values[cell * d + i] = to_cached(head[K * d + i]);
            }

            /* 5. Runs attend as prompts do. In the last layer, only the due rows do, as answers: other rows were needed
             * for their keys and values alone. From there on, x holds the due rows. */
            int64_t count = single_count;
            const int64_t *ids = single;
            if (is_last) {
                count = computed = due_count;
                ids = due;
#pragma omp single
                for (int64_t n = 0; n < due_count; n++) memmove(x + n * D, x + due[n] * D, D * sizeof *x);
            }
#ifndef DENSE
            for (int64_t n = 0; n < run_count && !is_last; n++) {
                const int64_t r = runs[n].first, head = layer * K * m->capacity * d;
                const Task task = {qkv + r * joined, d, joined, m->keys + head, m->values + head, blocks + tables[r],
                                   m->block, m->capacity, positions[r], runs[n].count, m->window, H, K, d,
                                   mixed + r * inner};
                pumice_attend_part(&task, scores);
            }
#endif
            /* Each group of heads of each other row attends to its own sequence, piece by piece; then the pieces are
             * joined. Neighbouring items go to different threads: they take equally long. */
            const int64_t items = count * pieces * K;
#pragma omp for schedule(static, 1)
            for (int64_t item = 0; item < items; item++) {
                const int64_t n = item / (pieces * K), piece = item / K % pieces, h = item % K;
                const Span span = span_of(m, layer, item, pieces, ids, positions, blocks, tables);
                const int64_t after = item + omp_get_num_threads() < items ? item + omp_get_num_threads() : item;
                const Span next = span_of(m, layer, after, pieces, ids, positions, blocks, tables);
                float *out = parts + (n * H + h * G) * pieces * stride + piece * stride;
                if (span.first < span.last)
                    attend(qkv + ids[n] * joined + h * G * d, &span, &next, m->block, G, d, scores, out,
                           pieces * stride);
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < count * H; item++) {
                const int64_t n = item / H, r = ids[n], used = positions[r] / PIECE + 1;
                int64_t skipped = 0;
                if (m->window && positions[r] + 1 > m->window) skipped = (positions[r] + 1 - m->window) / PIECE;
                join(parts + (item * pieces + skipped) * stride, used - skipped, stride, d,
                     mixed + (is_last ? n : r) * inner + item % H * d);
            }
            from = (Source){.x = mixed, .stride = inner, .size = inner};
            input = make_input(&block->o, from, computed, memory, shared, row);
            part(&block->o, computed, input, x, D, 1);
#pragma omp barrier

            /* 6. MLP. */
            from = (Source){x, block->mlp_norm, D, D, 0, m->eps};
            input = make_input(&block->gate, from, computed, memory, shared, row);
            part(&block->gate, computed, input, mlp, 2 * M, 0);
            input = next_input(&block->up, input, from, computed, memory, shared, row);
            part(&block->up, computed, input, mlp + M, 2 * M, 0);
#pragma omp barrier
            from = (Source){.x = mlp, .stride = 2 * M, .size = M, .gated = 1};
            input = make_input(&block->down, from, computed, memory, shared, row);
            part(&block->down, computed, input, x, D, 1);
#pragma omp barrier
        }

        /* 7. Logits, only for the due rows: the vocabulary is the largest matrix. */
        const Source from = {x, m->norm, D, D, 0, m->eps};
        const Input input = make_input(&m->head, from, due_count, memory, shared, row);
        part(&m->head, due_count, input, logits, m->vocabulary, 0);
    }
    free(qkv);
    free(own);
    return 0;
}
