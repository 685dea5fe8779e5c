/* `pumice_linear` as a program of its own, for an emulator, or for checks that end a process.
 *
 * Reads kind, outputs, inputs, rows, bytes of the matrix, whether there is a bias, and width (int64), then the
 * matrix, the bias and x. Writes y.
 */
#include "linear.c"
#include <stdio.h>

static void *get(int64_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory || (size && fread(memory, size, 1, stdin) != 1)) exit(1);
    return memory;
}

int main(int count, char **arguments) {
    (void)arguments;
    if (count > 1) return puts(pumice_kernel()) < 0;
    const int64_t *head = get(7 * sizeof *head), rows = head[3], width = head[6];
    Packed w = {head[0], head[1], head[2], get(head[4]), head[5] ? get(4 * head[1]) : 0};
    float *x = get(4 * rows * width), *y = malloc(4 * rows * w.outputs);
    if (!y || pumice_linear(&w, rows, width, x, y, 1)) return 1;
    return fwrite(y, 4 * rows * w.outputs, 1, stdout) != 1;
}
