// Processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)

#include "target.h"

LOKU_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define LOKU_ISA avx512
#include "simd_avx512.h"

#include "fisher_kernels.h"
#include "gram_kernels.h"
#include "probe_kernels.h"
#include "row_kernels.h"
LOKU_TARGET_END

#endif
