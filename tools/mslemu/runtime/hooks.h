// The functions compiled kernels call.
//
// In "check" mode clang instruments every access (-fsanitize=thread) and many kinds of undefined behaviour
// (-fsanitize=bounds,...). Its calls end here, not in the sanitizers' own runtimes, which know nothing of Metal.
#pragma once

#include "checks.h"

#define RETURN_ADDRESS ((uint64_t)__builtin_return_address(0))

// ---------------------------------------------------------------- shim/msl: barriers, simd operations, atomics
namespace msl {
inline void wait(State state, const char* name, int line) {
  g_current->state = state;
  g_current->waits_in = name;
  g_current->line = line;
  back_to_scheduler();
}
}  // namespace msl

MSL_EXPORT void msl_collective(void* payload, msl::SimdOperation operation, const char* name, int width, int line) {
  msl::g_current->operation = operation;
  msl::g_current->payload = payload;
  msl::g_current->width = width;
  msl::wait(msl::State::AT_SIMD_OPERATION, name, line);
}
MSL_EXPORT void msl_barrier(int flags, int line) {
  msl::g_current->flags = flags;
  msl::wait(msl::State::AT_THREADGROUP_BARRIER, "threadgroup_barrier", line);
}
MSL_EXPORT void msl_simd_barrier(int flags, int line) {
  msl::g_current->flags = flags;
  msl::wait(msl::State::AT_SIMDGROUP_BARRIER, "simdgroup_barrier", line);
}
// kind: 0 load, 1 read-modify-write, 2 store
MSL_EXPORT void msl_atomic_access(const volatile void* address, int size, int kind) {
  const msl::Access access = kind == 0   ? msl::Access::ATOMIC_READ
                             : kind == 1 ? msl::Access::ATOMIC_UPDATE
                                         : msl::Access::ATOMIC_WRITE;
  msl::check_access((char*)address, size, access, RETURN_ADDRESS);
}
MSL_EXPORT void msl_inactive_lane(const char* name, int line) {
  if (msl::g_launch->strict) msl::fail(0, "%s reads an inactive lane (line %d)", name, line);
}

// ---------------------------------------------------------------- memory accesses
namespace msl {
// Metal loads a vector at the alignment of the vector type; 16-byte types align to 8 at least (packed halves).
inline void check_aligned(void* address, int size, uint64_t at) {
  if ((uint64_t)address % (size > 8 ? 8 : size)) {
    fail(at, "misaligned access of %d bytes", size);
    stop();
  }
}
inline void read(const void* address, size_t size, uint64_t at) {
  check_access((char*)address, size, Access::READ, at);
}
inline void write(void* address, size_t size, uint64_t at) { check_access((char*)address, size, Access::WRITE, at); }
}  // namespace msl

#define TSAN_ACCESS(size)                                                                                    \
  MSL_EXPORT void __tsan_read##size(void* address) {                                                         \
    msl::check_aligned(address, size, RETURN_ADDRESS);                                                       \
    msl::read(address, size, RETURN_ADDRESS);                                                                \
  }                                                                                                          \
  MSL_EXPORT void __tsan_write##size(void* address) {                                                        \
    msl::check_aligned(address, size, RETURN_ADDRESS);                                                       \
    msl::write(address, size, RETURN_ADDRESS);                                                               \
  }                                                                                                          \
  MSL_EXPORT void __tsan_unaligned_read##size(void* address) { msl::read(address, size, RETURN_ADDRESS); }   \
  MSL_EXPORT void __tsan_unaligned_write##size(void* address) { msl::write(address, size, RETURN_ADDRESS); } \
  MSL_EXPORT void __tsan_read_write##size(void* address) {                                                   \
    msl::read(address, size, RETURN_ADDRESS);                                                                \
    msl::write(address, size, RETURN_ADDRESS);                                                               \
  }
TSAN_ACCESS(1)
TSAN_ACCESS(2)
TSAN_ACCESS(4)
TSAN_ACCESS(8)
TSAN_ACCESS(16)
MSL_EXPORT void __tsan_read_range(void* address, unsigned long size) { msl::read(address, size, RETURN_ADDRESS); }
MSL_EXPORT void __tsan_write_range(void* address, unsigned long size) { msl::write(address, size, RETURN_ADDRESS); }
MSL_EXPORT void* __tsan_memcpy(void* to, const void* from, unsigned long size) {
  msl::read(from, size, RETURN_ADDRESS);
  msl::write(to, size, RETURN_ADDRESS);
  return memcpy(to, from, size);
}
MSL_EXPORT void* __tsan_memmove(void* to, const void* from, unsigned long size) {
  msl::read(from, size, RETURN_ADDRESS);
  msl::write(to, size, RETURN_ADDRESS);
  return memmove(to, from, size);
}
MSL_EXPORT void* __tsan_memset(void* to, int value, unsigned long size) {
  msl::write(to, size, RETURN_ADDRESS);
  return memset(to, value, size);
}
MSL_EXPORT void __tsan_init() {}
MSL_EXPORT void __tsan_func_entry(void*) {}
MSL_EXPORT void __tsan_func_exit() {}

// ---------------------------------------------------------------- undefined behaviour
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, text)                                                                            \
  MSL_EXPORT void __ubsan_handle_##name(SourceLocation* where, ...) {                                    \
    msl::fail(0, "undefined behaviour at %s:%u:%u: " text, where->file ? where->file : "?", where->line, \
              where->column);                                                                            \
    msl::stop();                                                                                         \
  }
UNDEFINED(out_of_bounds, "array index out of bounds")
UNDEFINED(shift_out_of_bounds, "shift amount out of range")
UNDEFINED(add_overflow, "signed integer overflow")
UNDEFINED(sub_overflow, "signed integer overflow")
UNDEFINED(mul_overflow, "signed integer overflow")
UNDEFINED(negate_overflow, "signed integer overflow")
UNDEFINED(divrem_overflow, "integer division by zero or overflow")
UNDEFINED(type_mismatch_v1, "misaligned or null pointer access")
UNDEFINED(builtin_unreachable, "unreachable code")
UNDEFINED(missing_return, "missing return")
UNDEFINED(load_invalid_value, "invalid bool value")
UNDEFINED(float_cast_overflow, "float to int conversion out of range")
// clang calls these two when it knows the size of a local array but keeps no place
MSL_EXPORT void __ubsan_handle_local_out_of_bounds() {
  msl::fail(RETURN_ADDRESS, "undefined behaviour: local array access out of bounds");
  msl::stop();
}
MSL_EXPORT void __ubsan_handle_local_out_of_bounds_abort() {
  msl::fail(RETURN_ADDRESS, "undefined behaviour: local array access out of bounds");
  msl::stop();
}

// ---------------------------------------------------------------- a conversion clang leaves to a library
// float to bfloat, to nearest even. The result is returned in the low half of the register that returns a float.
MSL_EXPORT float __truncsfbf2(float value) {
  union {
    float number;
    uint32_t bits;
  } both;
  both.number = value;
  both.bits = value != value ? (both.bits >> 16) | 0x40 : (both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16;
  return both.number;
}
