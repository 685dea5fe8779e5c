/* A linear layer of a packed matrix over many rows, as a prompt has them. */
#include "product.h"

#define PIECE (4 * WIDE) /* tiles that a thread takes at a time: one that is kept from its core takes fewer */

/* y (rows, outputs) = x (rows, inputs) times the matrix, plus its bias. Returns 0, or 1 when there is no memory. */
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
        for (int64_t first = 0; first < tiles; first += PIECE) {
            const int64_t last = first + PIECE < tiles ? first + PIECE : tiles;
            product(w, first, last, &numbers, rows, y, w->outputs, 0);
        }
    }
    free(memory);
    return 0;
}

/* Which kernel multiplies. */
const char *pumice_kernel(void) { return KERNEL; }
