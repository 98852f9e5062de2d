// Address spaces, scalar and vector types, constants, and the functions of the runtime.
#pragma once

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define __METAL_MACOS__ 1
#define MSL_EMULATED 1

#if defined(MSL_AS_CHECK)
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant const
#define threadgroup
#endif
#define thread
// prepare.py puts this in front of every *variable* in threadgroup memory. One static variable is enough, since one
// threadgroup runs at a time; the runtime finds all of them in their own section.
#define MSL_TGVAR static __attribute__((section("msl_tg"), used))

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_INTERNAL inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
#define METAL_PURE __attribute__((pure))
#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define MSL_FN static inline __attribute__((always_inline, unused))
#define MSL_UNWATCHED __attribute__((no_sanitize("thread")))  // accesses are the emulator's, not the kernel's

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

#pragma clang diagnostic ignored "-Wreserved-user-defined-literal"
#pragma clang diagnostic ignored "-Wuser-defined-literals"
constexpr half operator""h(long double value) { return (half)value; }
constexpr bfloat operator"" bf(long double value) { return (bfloat)(float)value; }

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}

#define MSL_VECTORS(T)                                            \
  typedef metal::vec<T, 2> T##2;                                  \
  typedef metal::vec<T, 3> T##3;                                  \
  typedef metal::vec<T, 4> T##4;                                  \
  typedef T##2 packed_##T##2 __attribute__((aligned(sizeof(T)))); \
  typedef T##4 packed_##T##4 __attribute__((aligned(sizeof(T))));
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(half)
MSL_VECTORS(float)
MSL_VECTORS(bfloat)
typedef metal::vec<bool, 2> bool2;
typedef metal::vec<bool, 3> bool3;
typedef metal::vec<bool, 4> bool4;

template <class To, class From>
MSL_FN constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, x);
}

#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 0x1.fffffep127f
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1p-126f
#define FLT_EPSILON 0x1p-23f
#define INT_MAX 2147483647
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 0xffffffffu
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_SQRT2_F 1.41421356237309504880f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_E_F 2.71828182845904523536f

// ../../runtime/hooks.h
extern "C" {
typedef void (*MslOperation)(void** lanes, int width);  // a lane that does not take part is null
void msl_collective(void* payload, MslOperation operation, const char* name, int width, int line);
void msl_barrier(int flags, int line);
void msl_simd_barrier(int flags, int line);
void msl_atomic_access(const volatile void* address, int size, int kind);
void msl_inactive_lane(const char* name, int line);
}
