/* A few new tokens of several sequences through a decoder, on a CPU, in one call.
 *
 * Knows memory and numbers. Computes what `Decoder.forward` and `Decoder.logits` do, with activations in fp32: over
 * `Int8Linear` layers with all else in bfloat16, or, where PLAIN is defined, with everything in fp32. One call,
 * because a step at a time in PyTorch is some 1,500 small operations, which take longer than reading the weights. A row
 * is added up in the same order whatever the other rows and however many threads there are (compilers contract every
 * `tile` alike: a test holds them to it).
 *
 * Shapes: R rows (a new token of a sequence each), D width, H heads, K key/value heads, d head width,
 * M width of the MLP, V vocabulary, P places of the cache. Matrices lie row by row.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(_OPENMP) && defined(__clang__)
#error "the OpenMP of clang is another library than the one that PyTorch has loaded"
#endif
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#define LANES 16 /* numbers of a vector; compilers split it where registers are shorter */
#define TILE 4   /* outputs that are computed together */
#define ROWS 6   /* rows that are: sums, weights and numbers then fill the 32 registers of AVX-512 */
#define AHEAD 4096 /* bytes: weights are asked for so early, twice as fast as where the processor guesses */
#define LINE 64    /* bytes that memory gives at a time */

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int8_t small_vector __attribute__((vector_size(LANES)));
typedef int16_t short_vector __attribute__((vector_size(2 * LANES)));
typedef int32_t int_vector __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES)));
typedef uint32_t word_vector __attribute__((vector_size(4 * LANES)));
#ifdef PLAIN
typedef float number_type, weight_type;
#else
typedef uint16_t number_type; /* bfloat16 */
typedef int8_t weight_type;
#endif

typedef struct {
    const weight_type *weight; /* (outputs, inputs) */
    const number_type *scale;   /* (outputs) or null */
    const number_type *bias;    /* (outputs) or null */
} Linear;

typedef struct {
    const number_type *attention_norm, *mlp_norm; /* (D) */
    const number_type *q_norm, *k_norm;           /* (d) or null */
    Linear q, k, v, o, gate, up, down;
} Block;

typedef struct {
    int64_t depth, width, heads, kv_heads, head_width, mlp_width, vocabulary, places, window; /* window: 0 none */
    float eps;
    const float *turning; /* (d / 2), radians per position */
    const Block *blocks;
    const number_type *norm; /* (D) */
    Linear head;
    number_type *keys, *values; /* (depth, K, P, d) */
} Model;

static inline vector load(const float *from) {
    vector found;
    memcpy(&found, from, sizeof found);
    return found;
}

#ifdef PLAIN
#define load_weight load
#define load_number load
#define wide(value) (value)
#define narrow(value) (value)
#else
static inline float wide(number_type value) {
    uint32_t bits = (uint32_t)value << 16;
    float found;
    memcpy(&found, &bits, 4);
    return found;
}

static inline number_type narrow(float value) { /* to the nearest, ties to even; values are finite here */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (number_type)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vector load_weight(const int8_t *from) {
#ifdef __AVX512F__ /* where GCC 12 misses the instruction that does it at once */
    return (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    small_vector found;
    memcpy(&found, from, sizeof found);
    short_vector twice = __builtin_convertvector(found, short_vector); /* step by step it is not scalar code */
    return __builtin_convertvector(__builtin_convertvector(twice, int_vector), vector);
#endif
}

static inline vector load_number(const number_type *from) {
    half_vector found;
    memcpy(&found, from, sizeof found);
    word_vector bits = __builtin_convertvector(found, word_vector) << 16;
    vector numbers;
    memcpy(&numbers, &bits, sizeof numbers);
    return numbers;
}
#endif

static inline float total(vector numbers) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)numbers);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += numbers[i];
    return sum;
#endif
}

/* a b + c. Where the processor multiplies and adds at once the code says so: a compiler that chose by itself chose
 * differently for one row and for five, and an answer would depend on its neighbours. */
static inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* y (rows, stride) = or += x (rows, inputs) times TILE outputs from `first` on; rows <= ROWS. */
static inline __attribute__((always_inline)) void tile(const Linear *layer, int64_t first, int64_t inputs,
                                                       const int rows, const float *x, float *y, int64_t stride,
                                                       int add) {
    const weight_type *weight = layer->weight + first * inputs;
    vector sums[TILE][ROWS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < inputs; k += LANES) {
        vector w[TILE];
        for (uint64_t i = 0; i < sizeof *weight * TILE * LANES; i += LINE)
            __builtin_prefetch((const char *)(weight + TILE * k) + i + AHEAD);
        for (int i = 0; i < TILE; i++) w[i] = load_weight(weight + i * inputs + k);
        for (int r = 0; r < rows; r++) {
            vector numbers = load(x + r * inputs + k);
            for (int i = 0; i < TILE; i++) sums[i][r] += w[i] * numbers;
        }
    }
    for (int i = 0; i < TILE; i++) {
        float scale = layer->scale ? wide(layer->scale[first + i]) : 1;
        float bias = layer->bias ? wide(layer->bias[first + i]) : 0;
        for (int r = 0; r < rows; r++) {
            float *to = y + r * stride + first + i;
            *to = fused(total(sums[i][r]), scale, bias) + (add ? *to : 0);
        }
    }
}

/* Outputs [first, last), multiples of TILE, of all rows. */
static void product(const Linear *layer, int64_t first, int64_t last, int64_t inputs, int64_t rows, const float *x,
                    float *y, int64_t stride, int add) {
    for (int64_t n = first; n < last; n += TILE)
        for (int64_t r = 0; r < rows; r += ROWS) {
            const float *from = x + r * inputs;
            float *to = y + r * stride;
            switch (rows - r < ROWS ? rows - r : ROWS) { /* constants, so that sums stay in registers */
            case 1: tile(layer, n, inputs, 1, from, to, stride, add); break;
            case 2: tile(layer, n, inputs, 2, from, to, stride, add); break;
            case 3: tile(layer, n, inputs, 3, from, to, stride, add); break;
            case 4: tile(layer, n, inputs, 4, from, to, stride, add); break;
            case 5: tile(layer, n, inputs, 5, from, to, stride, add); break;
            default: tile(layer, n, inputs, ROWS, from, to, stride, add);
            }
        }
}

/* RMSNorm of one vector of `size`. */
static void norm(const float *x, const number_type *weight, int64_t size, float eps, float *y) {
    vector squares = {0};
    for (int64_t i = 0; i < size; i += LANES) squares += load(x + i) * load(x + i);
    float factor = 1 / sqrtf(total(squares) / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * factor * wide(weight[i]);
}

static void norm_rows(const float *x, const number_type *weight, int64_t rows, int64_t size, float eps, float *y) {
    for (int64_t r = 0; r < rows; r++) norm(x + r * size, weight, size, eps, y + r * size);
}

/* Turn the halves of a head's vector against each other; angles: cosines, then sines. */
static void rotate(float *x, int64_t size, const float *angles) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float c = angles[i], s = angles[half + i], first = x[i], second = x[i + half];
        x[i] = first * c - second * s;
        x[i + half] = second * c + first * s;
    }
}

/* Softmax attention of one query over `count` keys and values; scores: room for `count` numbers. */
static void attend(const float *q, const number_type *keys, const number_type *values, int64_t count, int64_t size, float *scores,
                   float *y) {
    float most = -INFINITY, sum = 0, scale = 1 / sqrtf(size);
    for (int64_t t = 0; t < count; t++) {
        vector products = {0};
        for (int64_t i = 0; i < size; i += LANES) products += load(q + i) * load_number(keys + t * size + i);
        scores[t] = total(products) * scale;
        if (scores[t] > most) most = scores[t];
    }
    for (int64_t t = 0; t < count; t++) scores[t] = expf(scores[t] - most);
    for (int64_t t = 0; t < count; t++) sum += scores[t];
    for (int64_t i = 0; i < size; i += LANES) {
        vector mixed = {0};
        for (int64_t t = 0; t < count; t++) mixed += scores[t] * load_number(values + t * size + i);
        mixed /= sum;
        memcpy(y + i, &mixed, sizeof mixed);
    }
}

/* The part of `count` outputs that falls to a thread, in whole tiles. */
static void share(int64_t count, int64_t *first, int64_t *last) {
    int64_t tiles = count / TILE, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = tiles * thread / threads * TILE;
    *last = tiles * (thread + 1) / threads * TILE;
}

/* Whether more than one thread is used. */
int pumice_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* The outputs of a thread's share of a product. */
static void part(const Linear *layer, int64_t outputs, int64_t inputs, int64_t rows, const float *x, float *y,
                 int64_t stride, int add) {
    int64_t first, last;
    share(outputs, &first, &last);
    product(layer, first, last, inputs, rows, x, y, stride, add);
}

