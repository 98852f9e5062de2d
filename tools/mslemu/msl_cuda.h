// Metal's names on CUDA, so that one kernel text serves mx.fast.metal_kernel and mx.fast.cuda_kernel.
//
// Goes in front of the author's header, inside namespace mlx::core::cu, so that CUDA's own max, exp and float4 stay
// out of the way; MSL_TGVAR stands before each threadgroup variable by then (prepare.py).
// Not covered: simdgroup_matrix, swizzles, 0-d inputs (a pointer here, a reference in Metal), and grids that are not
// a multiple of the threadgroup (CUDA runs the surplus threads).
#ifndef MSL_CUDA_PRELUDE
#define MSL_CUDA_PRELUDE

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;
typedef __nv_bfloat16 bfloat;
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define MSL_FN __device__ inline

namespace metal {

// ---------------------------------------------------------------- vectors
template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec;
#define MSL_VECTOR_ACCESS                         \
  MSL_FN T& operator[](int i) { return (&x)[i]; } \
  MSL_FN const T& operator[](int i) const { return (&x)[i]; }
template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
  T x, y;
  MSL_FN vec() {}
  MSL_FN explicit vec(T all) : x(all), y(all) {}
  MSL_FN vec(T a, T b) : x(a), y(b) {}
  template <class U>
  MSL_FN explicit vec(vec<U, 2> v) : x(T(v.x)), y(T(v.y)) {}
  MSL_VECTOR_ACCESS
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 3> {
  T x, y, z;
  MSL_FN vec() {}
  MSL_FN explicit vec(T all) : x(all), y(all), z(all) {}
  MSL_FN vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <class U>
  MSL_FN explicit vec(vec<U, 3> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  MSL_VECTOR_ACCESS
};
template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
  T x, y, z, w;
  MSL_FN vec() {}
  MSL_FN explicit vec(T all) : x(all), y(all), z(all), w(all) {}
  MSL_FN vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <class U>
  MSL_FN explicit vec(vec<U, 4> v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  MSL_VECTOR_ACCESS
};
#define MSL_VECTOR_OPERATOR(OP)                                 \
  template <class T, int N>                                     \
  MSL_FN vec<T, N> operator OP(vec<T, N> a, vec<T, N> b) {      \
    vec<T, N> r;                                                \
    for (int i = 0; i < N; i++) r[i] = a[i] OP b[i];            \
    return r;                                                   \
  }                                                             \
  template <class T, int N>                                     \
  MSL_FN vec<T, N> operator OP(vec<T, N> a, T b) {              \
    return a OP vec<T, N>(b);                                   \
  }                                                             \
  template <class T, int N>                                     \
  MSL_FN vec<T, N> operator OP(T a, vec<T, N> b) {              \
    return vec<T, N>(a) OP b;                                   \
  }                                                             \
  template <class T, int N>                                     \
  MSL_FN vec<T, N>& operator OP##=(vec<T, N>& a, vec<T, N> b) { \
    return a = a OP b;                                          \
  }                                                             \
  template <class T, int N>                                     \
  MSL_FN vec<T, N>& operator OP##=(vec<T, N>& a, T b) {         \
    return a = a OP b;                                          \
  }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}

// ---------------------------------------------------------------- mathematics
#define MSL_MATH1(name, result) \
  MSL_FN float name(float x) { return result; }
MSL_MATH1(exp, ::expf(x))
MSL_MATH1(exp2, ::exp2f(x))
MSL_MATH1(log, ::logf(x))
MSL_MATH1(log2, ::log2f(x))
MSL_MATH1(log10, ::log10f(x))
MSL_MATH1(log1p, ::log1pf(x))  // MLX's utils.h
MSL_MATH1(erf, ::erff(x))      // MLX's erf.h
MSL_MATH1(sqrt, ::sqrtf(x))
MSL_MATH1(rsqrt, ::rsqrtf(x))
MSL_MATH1(floor, ::floorf(x))
MSL_MATH1(ceil, ::ceilf(x))
MSL_MATH1(round, ::roundf(x))
MSL_MATH1(rint, ::rintf(x))
MSL_MATH1(trunc, ::truncf(x))
MSL_MATH1(abs, ::fabsf(x))
MSL_MATH1(fabs, ::fabsf(x))
MSL_MATH1(sin, ::sinf(x))
MSL_MATH1(cos, ::cosf(x))
MSL_MATH1(tanh, ::tanhf(x))
MSL_FN float pow(float x, float y) { return ::powf(x, y); }
MSL_FN float fmin(float x, float y) { return ::fminf(x, y); }
MSL_FN float fmax(float x, float y) { return ::fmaxf(x, y); }
MSL_FN float fma(float x, float y, float z) { return ::fmaf(x, y, z); }
namespace fast {
MSL_MATH1(exp, ::__expf(x))
MSL_MATH1(exp2, ::exp2f(x))
MSL_MATH1(log, ::__logf(x))
MSL_MATH1(log2, ::__log2f(x))
MSL_MATH1(rsqrt, ::rsqrtf(x))
}  // namespace fast
namespace precise {
MSL_MATH1(exp, ::expf(x))
MSL_MATH1(exp2, ::exp2f(x))
MSL_MATH1(log, ::logf(x))
MSL_MATH1(log2, ::log2f(x))
MSL_MATH1(sqrt, ::sqrtf(x))
}  // namespace precise

