/* What depends on the compiler: the threads of OpenMP, or a single one without it, and inlining. */
#ifndef PUMICE_COMPILER_H
#define PUMICE_COMPILER_H
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif

#define INLINE static inline __attribute__((always_inline))
#endif
