/* Run a decoder on a few new tokens of several sequences, on a CPU, in one call.
 *
 * It computes what `Decoder.forward` and `Decoder.logits` do, with activations in fp32. Matrices are packed and the KV
 * cache is bfloat16; if DENSE is defined, both are fp32. One call, because a step in PyTorch is some 1,500 small
 * operations, which take longer than reading the weights. The sums of a row have a fixed order. They do not depend on
 * the other rows, nor on the number of threads.
 *
 * Shapes: R rows (one new token each), D width, H heads, K key/value heads, d head width, M width of the MLP,
 * V vocabulary, P cells of the KV cache.
 */
#include "vectors.h"
#ifdef DENSE
#include "dense.h"
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif
typedef Dense Linear;
typedef float cached;
typedef const float *Input; /* of a product */
#define load_cached load
#define to_cached(value) (value)
#define input_bytes(rows, inputs) 0
#define make_input(x, inputs, rows, memory) (x)
#define product(layer, tile, last, x, rows, y, stride, add) dense_product(layer, tile, last, x, rows, y, stride, add)
static inline int64_t tiles_of(const Dense *layer) { return layer->outputs / TILE; }
#else
#include "product.h"
typedef Packed Linear;
typedef uint16_t cached; /* bfloat16 */
typedef Activations Input;
#define load_cached load_bf16
#define to_cached to_bf16
#define input_bytes activation_bytes
static inline Input make_input(const float *x, int64_t inputs, int64_t rows, void *memory) {
    Activations activations = activations_in(memory, rows, inputs);
    for (int64_t r = 0; r < rows; r++) quantize_row(x + r * inputs, inputs, r, &activations);
    return activations;
}
#define product(layer, tile, last, x, rows, y, stride, add) product(layer, tile, last, &(x), rows, y, stride, add)
#endif

typedef struct {
    const float *attention_norm, *mlp_norm; /* (D) */
    const float *q_norm, *k_norm;           /* (d) or null */
    Linear q, k, v, o, gate, up, down;
} Block;

typedef struct {
    int64_t depth, width, heads, kv_heads, head_dim, mlp_width, vocabulary, capacity, window; /* window: 0 none */
    float eps;
    const float *inv_freq; /* (d / 2), radians per position */
    const Block *blocks;
    const float *norm; /* (D) */
    Linear head;
    cached *keys, *values; /* (depth, K, P, d) */
} Model;

