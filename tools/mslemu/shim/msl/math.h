// <metal_math>, <metal_integer>, <metal_relational>, <metal_geometric>.
//
// float and half have overloads of every function, and no integer does, so that exp(2) is ambiguous here as it is in
// Metal. bfloat gets its overloads from MLX's bf16_math.h. fast:: and precise:: are the same functions: libm's.
#pragma once

#include "traits.h"

namespace metal {

#define MSL_ELEMENTWISE(name)                         \
  template <class T, int N>                           \
  MSL_FN vec<T, N> name(vec<T, N> v) {                \
    vec<T, N> r;                                      \
    for (int i = 0; i < N; i++) r[i] = name(T(v[i])); \
    return r;                                         \
  }
#define MSL_ELEMENTWISE2(name)                                 \
  template <class T, int N>                                    \
  MSL_FN vec<T, N> name(vec<T, N> v, vec<T, N> w) {            \
    vec<T, N> r;                                               \
    for (int i = 0; i < N; i++) r[i] = name(T(v[i]), T(w[i])); \
    return r;                                                  \
  }

// `result` in terms of float x, y, z
#define MSL_MATH1(name, result)                   \
  MSL_FN float name(float x) { return (result); } \
  MSL_FN half name(half a) {                      \
    float x = (float)a;                           \
    return (half)(result);                        \
  }                                               \
  MSL_ELEMENTWISE(name)
#define MSL_MATH2(name, result)                            \
  MSL_FN float name(float x, float y) { return (result); } \
  MSL_FN half name(half a, half b) {                       \
    float x = (float)a, y = (float)b;                      \
    return (half)(result);                                 \
  }                                                        \
  MSL_ELEMENTWISE2(name)
#define MSL_MATH3(name, result)                                     \
  MSL_FN float name(float x, float y, float z) { return (result); } \
  MSL_FN half name(half a, half b, half c) {                        \
    float x = (float)a, y = (float)b, z = (float)c;                 \
    return (half)(result);                                          \
  }

#define MSL_MATH                                                               \
  MSL_MATH1(exp, __builtin_expf(x))                                            \
  MSL_MATH1(exp2, __builtin_exp2f(x))                                          \
  MSL_MATH1(exp10, __builtin_powf(10.0f, x))                                   \
  MSL_MATH1(log, __builtin_logf(x))                                            \
  MSL_MATH1(log2, __builtin_log2f(x))                                          \
  MSL_MATH1(log10, __builtin_log10f(x))                                        \
  MSL_MATH1(sin, __builtin_sinf(x))                                            \
  MSL_MATH1(cos, __builtin_cosf(x))                                            \
  MSL_MATH1(tan, __builtin_tanf(x))                                            \
  MSL_MATH1(asin, __builtin_asinf(x))                                          \
  MSL_MATH1(acos, __builtin_acosf(x))                                          \
  MSL_MATH1(atan, __builtin_atanf(x))                                          \
  MSL_MATH1(sinh, __builtin_sinhf(x))                                          \
  MSL_MATH1(cosh, __builtin_coshf(x))                                          \
  MSL_MATH1(tanh, __builtin_tanhf(x))                                          \
  MSL_MATH1(asinh, __builtin_asinhf(x))                                        \
  MSL_MATH1(acosh, __builtin_acoshf(x))                                        \
  MSL_MATH1(atanh, __builtin_atanhf(x))                                        \
  MSL_MATH1(sinpi, __builtin_sinf(3.14159265358979f * x))                      \
  MSL_MATH1(cospi, __builtin_cosf(3.14159265358979f * x))                      \
  MSL_MATH1(tanpi, __builtin_tanf(3.14159265358979f * x))                      \
  MSL_MATH1(sqrt, __builtin_sqrtf(x))                                          \
  MSL_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))                                  \
  MSL_MATH1(floor, __builtin_floorf(x))                                        \
  MSL_MATH1(ceil, __builtin_ceilf(x))                                          \
  MSL_MATH1(trunc, __builtin_truncf(x))                                        \
  MSL_MATH1(round, __builtin_roundf(x))                                        \
  MSL_MATH1(rint, __builtin_rintf(x))                                          \
  MSL_MATH1(fabs, __builtin_fabsf(x))                                          \
  MSL_MATH1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))   \
  MSL_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))         \
  MSL_MATH1(sign, (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)) \
  MSL_MATH2(pow, __builtin_powf(x, y))                                         \
  MSL_MATH2(powr, __builtin_powf(x, y))                                        \
  MSL_MATH2(fmin, __builtin_fminf(x, y))                                       \
  MSL_MATH2(fmax, __builtin_fmaxf(x, y))                                       \
  MSL_MATH2(fmod, __builtin_fmodf(x, y))                                       \
  MSL_MATH2(atan2, __builtin_atan2f(x, y))                                     \
  MSL_MATH2(copysign, __builtin_copysignf(x, y))                               \
  MSL_MATH2(divide, x / y)                                                     \
  MSL_MATH2(nextafter, __builtin_nextafterf(x, y))                             \
  MSL_MATH2(fdim, __builtin_fdimf(x, y))                                       \
  MSL_MATH2(step, (y < x ? 0.0f : 1.0f))                                       \
  MSL_MATH3(fma, __builtin_fmaf(x, y, z))                                      \
  MSL_MATH3(mix, x + (y - x) * z)                                              \
  MSL_MATH3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z)))                  \
  MSL_MATH3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))                  \
  MSL_MATH3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}