#define MSL_ORDER(T)                               \
  MSL_FN T min(T a, T b) { return b < a ? b : a; } \
  MSL_FN T max(T a, T b) { return a < b ? b : a; } \
  MSL_FN T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_ORDER(int)
MSL_ORDER(uint)
MSL_ORDER(short)
MSL_ORDER(ushort)
MSL_ORDER(float)
MSL_ORDER(long)
MSL_ORDER(unsigned long)  // size_t
MSL_ORDER(long long)
MSL_ORDER(ulong)
MSL_FN int abs(int x) { return x < 0 ? -x : x; }
MSL_FN bool isnan(float x) { return x != x; }
MSL_FN bool isinf(float x) { return x == INFINITY || x == -INFINITY; }
template <class T>
MSL_FN T select(T a, T b, bool c) {
  return c ? b : a;
}
MSL_FN uint popcount(uint x) { return __popc(x); }
MSL_FN uint clz(uint x) { return __clz(x); }
MSL_FN uint ctz(uint x) { return x ? __ffs(x) - 1 : 32; }
MSL_FN uint mulhi(uint a, uint b) { return __umulhi(a, b); }
MSL_FN uint rotate(uint x, uint n) { return __funnelshift_l(x, x, n); }
MSL_FN uint reverse_bits(uint x) { return __brev(x); }
template <class To, class From>
MSL_FN To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}

// ---------------------------------------------------------------- barriers and simdgroups
// A barrier orders all memory on CUDA, whatever its flags.
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_FN mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __syncwarp(); }

MSL_FN uint msl_thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
MSL_FN uint msl_lane() { return msl_thread_index() & 31u; }

#define MSL_ALL_LANES 0xffffffffu
#define MSL_REDUCTION(name, lanes, combined)         \
  template <class T>                                 \
  MSL_FN T name(T a) {                               \
    for (int step = 1; step < lanes; step <<= 1) {   \
      T b = __shfl_xor_sync(MSL_ALL_LANES, a, step); \
      a = (combined);                                \
    }                                                \
    return a;                                        \
  }
MSL_REDUCTION(simd_sum, 32, a + b)
MSL_REDUCTION(simd_product, 32, a * b)
MSL_REDUCTION(simd_max, 32, a < b ? b : a)
MSL_REDUCTION(simd_min, 32, b < a ? b : a)
MSL_REDUCTION(simd_and, 32, a & b)
MSL_REDUCTION(simd_or, 32, a | b)
MSL_REDUCTION(simd_xor, 32, a ^ b)
MSL_REDUCTION(quad_sum, 4, a + b)
MSL_REDUCTION(quad_max, 4, a < b ? b : a)
MSL_REDUCTION(quad_min, 4, b < a ? b : a)
MSL_FN bool simd_all(bool x) { return __all_sync(MSL_ALL_LANES, x); }
MSL_FN bool simd_any(bool x) { return __any_sync(MSL_ALL_LANES, x); }

#define MSL_SHUFFLE(name, result) \
  template <class T>              \
  MSL_FN T name(T x, ushort k) {  \
    return result;                \
  }
MSL_SHUFFLE(simd_broadcast, __shfl_sync(MSL_ALL_LANES, x, k))
MSL_SHUFFLE(simd_shuffle, __shfl_sync(MSL_ALL_LANES, x, k))
MSL_SHUFFLE(simd_shuffle_down, __shfl_down_sync(MSL_ALL_LANES, x, k))
MSL_SHUFFLE(simd_shuffle_up, __shfl_up_sync(MSL_ALL_LANES, x, k))
MSL_SHUFFLE(simd_shuffle_xor, __shfl_xor_sync(MSL_ALL_LANES, x, k))
MSL_SHUFFLE(quad_broadcast, __shfl_sync(MSL_ALL_LANES, x, k, 4))
MSL_SHUFFLE(quad_shuffle, __shfl_sync(MSL_ALL_LANES, x, k, 4))
MSL_SHUFFLE(quad_shuffle_xor, __shfl_xor_sync(MSL_ALL_LANES, x, k, 4))
template <class T>
MSL_FN T simd_prefix_inclusive_sum(T x) {
  for (uint step = 1; step < 32; step <<= 1) {
    T below = __shfl_up_sync(MSL_ALL_LANES, x, step);
    if (msl_lane() >= step) x += below;
  }
  return x;
}
template <class T>
MSL_FN T simd_prefix_exclusive_sum(T x) {
  T below = __shfl_up_sync(MSL_ALL_LANES, simd_prefix_inclusive_sum(x), 1);
  return msl_lane() == 0 ? T(0) : below;
}

