/* A linear layer with a packed matrix, for many rows, as a prompt has them. */
#include "product.h"

#define CHUNK 4 /* tiles that a thread takes at a time: one that loses its core takes fewer */

/* y (rows, outputs) = x (rows, inputs) times the matrix, plus its bias. Return 0, or 1 if memory cannot be allocated. */
int pumice_linear(const Packed *w, int64_t rows, const float *x, float *y, int threads) {
    void *memory = malloc(activation_bytes(rows, w->inputs));
    if (!memory) return 1;
    const Activations numbers = activations_in(memory, rows, w->inputs);
    const int64_t tiles = tiles_of(w);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) quantize_row(x + r * w->inputs, w->inputs, r, &numbers);
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
