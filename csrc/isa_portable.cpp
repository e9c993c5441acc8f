// What any processor can run: SSE2 on x86-64, NEON on aarch64.
#define LOKU_ISA portable
#include "simd_portable.h"

#include "fisher_kernels.h"
#include "gram_kernels.h"
#include "probe_kernels.h"
#include "row_kernels.h"