// ---------------------------------------------------------------- atomics: an output is a plain pointer on CUDA
template <class T>
using atomic = T;
typedef int atomic_int;
typedef uint atomic_uint;
typedef float atomic_float;
enum memory_order { memory_order_relaxed };
#define MSL_ATOMIC(name, result)           \
  template <class T>                       \
  MSL_FN T name(T* p, T v, memory_order) { \
    return result;                         \
  }
MSL_ATOMIC(atomic_fetch_add_explicit, atomicAdd(p, v))
MSL_ATOMIC(atomic_fetch_max_explicit, atomicMax(p, v))
MSL_ATOMIC(atomic_fetch_min_explicit, atomicMin(p, v))
MSL_ATOMIC(atomic_fetch_or_explicit, atomicOr(p, v))
MSL_ATOMIC(atomic_exchange_explicit, atomicExch(p, v))
template <class T>
MSL_FN void atomic_store_explicit(T* p, T v, memory_order) {
  atomicExch(p, v);
}
template <class T>
MSL_FN T atomic_load_explicit(const T* p, memory_order) {
  return *(const volatile T*)p;
}

// ---------------------------------------------------------------- where a thread is
typedef vec<uint, 3> MslPlace;
MSL_FN MslPlace msl_thread_in_group() { return MslPlace(threadIdx.x, threadIdx.y, threadIdx.z); }
MSL_FN MslPlace msl_group_in_grid() { return MslPlace(blockIdx.x, blockIdx.y, blockIdx.z); }
MSL_FN MslPlace msl_group_size() { return MslPlace(blockDim.x, blockDim.y, blockDim.z); }
MSL_FN MslPlace msl_groups() { return MslPlace(gridDim.x, gridDim.y, gridDim.z); }
MSL_FN MslPlace msl_thread_in_grid() {
  return MslPlace(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
                  blockIdx.z * blockDim.z + threadIdx.z);
}
MSL_FN MslPlace msl_grid_size() {
  return MslPlace(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
}

}  // namespace metal
using namespace metal;

#define thread_position_in_grid (metal::msl_thread_in_grid())
#define thread_position_in_threadgroup (metal::msl_thread_in_group())
#define threadgroup_position_in_grid (metal::msl_group_in_grid())
#define threads_per_threadgroup (metal::msl_group_size())
#define threadgroups_per_grid (metal::msl_groups())
#define threads_per_grid (metal::msl_grid_size())
#define thread_index_in_threadgroup (metal::msl_thread_index())
#define thread_index_in_simdgroup (metal::msl_lane())
#define thread_index_in_quadgroup (metal::msl_thread_index() & 3u)
#define simdgroup_index_in_threadgroup (metal::msl_thread_index() >> 5)
#define quadgroup_index_in_threadgroup (metal::msl_thread_index() >> 2)
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z + 31u) >> 5)
#define threads_per_simdgroup 32u
#define thread_execution_width 32u

// ---------------------------------------------------------------- the language
#define thread
#define constant const
#define threadgroup
#define MSL_TGVAR __shared__
#define METAL_FUNC __forceinline__ __device__
#define float2 metal::vec<float, 2>
#define float3 metal::vec<float, 3>
#define float4 metal::vec<float, 4>
#define half2 metal::vec<__half, 2>
#define half4 metal::vec<__half, 4>
#define bfloat2 metal::vec<__nv_bfloat16, 2>
#define bfloat4 metal::vec<__nv_bfloat16, 4>
#define int2 metal::vec<int, 2>
#define int3 metal::vec<int, 3>
#define int4 metal::vec<int, 4>
#define uint2 metal::vec<uint, 2>
#define uint3 metal::vec<uint, 3>
#define uint4 metal::vec<uint, 4>
#define char4 metal::vec<signed char, 4>
#define uchar4 metal::vec<uchar, 4>
#define ushort2 metal::vec<ushort, 2>
#define ushort4 metal::vec<ushort, 4>
#ifndef __CUDACC_RTC__
#define inline inline __device__  // MLX's call of NVRTC makes every function a device function; nvcc does not
#endif

#endif
