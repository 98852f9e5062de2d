// A kernel that crashes ends its launch with a message instead of the process.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include "fibre.h"

namespace msl {

constexpr int CRASHES[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
constexpr int CRASH_COUNT = sizeof CRASHES / sizeof *CRASHES;
struct sigaction g_former_actions[CRASH_COUNT];
stack_t g_former_stack;

inline const char* crash_reason(int signal, const char* address) {
  if (signal == SIGFPE) return "integer division by zero";
  if (signal == SIGILL || signal == SIGTRAP) return "trap";
  const char* low = g_current ? g_current->stack_low : nullptr;
  if (low && address >= low && address < low + GUARD_BYTES) return "stack overflow (256 KiB per thread)";
  return "bad or misaligned address";
}

inline void on_crash(int signal, siginfo_t* info, void* context) {
  uint64_t at = 0;
#if defined(__x86_64__)
  at = ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;
#elif defined(__aarch64__)
  at = ((ucontext_t*)context)->uc_mcontext.pc + 1;
#endif
  fail(at, "the kernel crashed: %s", crash_reason(signal, (char*)info->si_addr));
  back_to_scheduler();  // never comes back, so the signal stack is free again
}

inline void catch_crashes() {
  static char signal_stack[65536];  // a fibre's own may be what overflowed
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &g_former_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < CRASH_COUNT; i++) sigaction(CRASHES[i], &action, &g_former_actions[i]);
}

inline void let_crashes_be() {
  for (int i = 0; i < CRASH_COUNT; i++) sigaction(CRASHES[i], &g_former_actions[i], nullptr);
  sigaltstack(&g_former_stack, nullptr);
}

}  // namespace msl
