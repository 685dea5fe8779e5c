/* The integer product in plain C: for processors without their own kernel, and as the reference for those kernels. */
#ifdef FP_FAST_FMAF /* explicit, because whether a compiler contracts a * b + c depends on the code around it */
#define ADD_PRODUCT(a, b, c) __builtin_fmaf(a, b, c)
#else
#define ADD_PRODUCT(a, b, c) ((a) * (b) + (c))
#endif
#define WIDE 1 /* tiles that are multiplied together */
#define ROWS 4 /* rows that are multiplied together */

INLINE void tile_scales(const int kind, const uint8_t *from, int64_t groups, int64_t g, float *scale, float *offset) {
    const uint16_t *halves = (const uint16_t *)from;
    for (int c = 0; c < TILE; c++) {
        offset[c] = 0;
        if (kind == Q8_0 || kind == Q4_0) scale[c] = from_half(halves[g * TILE + c]);
        else if (kind == Q4_1) {
            scale[c] = from_half(halves[2 * g * TILE + c]);
            offset[c] = from_half(halves[2 * g * TILE + TILE + c]);
        } else {
            const uint16_t *whole = (const uint16_t *)(from + 2 * TILE * groups) + g / SUPER * 2 * TILE;
            scale[c] = from_half(whole[c]) * from[2 * g * TILE + c];
            offset[c] = -from_half(whole[TILE + c]) * from[2 * g * TILE + TILE + c];
        }
    }
}

INLINE void multiply(const int kind, const int rows, const int tiles, const uint8_t *data, const void *unpacked,
                     int64_t inputs, const Activations *x, int64_t row, int64_t first, int64_t last, float *sums) {
    const int64_t groups = inputs / GROUP;
    (void)tiles, (void)unpacked;
    for (int64_t g = first; g < last; g++) {
        float scale[TILE], offset[TILE];
        tile_scales(kind, data + number_bytes(kind, inputs), groups, g, scale, offset);
        const uint8_t *w = data + g * TILE * (kind == Q8_0 ? GROUP : GROUP / 2);
        for (int r = 0; r < rows; r++) {
            const int8_t *a = x->numbers + (row + r) * inputs + g * GROUP;
            const int32_t total = x->sums[(row + r) * groups + g];
            int32_t dots[TILE];
            for (int c = 0; c < TILE; c++) dots[c] = kind == Q8_0 ? -128 * total : kind == Q4_0 ? -8 * total : 0;
            if (kind == Q8_0)
                for (int j = 0; j < 8; j++)
                    for (int c = 0; c < TILE; c++)
                        for (int b = 0; b < 4; b++) dots[c] += w[(j * TILE + c) * 4 + b] * a[4 * j + b];
            else
                for (int j = 0; j < 4; j++)
                    for (int c = 0; c < TILE; c++)
                        for (int b = 0; b < 4; b++) {
                            const int both = w[(j * TILE + c) * 4 + b];
                            dots[c] += (both & 15) * a[4 * j + b] + (both >> 4) * a[16 + 4 * j + b];
                        }
            const float by = x->scales[(row + r) * groups + g];
            for (int c = 0; c < TILE; c++) {
                float part = (float)dots[c] * scale[c];
                if (kind == Q4_1 || kind == Q4_K) part = ADD_PRODUCT(offset[c], (float)total, part);
                sums[r * TILE + c] = ADD_PRODUCT(part, by, sums[r * TILE + c]);
            }
        }
    }
}
