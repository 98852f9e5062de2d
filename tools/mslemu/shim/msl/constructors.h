// float4(a, b, c, d), float4(xy, z, w), float4(x): clang's vectors have no constructors, so these are macros.
#pragma once

#include "language.h"

namespace msl {

template <class T>
struct Components {  // of a scalar: none
  static constexpr int count = 0;
};
template <class T, int N>
struct Components<metal::vec<T, N>> {
  static constexpr int count = N;
  typedef T type;
};

// Puts a scalar or a vector into v from place i on; the next place.
template <class V, class A, int N = Components<A>::count>
struct Put {
  static inline int at(V& v, int i, const A& a) {
    for (int k = 0; k < N; k++) v[i + k] = a[k];
    return i + N;
  }
};
template <class V, class A>
struct Put<V, A, 0> {
  static inline int at(V& v, int i, const A& a) {
    v[i] = static_cast<typename Components<V>::type>(a);
    return i + 1;
  }
};

template <class T, int N, class... A>
struct Construct {
  static inline metal::vec<T, N> from(A... a) {
    metal::vec<T, N> v = {};
    int i = 0;
    int each[] = {0, (i = Put<metal::vec<T, N>, A>::at(v, i, a))...};
    (void)each;
    return v;
  }
};
template <class T, int N, class A>
struct Construct<T, N, A> {  // of one argument: a scalar for all components, or a vector to convert
  static inline metal::vec<T, N> from(A a) { return one(a, (char(*)[Components<A>::count + 1]) nullptr); }
  static inline metal::vec<T, N> one(A a, char (*)[1]) { return (metal::vec<T, N>)((T)a); }
  template <int M>
  static inline metal::vec<T, N> one(A a, char (*)[M]) {
    static_assert(M == N + 1, "vector constructor: wrong number of components");
    return __builtin_convertvector(a, metal::vec<T, N>);
  }
};

template <class T, int N, class... A>
MSL_FN metal::vec<T, N> make(A... a) {
  return Construct<T, N, A...>::from(a...);
}
template <class T, int N>
MSL_FN metal::vec<T, N> make() {
  return (metal::vec<T, N>)((T)0);
}

}  // namespace msl

#define bool2(...) msl::make<bool, 2>(__VA_ARGS__)
#define bool3(...) msl::make<bool, 3>(__VA_ARGS__)
#define bool4(...) msl::make<bool, 4>(__VA_ARGS__)
#define char2(...) msl::make<char, 2>(__VA_ARGS__)
#define char3(...) msl::make<char, 3>(__VA_ARGS__)
#define char4(...) msl::make<char, 4>(__VA_ARGS__)
#define uchar2(...) msl::make<uchar, 2>(__VA_ARGS__)
#define uchar3(...) msl::make<uchar, 3>(__VA_ARGS__)
#define uchar4(...) msl::make<uchar, 4>(__VA_ARGS__)
#define short2(...) msl::make<short, 2>(__VA_ARGS__)
#define short3(...) msl::make<short, 3>(__VA_ARGS__)
#define short4(...) msl::make<short, 4>(__VA_ARGS__)
#define ushort2(...) msl::make<ushort, 2>(__VA_ARGS__)
#define ushort3(...) msl::make<ushort, 3>(__VA_ARGS__)
#define ushort4(...) msl::make<ushort, 4>(__VA_ARGS__)
#define int2(...) msl::make<int, 2>(__VA_ARGS__)
#define int3(...) msl::make<int, 3>(__VA_ARGS__)
#define int4(...) msl::make<int, 4>(__VA_ARGS__)
#define uint2(...) msl::make<uint, 2>(__VA_ARGS__)
#define uint3(...) msl::make<uint, 3>(__VA_ARGS__)
#define uint4(...) msl::make<uint, 4>(__VA_ARGS__)
#define long2(...) msl::make<long, 2>(__VA_ARGS__)
#define long3(...) msl::make<long, 3>(__VA_ARGS__)
#define long4(...) msl::make<long, 4>(__VA_ARGS__)
#define ulong2(...) msl::make<ulong, 2>(__VA_ARGS__)
#define ulong3(...) msl::make<ulong, 3>(__VA_ARGS__)
#define ulong4(...) msl::make<ulong, 4>(__VA_ARGS__)
#define half2(...) msl::make<half, 2>(__VA_ARGS__)
#define half3(...) msl::make<half, 3>(__VA_ARGS__)
#define half4(...) msl::make<half, 4>(__VA_ARGS__)
#define float2(...) msl::make<float, 2>(__VA_ARGS__)
#define float3(...) msl::make<float, 3>(__VA_ARGS__)
#define float4(...) msl::make<float, 4>(__VA_ARGS__)
#define bfloat2(...) msl::make<bfloat, 2>(__VA_ARGS__)
#define bfloat3(...) msl::make<bfloat, 3>(__VA_ARGS__)
#define bfloat4(...) msl::make<bfloat, 4>(__VA_ARGS__)

// Metal has no double.
#define double MSL_has_no_double_type
