// The compiler's built-in functions that MLX's bf16_math.h calls for its bfloat overloads.
#pragma once

#include "simdgroup.h"

#define MSL_BUILTIN1(name) \
  MSL_FN float __metal_##name(float x, int = 0) { return metal::name(x); }
#define MSL_BUILTIN2(name) \
  MSL_FN float __metal_##name(float x, float y, int = 0) { return metal::name(x, y); }
#define MSL_BUILTIN3(name) \
  MSL_FN float __metal_##name(float x, float y, float z, int = 0) { return metal::name(x, y, z); }
MSL_BUILTIN1(fabs)
MSL_BUILTIN1(acos)
MSL_BUILTIN1(acosh)
MSL_BUILTIN1(asin)
MSL_BUILTIN1(asinh)
MSL_BUILTIN1(atan)
MSL_BUILTIN1(atanh)
MSL_BUILTIN1(ceil)
MSL_BUILTIN1(cos)
MSL_BUILTIN1(cosh)
MSL_BUILTIN1(cospi)
MSL_BUILTIN1(exp)
MSL_BUILTIN1(exp10)
MSL_BUILTIN1(exp2)
MSL_BUILTIN1(floor)
MSL_BUILTIN1(fract)
MSL_BUILTIN1(log)
MSL_BUILTIN1(log10)
MSL_BUILTIN1(log2)
MSL_BUILTIN1(rint)
MSL_BUILTIN1(round)
MSL_BUILTIN1(rsqrt)
MSL_BUILTIN1(sin)
MSL_BUILTIN1(sinh)
MSL_BUILTIN1(sinpi)
MSL_BUILTIN1(sqrt)
MSL_BUILTIN1(tan)
MSL_BUILTIN1(tanh)
MSL_BUILTIN1(tanpi)
MSL_BUILTIN1(trunc)
MSL_BUILTIN2(atan2)
MSL_BUILTIN2(divide)
MSL_BUILTIN2(fmax)
MSL_BUILTIN2(fmin)
MSL_BUILTIN2(fmod)
MSL_BUILTIN2(pow)
MSL_BUILTIN2(powr)
MSL_BUILTIN3(fma)
MSL_BUILTIN3(fmax3)
MSL_BUILTIN3(fmin3)
MSL_BUILTIN3(fmedian3)
MSL_FN float __metal_ldexp(float x, int k, int = 0) { return metal::ldexp(x, k); }
MSL_FN float __metal_frexp(float x, thread int* e, int = 0) { return __builtin_frexpf(x, e); }
MSL_FN float __metal_nextafter(float x, float y, int = 0) { return metal::nextafter(x, y); }
MSL_FN ushort __metal_get_simdgroup_size(ushort) { return 32; }

// -1 instead of a line: the operation alone tells these apart, as they stand on the same lines for every caller
#define MSL_SIMD_BUILTIN(name)   \
  template <class T>             \
  MSL_FN T __metal_##name(T x) { \
    return metal::name(x, -1);   \
  }
#define MSL_SHUFFLE_BUILTIN(name)          \
  template <class T>                       \
  MSL_FN T __metal_##name(T x, ushort k) { \
    return metal::name(x, k, -1);          \
  }
#define MSL_FILL_BUILTIN(name)                                    \
  template <class T>                                              \
  MSL_FN T __metal_##name(T x, T fill, ushort k, ushort modulo) { \
    return metal::name(x, fill, k, modulo, 0);                    \
  }
MSL_SIMD_BUILTIN(simd_sum)
MSL_SIMD_BUILTIN(simd_product)
MSL_SIMD_BUILTIN(simd_max)
MSL_SIMD_BUILTIN(simd_min)
MSL_SIMD_BUILTIN(simd_prefix_inclusive_sum)
MSL_SIMD_BUILTIN(simd_prefix_exclusive_sum)
MSL_SIMD_BUILTIN(simd_prefix_inclusive_product)
MSL_SIMD_BUILTIN(simd_prefix_exclusive_product)
MSL_FN float __metal_simd_xor(float x) { return x; }
MSL_SHUFFLE_BUILTIN(simd_broadcast)
MSL_SHUFFLE_BUILTIN(simd_shuffle)
MSL_SHUFFLE_BUILTIN(simd_shuffle_down)
MSL_SHUFFLE_BUILTIN(simd_shuffle_up)
MSL_SHUFFLE_BUILTIN(simd_shuffle_xor)
MSL_SHUFFLE_BUILTIN(simd_shuffle_rotate_down)
MSL_SHUFFLE_BUILTIN(simd_shuffle_rotate_up)
MSL_FILL_BUILTIN(simd_shuffle_and_fill_up)
MSL_FILL_BUILTIN(simd_shuffle_and_fill_down)
