// What crosses the border between Python, the runtime and a compiled kernel.
#pragma once

#include <stdint.h>

#define MSL_EXPORT extern "C" __attribute__((visibility("default")))

// The place of a thread. unit.py declares it again for the kernel.
struct MslThread {
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  uint32_t threadgroups_per_grid[3], threads_per_grid[3], threads_per_threadgroup[3];
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
  uint32_t thread_index_in_quadgroup, quadgroup_index_in_threadgroup, quadgroups_per_threadgroup;
};

struct Cell;  // see checks.h

// One buffer. launching.py: _Region.
struct Region {
  char* begin;
  uint64_t size;
  int32_t writable, initialised;
  Cell* shadow;
  uint64_t bytes_read, bytes_written, loads;
  const char* name;
};

enum Order : int32_t { FORWARD, REVERSE, RANDOM };

// One launch. launching.py: _Launch.
struct Launch {
  void (*entry)(void* const*, const MslThread*);
  void* const* buffers;
  Region* regions;
  int32_t region_count;
  uint32_t grid[3], threadgroup[3];
  char *shared_begin, *shared_end;  // threadgroup variables
  char *image_begin, *image_end;    // the kernel's library
  int32_t check, order, strict;
  uint64_t seed;
  // results
  int32_t failed, threadgroups;
  uint64_t barriers, simd_ops;
  uint64_t failed_at;  // an address in the kernel
  char message[1024];
};
