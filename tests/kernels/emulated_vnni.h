/* The AVX-512 instructions of product_vnni.h in plain C, so that its logic is tested where the processor lacks them. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#define __AVX512VNNI__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define IN_REGISTER(value)

typedef struct { float v[16]; } floats;
typedef struct { uint8_t v[64]; } integers;
typedef struct { uint8_t v[16]; } small;

static inline floats e_load_floats(const void *from) { floats x; memcpy(&x, from, 64); return x; }
static inline integers e_load_integers(const void *from) { integers x; memcpy(&x, from, 64); return x; }
static inline small e_load_small(const void *from) { small x; memcpy(&x, from, 16); return x; }
static inline void e_store_integers(void *to, integers x) { memcpy(to, &x, 64); }
static inline void e_store_floats(void *to, floats x) { memcpy(to, &x, 64); }
static inline floats e_all_floats(float value) { floats x; for (int i = 0; i < 16; i++) x.v[i] = value; return x; }
static inline integers e_all_integers(int32_t value) {
    integers x;
    for (int i = 0; i < 16; i++) memcpy(x.v + 4 * i, &value, 4);
    return x;
}
static inline integers e_all_bytes(char value) { integers x; memset(&x, value, 64); return x; }
static inline floats e_from_halves(const void *from) {
    floats x;
    for (int i = 0; i < 16; i++) {
        uint16_t half;
        memcpy(&half, (const char *)from + 2 * i, 2);
        int exponent = half >> 10 & 31, rest = half & 1023;
        float size = exponent ? ldexpf(1024 + rest, exponent - 25) : ldexpf(rest, -24);
        x.v[i] = half & 0x8000 ? -size : size;
    }
    return x;
}
static inline floats e_to_floats(integers x) {
    floats y;
    for (int i = 0; i < 16; i++) { int32_t n; memcpy(&n, x.v + 4 * i, 4); y.v[i] = (float)n; }
    return y;
}
static inline integers e_widen(small x) {
    integers y;
    for (int i = 0; i < 16; i++) { int32_t n = x.v[i]; memcpy(y.v + 4 * i, &n, 4); }
    return y;
}
static inline floats e_times(floats a, floats b) { for (int i = 0; i < 16; i++) a.v[i] *= b.v[i]; return a; }
static inline floats e_fused(floats a, floats b, floats c) {
    for (int i = 0; i < 16; i++) c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
static inline integers e_both(integers a, integers b) { for (int i = 0; i < 64; i++) a.v[i] &= b.v[i]; return a; }
static inline integers e_shift(integers a, int by) {
    for (int i = 0; i < 32; i++) { uint16_t n; memcpy(&n, a.v + 2 * i, 2); n >>= by; memcpy(a.v + 2 * i, &n, 2); }
    return a;
}
static inline integers e_either(integers a, integers b) { for (int i = 0; i < 64; i++) a.v[i] |= b.v[i]; return a; }
static inline integers e_shift_left(integers a, int by) {
    for (int i = 0; i < 16; i++) { uint32_t n; memcpy(&n, a.v + 4 * i, 4); n <<= by; memcpy(a.v + 4 * i, &n, 4); }
    return a;
}
static inline floats e_minus_product(floats a, floats b, floats c) {
    for (int i = 0; i < 16; i++) c.v[i] = fmaf(-a.v[i], b.v[i], c.v[i]);
    return c;
}
static inline integers e_dot_of_pairs(integers sum, integers a, integers b) {
    for (int i = 0; i < 16; i++) {
        int32_t n;
        int16_t x[2], y[2];
        memcpy(&n, sum.v + 4 * i, 4);
        memcpy(x, a.v + 4 * i, 4);
        memcpy(y, b.v + 4 * i, 4);
        n += x[0] * y[0] + x[1] * y[1];
        memcpy(sum.v + 4 * i, &n, 4);
    }
    return sum;
}
static inline integers e_dot(integers sum, integers a, integers b) {
    for (int i = 0; i < 16; i++) {
        int32_t n;
        memcpy(&n, sum.v + 4 * i, 4);
        for (int k = 0; k < 4; k++) n += a.v[4 * i + k] * (int8_t)b.v[4 * i + k];
        memcpy(sum.v + 4 * i, &n, 4);
    }
    return sum;
}

#define __m512 floats
#define __m512i integers
#define __m256i const void *
#define __m128i small
#define _mm256_loadu_si256(from) ((const void *)(from))
#define _mm_loadu_si128(from) e_load_small(from)
#define _mm512_cvtph_ps e_from_halves
#define _mm512_cvtepu8_epi32 e_widen
#define _mm512_cvtepi32_ps e_to_floats
#define _mm512_loadu_ps e_load_floats
#define _mm512_storeu_ps e_store_floats
#define _mm512_storeu_si512 e_store_integers
#define _mm512_loadu_si512 e_load_integers
#define _mm512_setzero_ps() e_all_floats(0)
#define _mm512_setzero_si512() e_all_integers(0)
#define _mm512_set1_ps e_all_floats
#define _mm512_set1_epi32 e_all_integers
#define _mm512_set1_epi8 e_all_bytes
#define _mm512_mul_ps e_times
#define _mm512_fnmadd_ps e_minus_product
#define _mm512_fmadd_ps e_fused
#define _mm512_and_si512 e_both
#define _mm512_or_si512 e_either
#define _mm512_slli_epi32 e_shift_left
#define _mm512_srli_epi16 e_shift
#define _mm512_dpbusd_epi32 e_dot
#define _mm512_dpwssd_epi32 e_dot_of_pairs