/* RMSNorm of one vector of `size` numbers. */
static void norm(const float *x, const float *weight, int64_t size, float eps, float *y) {
    vector squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1 / sqrtf(total(squares) / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * weight[i];
}

static void norm_rows(const float *x, const float *weight, int64_t rows, int64_t size, float eps, float *y) {
    for (int64_t r = 0; r < rows; r++) norm(x + r * size, weight, size, eps, y + r * size);
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

/* Softmax attention of one query over `count` keys and values. scores: a buffer for `count` numbers. */
static void attend(const float *q, const cached *keys, const cached *values, int64_t count, int64_t size, float *scores,
                   float *y) {
    float max_score = -INFINITY, sum = 0, scale = 1 / sqrtf(size);
    for (int64_t t = 0; t < count; t++) {
        vector products = {0};
        for (int64_t i = 0; i < size; i += LANES) products += load(q + i) * load_cached(keys + t * size + i);
        scores[t] = total(products) * scale;
        if (scores[t] > max_score) max_score = scores[t];
    }
    for (int64_t t = 0; t < count; t++) scores[t] = expf(scores[t] - max_score);
    for (int64_t t = 0; t < count; t++) sum += scores[t];
    for (int64_t i = 0; i < size; i += LANES) {
        vector mixed = {0};
        for (int64_t t = 0; t < count; t++) mixed += scores[t] * load_cached(values + t * size + i);
        mixed /= sum;
        memcpy(y + i, &mixed, sizeof mixed);
    }
}

/* The tiles [first, last) of a layer that this thread computes. */
static void share(const Linear *layer, int64_t *first, int64_t *last) {
    int64_t tiles = tiles_of(layer), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = tiles * thread / threads;
    *last = tiles * (thread + 1) / threads;
}

/* This thread's share of a product. */
static void part(const Linear *layer, int64_t rows, Input x, float *y, int64_t stride, int add) {
    int64_t first, last;
    share(layer, &first, &last);
    product(layer, first, last, x, rows, y, stride, add);
}

/* Return whether the code can use more than one thread. */
int pumice_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* x (R, D): embedded tokens; overwritten. positions (R): of each token in its sequence. starts (R): the first cell of
 * its sequence in the KV cache. due (due_count): the rows whose logits (due_count, V) are needed. Return 0, or 1 if
 * memory cannot be allocated. */
int pumice_decode(const Model *m, int64_t rows, float *x, const int64_t *positions, const int64_t *starts,
                  int64_t due_count, const int64_t *due, float *logits, int threads) {
    const int64_t D = m->width, H = m->heads, K = m->kv_heads, d = m->head_dim, M = m->mlp_width;
    const int64_t joined = (H + 2 * K) * d, inner = H * d;

    /* 1. Allocate buffers that all threads share, and one for each thread (normed rows, scores, a product's input). */
    int64_t longest = 0, widest = D > M ? D : M;
    for (int64_t r = 0; r < rows; r++)
        if (positions[r] >= longest) longest = positions[r] + 1;
    if (inner > widest) widest = inner;
    const int64_t each = (rows * D + longest) * (int64_t)sizeof(float) + input_bytes(rows, widest) + 64;
    float *qkv = malloc(rows * (joined + inner + 3 * M + d) * sizeof(float));
    char *own = malloc(threads * each);
    if (!qkv || !own) {
        free(qkv);
        free(own);
        return 1;
    }
    float *mixed = qkv + rows * joined, *mlp = mixed + rows * inner, *gated = mlp + rows * 2 * M;
    float *angles = gated + rows * M;

    /* 2. Rotary angles are the same in all layers. */
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d / 2; i++) {
            angles[r * d + i] = cosf(positions[r] * m->inv_freq[i]);
            angles[r * d + d / 2 + i] = sinf(positions[r] * m->inv_freq[i]);
        }

#pragma omp parallel num_threads(threads)
    {
        float *normed = (float *)(own + omp_get_thread_num() * each), *scores = normed + rows * D;
        void *memory = scores + longest;
        int64_t first, last;
        (void)memory;
        for (int64_t layer = 0; layer < m->depth; layer++) {
            const Block *block = m->blocks + layer;

            /* 3. Queries, keys and values. Every thread norms and rounds all rows, which is cheaper than a barrier. */
            norm_rows(x, block->attention_norm, rows, D, m->eps, normed);
            Input input = make_input(normed, D, rows, memory);
            part(&block->q, rows, input, qkv, joined, 0);
            part(&block->k, rows, input, qkv + inner, joined, 0);
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
                int64_t cell = ((layer * K + h - H) * m->capacity + starts[r] + positions[r]) * d;
                for (int64_t i = 0; i < d; i++) m->keys[cell + i] = to_cached(head[i]);
                for (int64_t i = 0; i < d; i++) m->values[cell + i] = to_cached(head[K * d + i]);
            }

            /* 5. Attend: each row to its own sequence only. A window hides all but its last keys. */
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * H; item++) {
                int64_t r = item / H, h = item % H, past_window = 0;
                if (m->window && positions[r] + 1 > m->window) past_window = positions[r] + 1 - m->window;
                int64_t cell = ((layer * K + h * K / H) * m->capacity + starts[r] + past_window) * d;
                attend(qkv + r * joined + h * d, m->keys + cell, m->values + cell, positions[r] + 1 - past_window, d, scores,
                       mixed + r * inner + h * d);
            }
            input = make_input(mixed, inner, rows, memory);
            part(&block->o, rows, input, x, D, 1);
#pragma omp barrier

            /* 6. MLP. Each thread gates the outputs that it computed itself, so no barrier is needed before. */
            norm_rows(x, block->mlp_norm, rows, D, m->eps, normed);
            input = make_input(normed, D, rows, memory);
            part(&block->gate, rows, input, mlp, 2 * M, 0);
            part(&block->up, rows, input, mlp + M, 2 * M, 0);
            share(&block->gate, &first, &last);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = first * TILE; i < last * TILE && i < M; i++) {
                    float gate = mlp[r * 2 * M + i];
                    gated[r * M + i] = gate / (1 + expf(-gate)) * mlp[r * 2 * M + M + i];
                }
#pragma omp barrier
            input = make_input(gated, M, rows, memory);
            part(&block->down, rows, input, x, D, 1);
#pragma omp barrier
        }

        /* 7. Logits, only for the due rows: the vocabulary is the largest matrix. */
        for (int64_t r = 0; r < due_count; r++) norm(x + due[r] * D, m->norm, D, m->eps, normed + r * D);
        Input input = make_input(normed, D, due_count, memory);
        part(&m->head, due_count, input, logits, m->vocabulary, 0);
    }
    free(qkv);
    free(own);
    return 0;
}