#define MSL_FLOAT_QUESTION(name, answer)         \
  MSL_FN bool name(float x) { return (answer); } \
  MSL_FN bool name(half a) {                     \
    float x = (float)a;                          \
    return (answer);                             \
  }                                              \
  MSL_FN bool name(bfloat a) {                   \
    float x = (float)a;                          \
    return (answer);                             \
  }
MSL_FLOAT_QUESTION(isnan, __builtin_isnan(x))
MSL_FLOAT_QUESTION(isinf, __builtin_isinf(x))
MSL_FLOAT_QUESTION(isfinite, __builtin_isfinite(x))
MSL_FLOAT_QUESTION(signbit, (as_type<uint>(x) >> 31) != 0)
MSL_FN float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
MSL_FN half ldexp(half x, int k) { return (half)__builtin_ldexpf((float)x, k); }
MSL_FN float frexp(float x, thread int& e) { return __builtin_frexpf(x, &e); }

#define MSL_INTEGER_ORDER(T)                                      \
  MSL_FN T min(T x, T y) { return y < x ? y : x; }                \
  MSL_FN T max(T x, T y) { return x < y ? y : x; }                \
  MSL_FN T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); } \
  MSL_FN T min3(T x, T y, T z) { return min(x, min(y, z)); }      \
  MSL_FN T max3(T x, T y, T z) { return max(x, max(y, z)); }
MSL_INTEGER_ORDER(char)
MSL_INTEGER_ORDER(uchar)
MSL_INTEGER_ORDER(short)
MSL_INTEGER_ORDER(ushort)
MSL_INTEGER_ORDER(int)
MSL_INTEGER_ORDER(uint)
MSL_INTEGER_ORDER(long)
MSL_INTEGER_ORDER(ulong)
// of a number and a NaN, the number
#define MSL_FLOAT_ORDER(T)                                                  \
  MSL_FN T min(T x, T y) { return (T)__builtin_fminf((float)x, (float)y); } \
  MSL_FN T max(T x, T y) { return (T)__builtin_fmaxf((float)x, (float)y); } \
  MSL_FN T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_FLOAT_ORDER(float)
MSL_FLOAT_ORDER(half)
MSL_ELEMENTWISE2(min)
MSL_ELEMENTWISE2(max)
template <class T, int N>
MSL_FN vec<T, N> clamp(vec<T, N> v, T lo, T hi) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = clamp(T(v[i]), lo, hi);
  return r;
}

MSL_FN float abs(float x) { return __builtin_fabsf(x); }
MSL_FN half abs(half x) { return (half)__builtin_fabsf((float)x); }
MSL_FN int abs(int x) { return x < 0 ? -x : x; }
MSL_FN short abs(short x) { return x < 0 ? -x : x; }
MSL_FN char abs(char x) { return x < 0 ? -x : x; }
MSL_FN long abs(long x) { return x < 0 ? -x : x; }
MSL_ELEMENTWISE(abs)

template <class T>
MSL_FN T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, class B, int N>
MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<B, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class B, int N>
MSL_FN bool any(vec<B, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || c[i];
  return r;
}
template <class B, int N>
MSL_FN bool all(vec<B, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && c[i];
  return r;
}
template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
template <class T, int N>
MSL_FN T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}

MSL_FN uint popcount(uint x) { return (uint)__builtin_popcount(x); }
MSL_FN int popcount(int x) { return __builtin_popcount((uint)x); }
MSL_FN ulong popcount(ulong x) { return (ulong)__builtin_popcountl(x); }
MSL_FN uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32u; }
MSL_FN int clz(int x) { return x ? __builtin_clz((uint)x) : 32; }
MSL_FN ulong clz(ulong x) { return x ? (ulong)__builtin_clzl(x) : 64ul; }
MSL_FN uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32u; }
MSL_FN int ctz(int x) { return x ? __builtin_ctz((uint)x) : 32; }
MSL_FN ulong ctz(ulong x) { return x ? (ulong)__builtin_ctzl(x) : 64ul; }
MSL_FN uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
MSL_FN uint rotate(uint x, uint n) { return (x << (n & 31)) | (x >> ((32 - n) & 31)); }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_FN int mul24(int a, int b) { return a * b; }
MSL_FN uint mul24(uint a, uint b) { return a * b; }
MSL_FN int mad24(int a, int b, int c) { return a * b + c; }
MSL_FN uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0u : (x >> offset) & (bits >= 32 ? ~0u : ((1u << bits) - 1u));
}
template <class T>
MSL_FN T absdiff(T a, T b) {
  return a < b ? b - a : a - b;
}

}  // namespace metal
