// <metal_type_traits> and <metal_limits>.
#pragma once

#include "language.h"

namespace metal {

template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B>
using bool_constant = integral_constant<bool, B>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

#define MSL_TYPE_CHANGE(name, changed) \
  template <class T>                   \
  struct name {                        \
    typedef changed type;              \
  };                                   \
  template <class T>                   \
  using name##_t = typename name<T>::type;
MSL_TYPE_CHANGE(remove_reference, __remove_reference_t(T))
MSL_TYPE_CHANGE(remove_cv, __remove_cv(T))
MSL_TYPE_CHANGE(remove_pointer, __remove_pointer(T))
MSL_TYPE_CHANGE(remove_addrspace, __remove_cv(T))
MSL_TYPE_CHANGE(make_unsigned, __make_unsigned(T))
MSL_TYPE_CHANGE(make_signed, __make_signed(T))
template <class T>
T&& declval();

#define MSL_TRAIT(name, question)                \
  template <class T>                             \
  struct name : bool_constant<(question(T))> {}; \
  template <class T>                             \
  static constexpr bool name##_v = (question(T));
#define MSL_TRAIT_OF_TWO(name, question)            \
  template <class T, class U>                       \
  struct name : bool_constant<(question(T, U))> {}; \
  template <class T, class U>                       \
  static constexpr bool name##_v = (question(T, U));
MSL_TRAIT_OF_TWO(is_same, __is_same)
MSL_TRAIT_OF_TWO(is_convertible, __is_convertible_to)
MSL_TRAIT_OF_TWO(is_base_of, __is_base_of)
MSL_TRAIT(is_integral, __is_integral)
MSL_TRAIT(is_floating_point, __is_floating_point)
MSL_TRAIT(is_arithmetic, __is_arithmetic)
MSL_TRAIT(is_signed, __is_signed)
MSL_TRAIT(is_unsigned, __is_unsigned)
MSL_TRAIT(is_pointer, __is_pointer)
MSL_TRAIT(is_void, __is_void)
using ::as_type;

template <class T>
struct numeric_limits;

#define MSL_INTEGER_LIMITS(T, LEAST, MOST, DIGITS)     \
  template <>                                          \
  struct numeric_limits<T> {                           \
    static constexpr bool is_integer = true;           \
    static constexpr int digits = DIGITS;              \
    static constexpr T min() { return (T)(LEAST); }    \
    static constexpr T max() { return (T)(MOST); }     \
    static constexpr T lowest() { return (T)(LEAST); } \
  };
MSL_INTEGER_LIMITS(bool, 0, 1, 1)
MSL_INTEGER_LIMITS(char, -128, 127, 7)
MSL_INTEGER_LIMITS(int8_t, -128, 127, 7)
MSL_INTEGER_LIMITS(uint8_t, 0, 255, 8)
MSL_INTEGER_LIMITS(int16_t, -32768, 32767, 15)
MSL_INTEGER_LIMITS(uint16_t, 0, 65535, 16)
MSL_INTEGER_LIMITS(int32_t, -2147483647 - 1, 2147483647, 31)
MSL_INTEGER_LIMITS(uint32_t, 0, 4294967295u, 32)
MSL_INTEGER_LIMITS(int64_t, -9223372036854775807l - 1, 9223372036854775807l, 63)
MSL_INTEGER_LIMITS(uint64_t, 0, 18446744073709551615ul, 64)

// from bit patterns: least normal, greatest, distance from 1 to the next, infinity, a NaN
#define MSL_FLOAT_LIMITS(T, BITS, MIN, MAX, EPSILON, INF, QUIET_NAN)                                       \
  template <>                                                                                              \
  struct numeric_limits<T> {                                                                               \
    static constexpr bool is_integer = false;                                                              \
    static constexpr T from_bits(BITS bits) { return __builtin_bit_cast(T, bits); }                        \
    static constexpr T min() { return from_bits(MIN); }                                                    \
    static constexpr T max() { return from_bits(MAX); }                                                    \
    static constexpr T lowest() { return from_bits((BITS)((MAX) | ((BITS)1 << (8 * sizeof(BITS) - 1)))); } \
    static constexpr T epsilon() { return from_bits(EPSILON); }                                            \
    static constexpr T infinity() { return from_bits(INF); }                                               \
    static constexpr T quiet_NaN() { return from_bits(QUIET_NAN); }                                        \
  };
MSL_FLOAT_LIMITS(float, uint32_t, 0x00800000u, 0x7f7fffffu, 0x34000000u, 0x7f800000u, 0x7fc00000u)
MSL_FLOAT_LIMITS(half, uint16_t, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00)
MSL_FLOAT_LIMITS(bfloat, uint16_t, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0)

}  // namespace metal
