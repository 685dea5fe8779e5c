/* Attention of a prompt, as `attend.c` computes it. */
#ifndef PUMICE_ATTEND_H
#define PUMICE_ATTEND_H
#include <stdint.h>

/* T new tokens of one sequence, whose keys and values are in the cache already. */
typedef struct {
    const float *q; /* (H, T, d) with these distances */
    int64_t q_head, q_token;
    const uint16_t *keys, *values; /* (K, C, d), bfloat16 */
    const int64_t *table;          /* the sequence's blocks */
    int64_t block, capacity, past, tokens, window, heads, kv_heads, size; /* size: a multiple of LANES. window: 0 none */
    float *y; /* (T, H, d) */
} Task;

/* The bytes that each thread needs. */
int64_t pumice_attend_bytes(const Task *task);

/* Compute this thread's share; to be called by all threads of a parallel region, which then need a barrier. */
void pumice_attend_part(const Task *task, float *memory);
#endif
