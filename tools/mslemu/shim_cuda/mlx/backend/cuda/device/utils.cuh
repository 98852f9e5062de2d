// Stands in for MLX's device utilities where only the compiler is there: what generated kernels name in signatures.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mlx::core::cu {
template <typename T>
struct MslTenOf {
  T values[10];  // MAX_NDIM
  __host__ __device__ T operator[](int i) const { return values[i]; }
};
using Shape = MslTenOf<int32_t>;
using Strides = MslTenOf<int64_t>;
struct complex64_t {
  float x, y;
};
}  // namespace mlx::core::cu
