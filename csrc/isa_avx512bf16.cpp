// Processors with AVX-512 and its bfloat16 instructions.
#if defined(__x86_64__)

#include "target.h"

LOKU_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#define LOKU_ISA avx512bf16
#define LOKU_BF16_INSTRUCTIONS
#include "simd_avx512.h"

#include "fisher_kernels.h"
#include "gram_kernels.h"
#include "probe_kernels.h"
#include "row_kernels.h"
LOKU_TARGET_END

#endif
