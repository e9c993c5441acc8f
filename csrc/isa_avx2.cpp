// Processors with AVX2, FMA and F16C.
#if defined(__x86_64__)

#include "target.h"

LOKU_TARGET("avx2,fma,f16c")
#define LOKU_ISA avx2
#include "simd_avx2.h"

#include "fisher_kernels.h"
#include "gram_kernels.h"
#include "probe_kernels.h"
#include "row_kernels.h"
LOKU_TARGET_END

#endif
