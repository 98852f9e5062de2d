// <metal_simdgroup_matrix>: 8x8 matrices spread over a simdgroup, two elements per lane.
//
// Metal does not say which lane holds which element; this is the layout MLX's steel kernels count on
// (BaseMMAFrag::get_coord in mlx/backend/metal/kernels/steel/gemm/mma.h).
#pragma once

#include "simdgroup.h"

namespace metal {

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T value) { elements = (vec<T, 2>)(value); }
  thread vec<T, 2>& thread_elements() { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

MSL_FN int msl_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
MSL_FN int msl_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

struct MslLane {
  int lane;
};
MSL_UNWATCHED static inline void msl_number_lanes(void** lanes, int n) {
  for (int i = 0; i < n; i++)
    if (lanes[i]) ((MslLane*)lanes[i])->lane = i;
}
// waits for the whole simdgroup
MSL_FN int msl_converged_lane(const char* name, int line) {
  MslLane payload;
  MSL_WAIT(msl_number_lanes, name, 32);
  return payload.lane;
}

template <class D, class A, class B, class C>
struct MslProduct {
  vec<D, 2> d;
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};
template <class D, class A, class B, class C>
MSL_UNWATCHED void msl_multiply_accumulate(void** lanes, int n) {
  MslProduct<D, A, B, C>** p = (MslProduct<D, A, B, C>**)lanes;
  float a[8][8], b[8][8];
  for (int i = 0; i < n; i++) {
    if (!p[i]) {
      msl_inactive_lane("simdgroup_multiply_accumulate", 0);
      return;
    }
    for (int k = 0; k < 2; k++) {
      a[msl_row(i)][msl_column(i) + k] = (float)p[i]->a[k];
      b[msl_row(i)][msl_column(i) + k] = (float)p[i]->b[k];
    }
  }
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < 2; k++) {
      float sum = (float)p[i]->c[k];
      for (int j = 0; j < 8; j++) sum += a[msl_row(i)][j] * b[j][msl_column(i) + k];
      p[i]->d[k] = (D)sum;
    }
  }
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d,
                                          const thread simdgroup_matrix<A, 8, 8>& a,
                                          const thread simdgroup_matrix<B, 8, 8>& b,
                                          const thread simdgroup_matrix<C, 8, 8>& c, int line = __builtin_LINE()) {
  MslProduct<D, A, B, C> payload;
  payload.a = a.elements;
  payload.b = b.elements;
  payload.c = c.elements;
  msl_collective(&payload, (MslOperation)&msl_multiply_accumulate<D, A, B, C>, "simdgroup_multiply_accumulate", 32,
                 line);
  d.elements = payload.d;
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, const thread simdgroup_matrix<A, 8, 8>& a,
                               const thread simdgroup_matrix<B, 8, 8>& b, int line = __builtin_LINE()) {
  simdgroup_matrix<D, 8, 8> zero((D)0);
  simdgroup_multiply_accumulate(d, a, b, zero, line);
}
template <class T, int R, int C>
MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, R, C>(value);
}

#define MSL_MATRIX_MEMORY(SPACE)                                                                                    \
  template <class T>                                                                                                \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const SPACE T* from, ulong row_length = 8,        \
                             ulong2 origin = (ulong2)(0ul), bool transpose = false, int line = __builtin_LINE()) {  \
    const int lane = msl_converged_lane("simdgroup_load", line);                                                    \
    from += origin.y * row_length + origin.x;                                                                       \
    for (int k = 0; k < 2; k++) {                                                                                   \
      const int r = msl_row(lane), c = msl_column(lane) + k;                                                        \
      d.elements[k] = transpose ? from[c * row_length + r] : from[r * row_length + c];                              \
    }                                                                                                               \
  }                                                                                                                 \
  template <class T>                                                                                                \
  MSL_FN void simdgroup_store(thread simdgroup_matrix<T, 8, 8> d, SPACE T* to, ulong row_length = 8,                \
                              ulong2 origin = (ulong2)(0ul), bool transpose = false, int line = __builtin_LINE()) { \
    const int lane = msl_converged_lane("simdgroup_store", line);                                                   \
    to += origin.y * row_length + origin.x;                                                                         \
    for (int k = 0; k < 2; k++) {                                                                                   \
      const int r = msl_row(lane), c = msl_column(lane) + k;                                                        \
      if (transpose)                                                                                                \
        to[c * row_length + r] = d.elements[k];                                                                     \
      else                                                                                                          \
        to[r * row_length + c] = d.elements[k];                                                                     \
    }                                                                                                               \
  }
MSL_MATRIX_MEMORY(device)
#if defined(MSL_AS_CHECK)
MSL_MATRIX_MEMORY(threadgroup)
#endif

}  // namespace metal
