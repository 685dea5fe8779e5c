/* Linear layers with packed matrices, alone or as an MLP, for many rows, as a prompt or a picture has them. */
#include "product.h"
#include "vectors.h"

#define CHUNK 4       /* tiles that a thread takes at a time: one that loses its core takes fewer */
#define MOST_ROWS 192 /* rows that go through an MLP together: what is between its products stays in the CPU's cache */
#define STRIP (WIDE * TILE > GROUP ? WIDE * TILE : GROUP) /* outputs of the first product that are computed together */

/* Activation functions. */
enum { QUICK_GELU, GELU, GELU_TANH };

/* x sigmoid(z) */
INLINE float gated(float x, float z) {
    const float e = exp_negative(-fabsf(z));
    return x * (z < 0 ? e : 1) / (1 + e);
}

/* x Phi(x) as PyTorch's `gelu`, to 2e-7 of x: 7.1.26 of Abramowitz and Stegun's handbook. */
INLINE float gelu(float x) {
    const float size = fabsf(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * size);
    const float sum = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = 0.5f * sum * exp_negative(-size * size); /* Phi(-|x|) */
    return x * (x < 0 ? tail : 1 - tail);
}

/* The activation function of each number of x: y (count). */
static void activate(int kind, const float *x, int64_t count, float *y) {
    switch (kind) {
    case QUICK_GELU:
#pragma omp simd
        for (int64_t i = 0; i < count; i++) y[i] = gated(x[i], 1.702f * x[i]);
        break;
    case GELU:
#pragma omp simd
        for (int64_t i = 0; i < count; i++) y[i] = gelu(x[i]);
        break;
    default: /* GELU_TANH: (1 + tanh(z)) / 2 is sigmoid(2 z) */
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            y[i] = gated(x[i], 1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
    }
}

/* Quantise a row (width). width: at most the inputs; beyond it, the row is zeros. padded: memory for a row. */
static void quantize_padded(const float *x, int64_t width, int64_t inputs, int64_t row, const Activations *to,
                            float *padded) {
    if (width < inputs) {
        memcpy(padded, x, width * sizeof *x);
        memset(padded + width, 0, (inputs - width) * sizeof *x);
        x = padded;
    }
    quantize_row(x, inputs, row, to);
}

/* y (rows, outputs) = x (rows, width) times the matrix, plus its bias. width: as in `quantize_padded`. Return 0, or 1 if
 * memory cannot be allocated. */
int pumice_linear(const Packed *w, int64_t rows, int64_t width, const float *x, float *y, int threads) {
    const int64_t row_bytes = width == w->inputs ? 0 : w->inputs * (int64_t)sizeof(float);
    char *memory = malloc(activation_bytes(rows, w->inputs) + threads * row_bytes);
    if (!memory) return 1;
    const Activations numbers = activations_in(memory, rows, w->inputs, share_of(w));
    const int64_t tiles = tiles_of(w);
#pragma omp parallel num_threads(threads)
    {
        float *padded = (float *)(memory + activation_bytes(rows, w->inputs) + omp_get_thread_num() * row_bytes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) quantize_padded(x + r * width, width, w->inputs, r, &numbers, padded);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tiles; first += CHUNK) {
            const int64_t last = first + CHUNK < tiles ? first + CHUNK : tiles;
            product(w, first, last, &numbers, rows, y, w->outputs, 0);
        }
    }
    free(memory);
    return 0;
}

/* Outputs [first, first + STRIP) of a matrix, as a matrix. */
static Packed strip_of(const Packed *w, int64_t first) {
    const int64_t left = w->outputs - first;
    return (Packed){w->kind, left < STRIP ? left : STRIP, w->inputs, w->data + first / TILE * tile_bytes(w->kind, w->inputs),
                    w->bias ? w->bias + first : 0};
}

/* y (rows, outputs of `down`) = down(activation(up(x))), for x (rows, width). The inputs of `down` are the outputs of `up`,
 * and zeros that pad their last group; it is not in Q4_K. width, the result: as of `pumice_linear`. */
int pumice_mlp(const Packed *up, const Packed *down, int64_t rows, int64_t width, const float *x, int activation, float *y,
               int threads) {
    const int64_t parts = ((rows + MOST_ROWS - 1) / MOST_ROWS + threads - 1) / threads * threads; /* as many for each */
    const int64_t most = (rows + parts - 1) / parts;
    const int64_t floats = most * STRIP + STRIP + up->inputs; /* a strip, its row after the function, a padded row */
    const int64_t up_bytes = activation_bytes(most, up->inputs), down_bytes = activation_bytes(most, down->inputs);
    const int64_t each = (floats * (int64_t)sizeof(float) + up_bytes + down_bytes + LINE - 1) / LINE * LINE;
    char *memory = malloc(threads * each);
    if (!memory) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t first = 0; first < rows; first += most) {
        const int64_t count = rows - first < most ? rows - first : most;
        float *strip = (float *)(memory + omp_get_thread_num() * each), *row = strip + most * STRIP;
        const Activations input = activations_in(row + STRIP + up->inputs, count, up->inputs, share_of(up));
        const Activations between =
            activations_in((char *)(row + STRIP + up->inputs) + up_bytes, count, down->inputs, 1);
        for (int64_t r = 0; r < count; r++)
            quantize_padded(x + (first + r) * width, width, up->inputs, r, &input, row + STRIP);
        for (int64_t column = 0; column < up->outputs; column += STRIP) {
            const Packed part = strip_of(up, column);
            product(&part, 0, tiles_of(&part), &input, count, strip, STRIP, 0);
            const int64_t groups = (part.outputs + GROUP - 1) / GROUP;
            for (int64_t r = 0; r < count; r++) {
                activate(activation, strip + r * STRIP, part.outputs, row);
                memset(row + part.outputs, 0, (groups * GROUP - part.outputs) * sizeof *row);
                quantize_groups(row, down->inputs, r, column / GROUP, groups, &between);
            }
        }
        product(down, 0, tiles_of(down), &between, count, y + first * down->outputs, down->outputs, 0);
    }
    free(memory);
    return 0;
}

/* Return the name of the kernel that multiplies. */
const char *pumice_kernel(void) { return KERNEL; }
