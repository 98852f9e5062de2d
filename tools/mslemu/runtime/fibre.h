// Threads as fibres: each has a stack, and runs until it waits for others or returns.
#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "launch.h"

namespace msl {

constexpr int MAX_THREADS = 1024;
constexpr int SIMD_WIDTH = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 4096;

enum class State : uint8_t { READY, AT_SIMD_OPERATION, AT_SIMDGROUP_BARRIER, AT_THREADGROUP_BARRIER, DONE };

// Metal keeps device and threadgroup memory apart: a barrier orders only what its mem_flags name.
enum Space { THREADGROUP_MEMORY, DEVICE_MEMORY, SPACES };
constexpr int FLAG_DEVICE = 1, FLAG_THREADGROUP = 2;  // metal::mem_flags in shim/msl/simdgroup.h

// Called with the payloads of all lanes; those that do not take part are null.
typedef void (*SimdOperation)(void** lanes, int width);

struct Fibre {
  void* stack_pointer;
  char *stack_low, *stack_high;
  State state;
  // what it waits for
  const char* waits_in;
  int line;
  int width;  // of the simd operation: 32 or 4
  int flags;  // of the barrier
  SimdOperation operation;
  void* payload;
  // who it is
  uint32_t id;  // unique over the whole grid
  uint32_t simdgroup;
  uint32_t simd_epoch[SPACES];  // simdgroup barriers passed, by the memory they order
  MslThread place;
};

Fibre g_fibres[MAX_THREADS];
Fibre* g_current = nullptr;
void* g_scheduler_stack_pointer = nullptr;
Launch* g_launch = nullptr;

// Saves the registers a callee must keep on this stack, and goes on with another stack.
extern "C" void msl_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void* new_stack(char* high, void (*start)()) {
  void** top = (void**)high;
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = (void*)start;
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  return top;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
inline void* new_stack(char* high, void (*start)()) {
  void** top = (void**)high - 20;
  memset(top, 0, 160);
  top[11] = (void*)start;  // x30, the link register
  return top;
}
#else
#error "the emulator knows how to switch stacks on x86-64 and aarch64 only"
#endif

inline void make_stacks() {
  if (g_fibres[0].stack_low) return;
  char* stacks = (char*)mmap(nullptr, STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (int i = 0; i < MAX_THREADS; i++) {
    g_fibres[i].stack_low = stacks + STACK_BYTES * i;
    g_fibres[i].stack_high = g_fibres[i].stack_low + STACK_BYTES;
    mprotect(g_fibres[i].stack_low, GUARD_BYTES, PROT_NONE);
  }
}

inline void back_to_scheduler() { msl_switch(&g_current->stack_pointer, g_scheduler_stack_pointer); }

inline void resume(Fibre* fibre) {
  g_current = fibre;
  msl_switch(&g_scheduler_stack_pointer, fibre->stack_pointer);
}

inline void run_kernel() {
  g_launch->entry(g_launch->buffers, &g_current->place);
  g_current->state = State::DONE;
  back_to_scheduler();
  __builtin_trap();
}

// Keeps the first fault. `at` is an address in the kernel, or 0 when the message names the line.
__attribute__((format(printf, 2, 3))) inline void fail(uint64_t at, const char* format, ...) {
  if (g_launch->failed) return;
  g_launch->failed = 1;
  g_launch->failed_at = at;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(g_launch->message, sizeof(g_launch->message), format, arguments);
  va_end(arguments);
}

// Leaves the launch from inside a fibre, after `fail`: no fibre is resumed again.
[[noreturn]] inline void stop() {
  back_to_scheduler();
  __builtin_trap();
}

}  // namespace msl
