// Runs the threads of a grid, one at a time, in the chosen order.
//
// A thread goes on until it waits in a barrier or a simd operation. A simd operation is done once all live lanes of
// the simdgroup (or quadgroup) wait in the same one, a barrier once all live threads do. Metal requires that a
// barrier is reached by all threads and leaves simd operations in divergent code to what lanes happen to be active
// (Metal Shading Language Specification, 6.9); strictly, both are errors here.
#pragma once

#include "hooks.h"

namespace msl {

uint64_t g_random;

inline uint64_t next_random() {  // xorshift
  g_random ^= g_random << 13;
  g_random ^= g_random >> 7;
  g_random ^= g_random << 17;
  return g_random;
}

inline void fill_order(int* order, int count) {
  for (int i = 0; i < count; i++) order[i] = g_launch->order == REVERSE ? count - 1 - i : i;
  if (g_launch->order != RANDOM) return;
  for (int i = count - 1; i > 0; i--) {
    int other = next_random() % (i + 1);
    int kept = order[i];
    order[i] = order[other];
    order[other] = kept;
  }
}

struct Simdgroup {
  Fibre* lanes;
  int count;
};

inline bool same_operation(const Fibre& a, const Fibre& b) { return a.operation == b.operation && a.line == b.line; }

inline bool waits_in_operation(const Fibre& fibre, int width) {
  return fibre.state == State::AT_SIMD_OPERATION && fibre.width == width;
}

// Does the operation that the lanes of one simdgroup or quadgroup wait in. When they wait in several, nothing is
// done, unless `partial`: then the first in the text, by those that reached it.
inline bool complete_operation(Fibre* lanes, int count, int width, bool partial) {
  const Fibre* first = nullptr;
  bool all = true;
  for (int i = 0; i < count; i++) {
    if (lanes[i].state == State::DONE) continue;
    if (!waits_in_operation(lanes[i], width)) {
      all = false;
    } else if (!first) {
      first = &lanes[i];
    } else if (!same_operation(lanes[i], *first)) {
      all = false;
      if (lanes[i].line < first->line) first = &lanes[i];
    }
  }
  if (!first || (!all && !partial)) return false;
  void* payloads[SIMD_WIDTH];
  for (int i = 0; i < width; i++) {
    const bool joins = i < count && waits_in_operation(lanes[i], width) && same_operation(lanes[i], *first);
    payloads[i] = joins ? lanes[i].payload : nullptr;
  }
  first->operation(payloads, width);
  for (int i = 0; i < width; i++) {
    if (payloads[i]) lanes[i].state = State::READY;
  }
  g_launch->simd_ops++;
  return true;
}

inline bool complete_simdgroup_barrier(Simdgroup group) {
  int live = 0, waiting = 0, flags = 0;
  for (int i = 0; i < group.count; i++) {
    live += group.lanes[i].state != State::DONE;
    if (group.lanes[i].state != State::AT_SIMDGROUP_BARRIER) continue;
    waiting++;
    flags = group.lanes[i].flags;
  }
  if (!waiting || waiting != live) return false;
  for (int i = 0; i < group.count; i++) {
    Fibre& lane = group.lanes[i];
    if (lane.state != State::AT_SIMDGROUP_BARRIER) continue;
    lane.state = State::READY;
    if (flags & FLAG_THREADGROUP) lane.simd_epoch[THREADGROUP_MEMORY]++;
    if (flags & FLAG_DEVICE) lane.simd_epoch[DEVICE_MEMORY]++;
  }
  return true;
}

// Lets lanes go on that wait for no other simdgroup; false when there are none.
inline bool complete(Simdgroup group, bool partial) {
  bool any = false;
  for (int width = 4; width <= SIMD_WIDTH; width *= 8) {  // quadgroups, then the simdgroup
    for (int begin = 0; begin < group.count; begin += width) {
      int count = group.count - begin < width ? group.count - begin : width;
      any |= complete_operation(group.lanes + begin, count, width, partial);
    }
  }
  return complete_simdgroup_barrier(group) || any;
}

inline void run_simdgroup(Simdgroup group) {
  int order[SIMD_WIDTH];
  do {
    fill_order(order, group.count);
    for (int i = 0; i < group.count; i++) {
      Fibre* lane = &group.lanes[order[i]];
      if (lane->state != State::READY) continue;
      resume(lane);
      if (g_launch->failed) return;
    }
  } while (complete(group, false) && !g_launch->failed);
}

// Names up to three different places where threads are.
inline void fail_divergence() {
  char places[240] = "";
  int named = 0;
  for (uint32_t i = 0; i < g_threads && named < 3; i++) {
    const Fibre& fibre = g_fibres[i];
    int here = 0;
    bool seen = false;
    for (uint32_t j = 0; j < g_threads; j++) {
      if (g_fibres[j].state != fibre.state || g_fibres[j].line != fibre.line) continue;
      here++;
      seen |= j < i;
    }
    if (seen) continue;
    const size_t used = strlen(places);
    const char* comma = named++ ? "; " : "";
    if (fibre.state == State::DONE) {
      snprintf(places + used, sizeof places - used, "%s%d threads returned", comma, here);
    } else {
      snprintf(places + used, sizeof places - used, "%s%d threads wait in %s (line %d)", comma, here, fibre.waits_in,
               fibre.line);
    }
  }
  fail(0, "divergence: not all threads reach the same barrier or simd operation: %s", places);
}

inline uint32_t ceil_divide(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

inline void place_thread(Fibre& fibre, uint32_t index, const uint32_t position[3], const uint32_t size[3],
                         const uint32_t group[3]) {
  MslThread& place = fibre.place;
  const uint32_t threads = size[0] * size[1] * size[2];
  const uint32_t* full = g_launch->threadgroup;
  for (int axis = 0; axis < 3; axis++) {
    place.thread_position_in_threadgroup[axis] = position[axis];
    place.threadgroup_position_in_grid[axis] = group[axis];
    place.thread_position_in_grid[axis] = group[axis] * full[axis] + position[axis];
    place.threadgroups_per_grid[axis] = ceil_divide(g_launch->grid[axis], full[axis]);
    place.threads_per_grid[axis] = g_launch->grid[axis];
    place.threads_per_threadgroup[axis] = size[axis];
    place.dispatch_threads_per_threadgroup[axis] = full[axis];
  }
  place.thread_index_in_threadgroup = index;
  place.thread_index_in_simdgroup = index % SIMD_WIDTH;
  place.simdgroup_index_in_threadgroup = index / SIMD_WIDTH;
  place.simdgroups_per_threadgroup = ceil_divide(threads, SIMD_WIDTH);
  place.dispatch_simdgroups_per_threadgroup = ceil_divide(full[0] * full[1] * full[2], SIMD_WIDTH);
  place.thread_index_in_quadgroup = index % 4;
  place.quadgroup_index_in_threadgroup = index / 4;
  place.quadgroups_per_threadgroup = ceil_divide(threads, 4);
}

// The last threadgroup along an axis has only the threads that are left of the grid.
inline void start_threads(const uint32_t group[3]) {
  uint32_t size[3];
  for (int axis = 0; axis < 3; axis++) {
    uint32_t left = g_launch->grid[axis] - group[axis] * g_launch->threadgroup[axis];
    size[axis] = left < g_launch->threadgroup[axis] ? left : g_launch->threadgroup[axis];
  }
  g_threads = size[0] * size[1] * size[2];
  uint32_t index = 0;
  for (uint32_t z = 0; z < size[2]; z++) {
    for (uint32_t y = 0; y < size[1]; y++) {
      for (uint32_t x = 0; x < size[0]; x++, index++) {
        Fibre& fibre = g_fibres[index];
        fibre.state = State::READY;
        fibre.line = 0;
        fibre.id = g_first_id + index;
        fibre.simdgroup = index / SIMD_WIDTH;
        fibre.simd_epoch[THREADGROUP_MEMORY] = fibre.simd_epoch[DEVICE_MEMORY] = 0;
        const uint32_t position[3] = {x, y, z};
        place_thread(fibre, index, position, size, group);
        fibre.stack_pointer = new_stack(fibre.stack_high, run_kernel);
      }
    }
  }
}

// Lets all threads go on when all that live wait in the same threadgroup_barrier.
inline bool complete_threadgroup_barrier(uint32_t done) {
  uint32_t waiting = 0;
  int line = 0, flags = 0;
  bool same = true;
  for (uint32_t i = 0; i < g_threads; i++) {
    if (g_fibres[i].state != State::AT_THREADGROUP_BARRIER) continue;
    if (waiting++ && g_fibres[i].line != line) same = false;
    line = g_fibres[i].line;
    flags = g_fibres[i].flags;
  }
  if (!waiting || waiting + done != g_threads || !same) return false;
  if (done && g_launch->strict) return false;
  for (uint32_t i = 0; i < g_threads; i++) {
    if (g_fibres[i].state == State::AT_THREADGROUP_BARRIER) g_fibres[i].state = State::READY;
  }
  if (flags & FLAG_THREADGROUP) g_epoch[THREADGROUP_MEMORY]++;
  if (flags & FLAG_DEVICE) g_epoch[DEVICE_MEMORY]++;
  g_launch->barriers++;
  return true;
}

inline Simdgroup simdgroup(int index) {
  int begin = SIMD_WIDTH * index, left = (int)g_threads - begin;
  return {g_fibres + begin, left < SIMD_WIDTH ? left : SIMD_WIDTH};
}

inline void run_threadgroup(const uint32_t group[3]) {
  g_epoch[THREADGROUP_MEMORY] = g_epoch[DEVICE_MEMORY] = 0;
  memset(g_launch->shared_begin, 0xff, g_launch->shared_end - g_launch->shared_begin);  // NaN
  if (g_launch->check) memset(g_shared_shadow, 0xff, sizeof(Cell) * g_shared_bytes);
  start_threads(group);
  const int groups = ceil_divide(g_threads, SIMD_WIDTH);
  int order[MAX_THREADS / SIMD_WIDTH];
  for (;;) {
    fill_order(order, groups);
    for (int i = 0; i < groups; i++) {
      run_simdgroup(simdgroup(order[i]));
      if (g_launch->failed) return;
    }
    uint32_t done = 0;
    for (uint32_t i = 0; i < g_threads; i++) done += g_fibres[i].state == State::DONE;
    if (done == g_threads) return;
    if (complete_threadgroup_barrier(done)) continue;
    bool any = false;
    for (int i = 0; i < groups && !g_launch->strict; i++) any |= complete(simdgroup(i), true);
    if (any) continue;
    fail_divergence();
    return;
  }
}

inline void run_grid() {
  const uint32_t* size = g_launch->threadgroup;
  uint32_t groups[3], count = 1;
  for (int axis = 0; axis < 3; axis++) {
    groups[axis] = ceil_divide(g_launch->grid[axis], size[axis]);
    count *= groups[axis];
  }
  int* order = (int*)malloc(sizeof(int) * count);
  fill_order(order, count);
  for (uint32_t i = 0; i < count && !g_launch->failed; i++) {
    const uint32_t index = order[i];
    const uint32_t group[3] = {index % groups[0], index / groups[0] % groups[1], index / groups[0] / groups[1]};
    g_first_id = index * size[0] * size[1] * size[2];
    run_threadgroup(group);
    g_launch->threadgroups += !g_launch->failed;
  }
  free(order);
}

}  // namespace msl
