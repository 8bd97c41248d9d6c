// What kernels.inl needs from outside; included before an instruction set is chosen.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arena.h"
#include "params.h"

// Compiles what follows, and nothing before it, for an instruction set: not a compiler flag, which
// would compile the standard library's inline functions for it too, and the linker may keep that
// copy for everyone.
#define FASTATTN_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define TARGET_BEGIN(features) \
    FASTATTN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define TARGET_BEGIN(features) FASTATTN_PRAGMA(GCC target(features))
#define TARGET_END  // of the file: templates are instantiated there
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
