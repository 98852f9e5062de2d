// Stands in for MLX's complex.h, whose constructors are overloaded on address space. No kernel here computes with it.
#pragma once

#include <metal_stdlib>

#include "mlx/backend/metal/kernels/bf16.h"

template <class T>
struct complex_t {
  typedef T value_type;
  T real;
  T imag;
  constexpr complex_t() : real(0), imag(0) {}
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;