/* x (R, D): embedded tokens, overwritten. positions (R): where each stands in its sequence; starts (R): the place of
 * the sequence's first. due (wanted): the rows whose logits (wanted, V) are asked for. Returns 0, or 1 when there is
 * no memory. */
int pumice_decode(const Model *m, int64_t rows, float *x, const int64_t *positions, const int64_t *starts,
                  int64_t wanted, const int64_t *due, float *logits, int threads) {
    const int64_t D = m->width, H = m->heads, K = m->kv_heads, d = m->head_width, M = m->mlp_width;
    const int64_t joined = (H + 2 * K) * d, inner = H * d;
    int64_t longest = 0;
    for (int64_t r = 0; r < rows; r++)
        if (positions[r] >= longest) longest = positions[r] + 1;
    float *qkv = malloc(rows * (joined + inner + 3 * M + d) * sizeof(float));
    float *own = malloc(threads * (rows * D + longest) * sizeof(float)); /* a thread's: what it normed, scores */
    if (!qkv || !own) {
        free(qkv);
        free(own);
        return 1;
    }
    float *mixed = qkv + rows * joined, *mlp = mixed + rows * inner, *gated = mlp + rows * 2 * M;
    float *angles = gated + rows * M;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < d / 2; i++) {
            angles[r * d + i] = cosf(positions[r] * m->turning[i]);
            angles[r * d + d / 2 + i] = sinf(positions[r] * m->turning[i]);
        }

#pragma omp parallel num_threads(threads)
    {
        float *normed = own + omp_get_thread_num() * (rows * D + longest), *scores = normed + rows * D;
        int64_t first, last;
        for (int64_t layer = 0; layer < m->depth; layer++) {
            const Block *block = m->blocks + layer;
            norm_rows(x, block->attention_norm, rows, D, m->eps, normed); /* in every thread: cheaper than waiting */
            part(&block->q, inner, D, rows, normed, qkv, joined, 0);
            part(&block->k, K * d, D, rows, normed, qkv + inner, joined, 0);
            part(&block->v, K * d, D, rows, normed, qkv + inner + K * d, joined, 0);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * (H + K); item++) { /* queries turn; keys turn and are kept */
                int64_t r = item / (H + K), h = item % (H + K);
                float *head = qkv + r * joined + h * d;
                const number_type *weight = h < H ? block->q_norm : block->k_norm;
                if (weight) norm(head, weight, d, m->eps, head);
                rotate(head, d, angles + r * d);
                if (h < H) continue;
                int64_t place = ((layer * K + h - H) * m->places + starts[r] + positions[r]) * d;
                for (int64_t i = 0; i < d; i++) m->keys[place + i] = narrow(head[i]);
                for (int64_t i = 0; i < d; i++) m->values[place + i] = narrow(head[K * d + i]);
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < rows * H; item++) {
                int64_t r = item / H, h = item % H, seen = 0;
                if (m->window && positions[r] + 1 > m->window) seen = positions[r] + 1 - m->window;
                int64_t place = ((layer * K + h * K / H) * m->places + starts[r] + seen) * d;
                attend(qkv + r * joined + h * d, m->keys + place, m->values + place, positions[r] + 1 - seen, d, scores,
                       mixed + r * inner + h * d);
            }
            part(&block->o, D, inner, rows, mixed, x, D, 1);
#pragma omp barrier
            norm_rows(x, block->mlp_norm, rows, D, m->eps, normed);
            share(M, &first, &last); /* of the gate, and the same of what it gates */
            product(&block->gate, first, last, D, rows, normed, mlp, 2 * M, 0);
            product(&block->up, first, last, D, rows, normed, mlp + M, 2 * M, 0);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = first; i < last; i++) {
                    float gate = mlp[r * 2 * M + i];
                    gated[r * M + i] = gate / (1 + expf(-gate)) * mlp[r * 2 * M + M + i];
                }
#pragma omp barrier
            part(&block->down, D, M, rows, gated, x, D, 1);
#pragma omp barrier
        }
        for (int64_t r = 0; r < wanted; r++) norm(x + due[r] * D, m->norm, D, m->eps, normed + r * D);
        part(&m->head, m->vocabulary, D, wanted, normed, logits, m->vocabulary, 0);
    }
    free(qkv);
    free(own);
    return 0;
}
