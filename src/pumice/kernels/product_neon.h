/* The integer product with NEON's dot product: one instruction adds four bytes times four bytes in each of 4 rows.
 *
 * Both factors have a sign there, so 128 is taken from weights of 8 bits first.
 */
#include <arm_neon.h>

#define WIDE 1
#define ROWS 4
#define QUARTERS 4 /* of a tile: 4 rows each */

INLINE float32x4_t halves(const uint8_t *from) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
}
INLINE float32x4_t bytes(const uint8_t *from) {
    uint32_t four;
    memcpy(&four, from, 4);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}

/* Scales and offsets of four rows: a quarter of a tile. */
INLINE void tile_scales(const int kind, const uint8_t *from, int64_t groups, int64_t g, const int quarter,
                        float32x4_t *scale, float32x4_t *offset) {
    if (kind == Q8_0 || kind == Q4_0) *scale = halves(from + g * 32 + quarter * 8);
    else if (kind == Q4_1) {
        *scale = halves(from + g * 64 + quarter * 8);
        *offset = halves(from + g * 64 + 32 + quarter * 8);
    } else {
        const uint8_t *whole = from + 32 * groups + g / SUPER * 64 + quarter * 8, *factor = from + g * 32 + quarter * 4;
        *scale = vmulq_f32(halves(whole), bytes(factor));
        *offset = vmulq_f32(vnegq_f32(halves(whole + 32)), bytes(factor + 16));
    }
}

INLINE void multiply(const int kind, const int rows, const int tiles, const uint8_t *data, const void *unpacked,
                     int64_t inputs, const Activations *x, int64_t row, int64_t first, int64_t last, float *sums) {
    const int64_t groups = inputs / GROUP;
    const uint8_t *from = data + number_bytes(kind, inputs);
    const uint8x16_t low = vdupq_n_u8(15), flip = vdupq_n_u8(128);
    float32x4_t f[ROWS][QUARTERS];
    (void)tiles, (void)unpacked;
    for (int r = 0; r < rows; r++)
        for (int q = 0; q < QUARTERS; q++) f[r][q] = vld1q_f32(sums + r * TILE + 4 * q);
    for (int64_t g = first; g < last; g++) {
        const uint8_t *w = data + g * TILE * (kind == Q8_0 ? GROUP : GROUP / 2);
        const int8_t *a = x->numbers + row * inputs + g * GROUP;
        int32x4_t dots[ROWS][QUARTERS];
        if (rows == 1)
            for (int i = 0; i < TILE * (kind == Q8_0 ? GROUP : GROUP / 2); i += LINE) __builtin_prefetch(w + i + AHEAD);
        for (int r = 0; r < rows; r++)
            for (int q = 0; q < QUARTERS; q++) dots[r][q] = vdupq_n_s32(0);
        for (int j = 0; j < (kind == Q8_0 ? 8 : 4); j++, w += 64)
            for (int q = 0; q < QUARTERS; q++) {
                const uint8x16_t both = vld1q_u8(w + 16 * q);
                const int8x16_t lower = vreinterpretq_s8_u8(kind == Q8_0 ? veorq_u8(both, flip) : vandq_u8(both, low));
                const int8x16_t upper = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
                for (int r = 0; r < rows; r++) {
                    int32_t four, later = 0;
                    memcpy(&four, a + r * inputs + 4 * j, 4);
                    dots[r][q] = vdotq_s32(dots[r][q], lower, vreinterpretq_s8_s32(vdupq_n_s32(four)));
                    if (kind == Q8_0) continue;
                    memcpy(&later, a + r * inputs + 16 + 4 * j, 4);
                    dots[r][q] = vdotq_s32(dots[r][q], upper, vreinterpretq_s8_s32(vdupq_n_s32(later)));
                }
            }
        for (int q = 0; q < QUARTERS; q++) {
            float32x4_t scale, offset;
            tile_scales(kind, from, groups, g, q, &scale, &offset);
            for (int r = 0; r < rows; r++) {
                const int32_t total = x->sums[(row + r) * groups + g];
                int32x4_t dot = dots[r][q];
                if (kind == Q4_0) dot = vsubq_s32(dot, vdupq_n_s32(8 * total));
                float32x4_t part = vmulq_f32(vcvtq_f32_s32(dot), scale);
                if (kind == Q4_1 || kind == Q4_K) part = vfmaq_f32(part, offset, vdupq_n_f32((float)total));
                f[r][q] = vfmaq_f32(f[r][q], part, vdupq_n_f32(x->scales[(row + r) * groups + g]));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int q = 0; q < QUARTERS; q++) vst1q_f32(sums + r * TILE + 4 * q, f[r][q]);
}
