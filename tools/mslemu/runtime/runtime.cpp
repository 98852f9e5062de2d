// Runs one compiled Metal kernel over a grid on the CPU.
//
// Every thread of a threadgroup is a fibre (fibre.h), the scheduler lets one run at a time (scheduler.h), kernels
// compiled for "check" report every access (hooks.h), which is held against Metal's rules (checks.h).
#include "checks.h"
#include "crash.h"
#include "fibre.h"
#include "hooks.h"
#include "launch.h"
#include "scheduler.h"

static void make_shadows() {
  const size_t shared = msl::g_launch->shared_end - msl::g_launch->shared_begin;
  if (shared != msl::g_shared_bytes || !msl::g_shared_shadow) {
    free(msl::g_shared_shadow);
    msl::g_shared_shadow = msl::new_shadow(shared);
    msl::g_shared_bytes = shared;
  }
  for (int i = 0; i < msl::g_launch->region_count; i++) {
    Region& region = msl::g_launch->regions[i];
    if (region.writable) region.shadow = msl::new_shadow(region.size);
  }
}

static void free_shadows() {
  for (int i = 0; i < msl::g_launch->region_count; i++) {
    free(msl::g_launch->regions[i].shadow);
    msl::g_launch->regions[i].shadow = nullptr;
  }
}

// One launch at a time: the fibres are shared by all.
MSL_EXPORT int msl_launch(Launch* launch) {
  msl::g_launch = launch;
  msl::g_random = launch->seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  msl::make_stacks();
  if (launch->check) make_shadows();
  msl::catch_crashes();
  msl::run_grid();
  msl::let_crashes_be();
  if (launch->check && !launch->failed) msl::check_outputs_written();
  free_shadows();
  return launch->failed;
}
