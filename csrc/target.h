// Compiles the rest of a file for an instruction set, whatever the command line says: LOKU_TARGET("avx2,fma").
//
// The system's headers come first, so that no function of theirs is compiled for one instruction set and then chosen by
// the linker for all.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#define LOKU_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LOKU_TARGET(features) LOKU_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LOKU_TARGET_END LOKU_PRAGMA(clang attribute pop)
#else
#define LOKU_TARGET(features) LOKU_PRAGMA(GCC target(features))
#define LOKU_TARGET_END
#endif
