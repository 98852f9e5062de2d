// <metal_atomic>. Threads run one at a time, so a plain update is atomic; the runtime is told for its checks.
#pragma once

#include "traits.h"

namespace metal {

enum memory_order { memory_order_relaxed = 0 };  // the only one Metal has
template <class T>
struct atomic {
  T msl_value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;

#define MSL_ATOMIC_FN __attribute__((no_sanitize("thread"), noinline, unused)) static
#define MSL_ATOMIC_LOAD(object) msl_atomic_access((const volatile void*)&object->msl_value, sizeof(T), 0)
#define MSL_ATOMIC_UPDATE(object) msl_atomic_access((const volatile void*)&object->msl_value, sizeof(T), 1)
#define MSL_ATOMIC_STORE(object) msl_atomic_access((const volatile void*)&object->msl_value, sizeof(T), 2)
// `updated` in terms of T old, v
#define MSL_UPDATE(name, SPACE, updated)                                      \
  template <class T>                                                          \
  MSL_ATOMIC_FN T name(volatile SPACE atomic<T>* object, T v, memory_order) { \
    MSL_ATOMIC_UPDATE(object);                                                \
    T old = object->msl_value;                                                \
    object->msl_value = (T)(updated);                                         \
    return old;                                                               \
  }
#define MSL_ATOMICS(SPACE)                                                                                       \
  MSL_UPDATE(atomic_fetch_add_explicit, SPACE, old + v)                                                          \
  MSL_UPDATE(atomic_fetch_sub_explicit, SPACE, old - v)                                                          \
  MSL_UPDATE(atomic_fetch_and_explicit, SPACE, old& v)                                                           \
  MSL_UPDATE(atomic_fetch_or_explicit, SPACE, old | v)                                                           \
  MSL_UPDATE(atomic_fetch_xor_explicit, SPACE, old ^ v)                                                          \
  MSL_UPDATE(atomic_exchange_explicit, SPACE, v)                                                                 \
  MSL_UPDATE(atomic_fetch_max_explicit, SPACE, (old < v ? v : old))                                              \
  MSL_UPDATE(atomic_fetch_min_explicit, SPACE, (v < old ? v : old))                                              \
  template <class T>                                                                                             \
  MSL_ATOMIC_FN void atomic_store_explicit(volatile SPACE atomic<T>* object, T v, memory_order) {                \
    MSL_ATOMIC_STORE(object);                                                                                    \
    object->msl_value = v;                                                                                       \
  }                                                                                                              \
  template <class T>                                                                                             \
  MSL_ATOMIC_FN T atomic_load_explicit(const volatile SPACE atomic<T>* object, memory_order) {                   \
    MSL_ATOMIC_LOAD(object);                                                                                     \
    return object->msl_value;                                                                                    \
  }                                                                                                              \
  template <class T>                                                                                             \
  MSL_ATOMIC_FN bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>* object, thread T* expected, \
                                                           T v, memory_order, memory_order) {                    \
    MSL_ATOMIC_UPDATE(object);                                                                                   \
    T old = object->msl_value;                                                                                   \
    if (__builtin_memcmp(&old, (const void*)expected, sizeof(T)) == 0) {                                         \
      object->msl_value = v;                                                                                     \
      return true;                                                                                               \
    }                                                                                                            \
    *expected = old;                                                                                             \
    return false;                                                                                                \
  }
MSL_ATOMICS(device)
#if defined(MSL_AS_CHECK)
MSL_ATOMICS(threadgroup)
#endif

}  // namespace metal
