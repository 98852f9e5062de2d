// Barriers, <metal_simdgroup> and <metal_quadgroup>.
//
// A simd operation stops each lane with a payload; when all live lanes have come, the runtime calls one function with
// all payloads, which computes every lane's result. The line of the call tells operations apart.
#pragma once

#include "math.h"

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
MSL_FN void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) { msl_barrier((int)flags, line); }
MSL_FN void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) { msl_simd_barrier((int)flags, line); }

template <class T>
struct MslPayload {
  T value, result, fill;
  int argument, modulo, line;
};
#define MSL_WAIT(operation, name, width) msl_collective(&payload, (MslOperation) & operation, name, width, line)

// ---------------------------------------------------------------- reductions
// In the order of an xor butterfly; lanes that returned do not take part. `combined` in terms of T a, b.
#define MSL_REDUCTION_OF(name, width, combined)        \
  template <class T>                                   \
  MSL_UNWATCHED void msl_##name(void** lanes, int n) { \
    MslPayload<T>** p = (MslPayload<T>**)lanes;        \
    T v[32];                                           \
    bool has[32];                                      \
    for (int i = 0; i < n; i++) {                      \
      has[i] = p[i] != nullptr;                        \
      if (has[i]) v[i] = p[i]->value;                  \
    }                                                  \
    for (int step = 1; step < n; step <<= 1) {         \
      for (int i = 0; i < n; i += 2 * step) {          \
        if (!has[i + step]) continue;                  \
        T a = v[i], b = v[i + step];                   \
        v[i] = has[i] ? (combined) : b;                \
        has[i] = true;                                 \
      }                                                \
    }                                                  \
    for (int i = 0; i < n; i++)                        \
      if (p[i]) p[i]->result = v[0];                   \
  }                                                    \
  template <class T>                                   \
  MSL_FN T name(T x, int line = __builtin_LINE()) {    \
    MslPayload<T> payload;                             \
    payload.value = x;                                 \
    MSL_WAIT(msl_##name<T>, #name, width);             \
    return payload.result;                             \
  }
#define MSL_REDUCTION(name, combined)         \
  MSL_REDUCTION_OF(simd_##name, 32, combined) \
  MSL_REDUCTION_OF(quad_##name, 4, combined)
MSL_REDUCTION(sum, (T)(a + b))
MSL_REDUCTION(product, (T)(a * b))
MSL_REDUCTION(max, max(a, b))
MSL_REDUCTION(min, min(a, b))
MSL_REDUCTION(and, (T)(a & b))
MSL_REDUCTION(or, (T)(a | b))
MSL_REDUCTION(xor, (T)(a ^ b))
MSL_REDUCTION(all_of, (T)(a && b))
MSL_REDUCTION(any_of, (T)(a || b))
MSL_FN bool simd_all(bool e, int line = __builtin_LINE()) { return simd_all_of<int>(e, line) != 0; }
MSL_FN bool simd_any(bool e, int line = __builtin_LINE()) { return simd_any_of<int>(e, line) != 0; }
MSL_FN bool quad_all(bool e, int line = __builtin_LINE()) { return quad_all_of<int>(e, line) != 0; }
MSL_FN bool quad_any(bool e, int line = __builtin_LINE()) { return quad_any_of<int>(e, line) != 0; }

// ---------------------------------------------------------------- shuffles
// `source`: the lane that lane i of n reads with argument k. Past the end, shuffle_up and shuffle_down keep the
// lane's own value; for the others Metal leaves the result undefined, which is an error here.
#define MSL_KEEP_OWN
#define MSL_UNDEFINED_LANE msl_inactive_lane("lane index out of range", p[i]->line);
#define MSL_SHUFFLE_OF(name, width, source, past_the_end)     \
  template <class T>                                          \
  MSL_UNWATCHED void msl_##name(void** lanes, int n) {        \
    MslPayload<T>** p = (MslPayload<T>**)lanes;               \
    for (int i = 0; i < n; i++) {                             \
      if (!p[i]) continue;                                    \
      const int k = p[i]->argument, from = (source);          \
      (void)k;                                                \
      p[i]->result = p[i]->value;                             \
      if (from < 0 || from >= n) {                            \
        past_the_end                                          \
      } else if (!p[from]) {                                  \
        msl_inactive_lane(#name, p[i]->line);                 \
      } else {                                                \
        p[i]->result = p[from]->value;                        \
      }                                                       \
    }                                                         \
  }                                                           \
  template <class T>                                          \
  MSL_FN T name(T x, ushort k, int line = __builtin_LINE()) { \
    MslPayload<T> payload;                                    \
    payload.value = x;                                        \
    payload.argument = k;                                     \
    payload.line = line;                                      \
    MSL_WAIT(msl_##name<T>, #name, width);                    \
    return payload.result;                                    \
  }
#define MSL_SHUFFLE(name, source, past_the_end)         \
  MSL_SHUFFLE_OF(simd_##name, 32, source, past_the_end) \
  MSL_SHUFFLE_OF(quad_##name, 4, source, past_the_end)
MSL_SHUFFLE(shuffle, k, MSL_UNDEFINED_LANE)
MSL_SHUFFLE(broadcast, k, MSL_UNDEFINED_LANE)
MSL_SHUFFLE(shuffle_xor, i ^ k, MSL_UNDEFINED_LANE)
MSL_SHUFFLE(shuffle_up, i - k, MSL_KEEP_OWN)
MSL_SHUFFLE(shuffle_down, i + k, MSL_KEEP_OWN)
MSL_SHUFFLE(shuffle_rotate_up, (i - k + n) % n, MSL_KEEP_OWN)
MSL_SHUFFLE(shuffle_rotate_down, (i + k) % n, MSL_KEEP_OWN)

template <class T>
MSL_UNWATCHED void msl_broadcast_first(void** lanes, int n) {
  MslPayload<T>** p = (MslPayload<T>**)lanes;
  int first = 0;
  while (first < n && !p[first]) first++;
  for (int i = 0; i < n; i++)
    if (p[i]) p[i]->result = p[first]->value;
}
template <class T>
MSL_FN T simd_broadcast_first(T x, int line = __builtin_LINE()) {
  MslPayload<T> payload;
  payload.value = x;
  MSL_WAIT(msl_broadcast_first<T>, "simd_broadcast_first", 32);
  return payload.result;
}

// Within groups of `modulo` lanes; what comes in from outside is the fill of the lane at that place.
#define MSL_SHUFFLE_AND_FILL(name, SIGN)                                           \
  template <class T>                                                               \
  MSL_UNWATCHED void msl_##name(void** lanes, int n) {                             \
    MslPayload<T>** p = (MslPayload<T>**)lanes;                                    \
    for (int i = 0; i < n; i++) {                                                  \
      if (!p[i]) continue;                                                         \
      const int m = p[i]->modulo, begin = i / m * m, from = i SIGN p[i]->argument; \
      if (from >= begin && from < begin + m && p[from]) {                          \
        p[i]->result = p[from]->value;                                             \
      } else {                                                                     \
        const int wrapped = ((from - begin) % m + m) % m + begin;                  \
        p[i]->result = p[wrapped] ? p[wrapped]->fill : p[i]->fill;                 \
      }                                                                            \
    }                                                                              \
  }                                                                                \
  template <class T>                                                               \
  MSL_FN T name(T x, T fill, ushort k, ushort modulo, int line) {                  \
    MslPayload<T> payload;                                                         \
    payload.value = x;                                                             \
    payload.fill = fill;                                                           \
    payload.argument = k;                                                          \
    payload.modulo = modulo;                                                       \
    MSL_WAIT(msl_##name<T>, #name, 32);                                            \
    return payload.result;                                                         \
  }                                                                                \
  template <class T>                                                               \
  MSL_FN T name(T x, T fill, ushort k, ushort modulo) {                            \
    return name(x, fill, k, modulo, 0);                                            \
  }                                                                                \
  template <class T>                                                               \
  MSL_FN T name(T x, T fill, ushort k) {                                           \
    return name(x, fill, k, (ushort)32, 0);                                        \
  }
MSL_SHUFFLE_AND_FILL(simd_shuffle_and_fill_up, -)
MSL_SHUFFLE_AND_FILL(simd_shuffle_and_fill_down, +)

// ---------------------------------------------------------------- prefix operations, from lane 0 upwards
#define MSL_PREFIX(name, start, OP, with_own)          \
  template <class T>                                   \
  MSL_UNWATCHED void msl_##name(void** lanes, int n) { \
    MslPayload<T>** p = (MslPayload<T>**)lanes;        \
    T total = (T)(start);                              \
    for (int i = 0; i < n; i++) {                      \
      if (!p[i]) continue;                             \
      const T before = total;                          \
      total = (T)(total OP p[i]->value);               \
      p[i]->result = with_own ? total : before;        \
    }                                                  \
  }                                                    \
  template <class T>                                   \
  MSL_FN T name(T x, int line = __builtin_LINE()) {    \
    MslPayload<T> payload;                             \
    payload.value = x;                                 \
    MSL_WAIT(msl_##name<T>, #name, 32);                \
    return payload.result;                             \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, 0, +, true)
MSL_PREFIX(simd_prefix_exclusive_sum, 0, +, false)
MSL_PREFIX(simd_prefix_inclusive_product, 1, *, true)
MSL_PREFIX(simd_prefix_exclusive_product, 1, *, false)

// ---------------------------------------------------------------- votes
struct simd_vote {
  typedef ulong vote_t;
  vote_t mask;
  explicit constexpr simd_vote(vote_t x) : mask(x) {}
  explicit constexpr operator vote_t() const { return mask; }
  bool all() const { return mask == 0xffffffffu; }
  bool any() const { return mask != 0; }
};
MSL_UNWATCHED static inline void msl_ballot(void** lanes, int n) {
  MslPayload<uint>** p = (MslPayload<uint>**)lanes;
  uint mask = 0;
  for (int i = 0; i < n; i++)
    if (p[i] && p[i]->value) mask |= 1u << i;
  for (int i = 0; i < n; i++)
    if (p[i]) p[i]->result = mask;
}
MSL_FN simd_vote simd_ballot(bool e, int line = __builtin_LINE()) {
  MslPayload<uint> payload;
  payload.value = e;
  MSL_WAIT(msl_ballot, "simd_ballot", 32);
  return simd_vote(payload.result);
}
MSL_FN simd_vote simd_active_threads_mask(int line = __builtin_LINE()) { return simd_ballot(true, line); }
MSL_UNWATCHED static inline void msl_is_first(void** lanes, int n) {
  MslPayload<uint>** p = (MslPayload<uint>**)lanes;
  bool seen = false;
  for (int i = 0; i < n; i++) {
    if (!p[i]) continue;
    p[i]->result = !seen;
    seen = true;
  }
}
MSL_FN bool simd_is_first(int line = __builtin_LINE()) {
  MslPayload<uint> payload;
  MSL_WAIT(msl_is_first, "simd_is_first", 32);
  return payload.result;
}

}  // namespace metal
