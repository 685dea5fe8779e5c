/* `pumice_linear` and `pumice_mlp` as a program of its own, for an emulator, or for checks that end a process.
 *
 * Reads the number of matrices (2 for an MLP), rows, width and the activation function (int64). Then of each matrix its
 * kind, outputs, inputs, bytes and whether there is a bias (int64), the matrix and the bias. Then x. Writes y.
 */
#include "linear.c"
#include <stdio.h>

static void *get(int64_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory || (size && fread(memory, size, 1, stdin) != 1)) exit(1);
    return memory;
}

static Packed get_matrix(void) {
    const int64_t *head = get(5 * sizeof *head);
    const uint8_t *data = get(head[3]);
    return (Packed){head[0], head[1], head[2], data, head[4] ? get(4 * head[1]) : 0};
}

int main(int count, char **arguments) {
    (void)arguments;
    if (count > 1) return puts(pumice_kernel()) < 0;
    const int64_t *head = get(4 * sizeof *head), rows = head[1], width = head[2];
    const int is_mlp = head[0] == 2;
    const Packed first = get_matrix(), last = is_mlp ? get_matrix() : first;
    float *x = get(4 * rows * width), *y = malloc(4 * rows * last.outputs);
    if (!y) return 1;
    if (is_mlp ? pumice_mlp(&first, &last, rows, width, x, head[3], y, 1) : pumice_linear(&first, rows, width, x, y, 1))
        return 1;
    return fwrite(y, 4 * rows * last.outputs, 1, stdout) != 1;
}
