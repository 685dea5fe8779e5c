/* A linear layer with a packed matrix, for many rows, as a prompt or a picture has them. */
#include "product.h"
#include "vectors.h"

#define CHUNK 4 /* tiles that a thread takes at a time: one that loses its core takes fewer */

enum { NONE, QUICK_GELU, GELU, GELU_TANH };

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
    case GELU_TANH: /* (1 + tanh(z)) / 2 is sigmoid(2 z) */
#pragma omp simd
        for (int64_t i = 0; i < count; i++)
            y[i] = gated(x[i], 1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        break;
    default: memcpy(y, x, count * sizeof *y);
    }
}

/* y (rows, outputs) = x (rows, width) after an activation function, times the matrix, plus its bias. width: at most the
 * matrix's inputs; beyond it, a row is zeros. Return 0, or 1 if memory cannot be allocated. */
int pumice_linear(const Packed *w, int64_t rows, int64_t width, const float *x, int activation, float *y, int threads) {
    const int as_it_is = activation == NONE && width == w->inputs;
    const int64_t row_bytes = as_it_is ? 0 : w->inputs * (int64_t)sizeof(float);
    char *memory = malloc(activation_bytes(rows, w->inputs) + threads * row_bytes);
    if (!memory) return 1;
    const Activations numbers = activations_in(memory, rows, w->inputs, share_of(w));
    const int64_t tiles = tiles_of(w);
#pragma omp parallel num_threads(threads)
    {
        float *row = (float *)(memory + activation_bytes(rows, w->inputs) + omp_get_thread_num() * row_bytes);
        if (!as_it_is) memset(row, 0, row_bytes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            if (!as_it_is) activate(activation, x + r * width, width, row);
            quantize_row(as_it_is ? x + r * width : row, w->inputs, r, &numbers);
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < tiles; first += CHUNK) {
            const int64_t last = first + CHUNK < tiles ? first + CHUNK : tiles;
            product(w, first, last, &numbers, rows, y, w->outputs, 0);
        }
    }
    free(memory);
    return 0;
}

/* Return the name of the kernel that multiplies. */
const char *pumice_kernel(void) { return KERNEL; }
