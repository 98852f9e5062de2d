// What may be read and written: bounds, initialisation, and data races under Metal's rules.
//
// Two accesses of different threads to the same byte, one of them a write, race unless they are atomic or ordered.
// Within a threadgroup, threadgroup_barrier orders them if its mem_flags name the memory; within a simdgroup,
// simdgroup_barrier does; threads of different threadgroups are never ordered (Metal Shading Language Specification,
// 6.9 and 6.15). A race is found from what was accessed between barriers, so it does not depend on the schedule.
#pragma once

#include <stdlib.h>

#include "fibre.h"

constexpr uint32_t NOBODY = 0xffffffffu;

// The history of one byte of writable shared memory. All bits set: never touched.
struct Cell {
  uint32_t writer, write_epoch, write_simd_epoch;
  uint32_t reader, read_epoch, read_simd_epoch;  // the last plain reads since the newest barrier or write
  uint32_t reader_simdgroup;                     // or NOBODY when readers are of several
  uint8_t written_atomically, several_readers;
  uint8_t several_writers;  // see Several
};

namespace msl {

// Whether atomic writes of several threads met in a byte. Those of another threadgroup are never ordered.
enum Several : uint8_t { NONE, OF_THIS_THREADGROUP, OF_OTHER_THREADGROUPS };

enum class Access { READ, WRITE, ATOMIC_READ, ATOMIC_WRITE, ATOMIC_UPDATE };
inline bool is_write(Access access) { return access != Access::READ && access != Access::ATOMIC_READ; }
inline bool is_atomic(Access access) { return access != Access::READ && access != Access::WRITE; }

uint32_t g_epoch[SPACES];  // threadgroup barriers passed, by the memory they order
uint32_t g_first_id;       // of the running threadgroup
uint32_t g_threads;        // in the running threadgroup
Cell* g_shared_shadow = nullptr;
size_t g_shared_bytes = 0;

inline Cell* new_shadow(size_t bytes) {
  Cell* cells = (Cell*)malloc(sizeof(Cell) * (bytes + 1));
  memset(cells, 0xff, sizeof(Cell) * bytes);
  return cells;
}

inline bool in_this_threadgroup(uint32_t id) { return id - g_first_id < g_threads; }

inline bool write_is_ordered(const Cell& cell, Space space) {
  if (!in_this_threadgroup(cell.writer)) return false;
  if (cell.write_epoch < g_epoch[space]) return true;
  uint32_t simdgroup = (cell.writer - g_first_id) / SIMD_WIDTH;
  return simdgroup == g_current->simdgroup && cell.write_simd_epoch < g_current->simd_epoch[space];
}

inline bool reads_are_ordered(const Cell& cell, Space space) {
  if (!in_this_threadgroup(cell.reader)) return false;
  if (cell.read_epoch < g_epoch[space]) return true;
  return cell.reader_simdgroup == g_current->simdgroup && cell.read_simd_epoch < g_current->simd_epoch[space];
}

inline void note_read(Cell& cell, Space space) {
  bool first = cell.reader == NOBODY || cell.read_epoch < g_epoch[space] || !in_this_threadgroup(cell.reader);
  if (first) {
    cell.reader = g_current->id;
    cell.several_readers = 0;
    cell.reader_simdgroup = g_current->simdgroup;
    cell.read_simd_epoch = g_current->simd_epoch[space];
  } else {
    if (cell.reader != g_current->id) cell.several_readers = 1;
    if (cell.reader_simdgroup != g_current->simdgroup) cell.reader_simdgroup = NOBODY;
    if (g_current->simd_epoch[space] > cell.read_simd_epoch) cell.read_simd_epoch = g_current->simd_epoch[space];
  }
  cell.read_epoch = g_epoch[space];
}

inline void note_write(Cell& cell, Access access, Space space) {
  if (cell.writer == NOBODY || !is_atomic(access)) {
    cell.several_writers = NONE;
  } else if (!in_this_threadgroup(cell.writer)) {
    cell.several_writers = OF_OTHER_THREADGROUPS;
  } else if (cell.several_writers != OF_OTHER_THREADGROUPS) {
    const bool ordered = write_is_ordered(cell, space);
    if (ordered) cell.several_writers = NONE;
    if (!ordered && cell.writer != g_current->id) cell.several_writers = OF_THIS_THREADGROUP;
  }
  cell.writer = g_current->id;
  cell.write_epoch = g_epoch[space];
  cell.write_simd_epoch = g_current->simd_epoch[space];
  cell.written_atomically = is_atomic(access);
  if (is_atomic(access)) return;  // plain reads before it go on to conflict with the atomic writes of others
  cell.reader = NOBODY;
  cell.several_readers = 0;
}

// Whether a byte was written by others whom no barrier separates from this access.
inline bool conflicts_with_writes(const Cell& cell, Access access, Space space) {
  if (cell.writer == NOBODY || (cell.written_atomically && is_atomic(access))) return false;
  if (cell.several_writers == OF_OTHER_THREADGROUPS) return true;
  const bool all_mine = cell.writer == g_current->id && cell.several_writers != OF_THIS_THREADGROUP;
  return !all_mine && !write_is_ordered(cell, space);
}

// Checks an access byte by byte, then writes it into the history.
inline void check_cells(Cell* cells, size_t size, const char* what, uint64_t offset, Access access, bool initialised,
                        Space space, uint64_t at) {
  const uint32_t me = g_current->id;
  for (size_t i = 0; i < size; i++) {
    Cell& cell = cells[i];
    const unsigned long long byte = offset + i;
    if (conflicts_with_writes(cell, access, space)) {
      fail(at, "data race on %s byte %llu: thread %u %s what thread %u%s wrote, with no barrier between", what, byte,
           me, is_write(access) ? "overwrites" : "reads", cell.writer, cell.several_writers ? " (and others)" : "");
      stop();
    }
    const bool reads = !is_write(access) || access == Access::ATOMIC_UPDATE;
    if (reads && cell.writer == NOBODY && !initialised) {
      fail(at, "read of uninitialised %s byte %llu by thread %u", what, byte, me);
      stop();
    }
    if (is_write(access)) {
      const bool read_by_others = cell.reader != NOBODY && (cell.reader != me || cell.several_readers);
      if (read_by_others && !reads_are_ordered(cell, space)) {
        fail(at, "data race on %s byte %llu: thread %u overwrites what thread %u%s reads, with no barrier between",
             what, byte, me, cell.reader, cell.several_readers ? " (and others)" : "");
        stop();
      }
      note_write(cell, access, space);
    } else if (!is_atomic(access)) {
      note_read(cell, space);
    }
  }
}

inline void check_shared(char* address, size_t size, Access access, uint64_t at) {
  if (address + size > g_launch->shared_end) {
    fail(at, "access past the end of threadgroup memory");
    stop();
  }
  size_t offset = address - g_launch->shared_begin;
  check_cells(g_shared_shadow + offset, size, "threadgroup memory", offset, access, false, THREADGROUP_MEMORY, at);
}

inline void check_buffer(Region& region, char* address, size_t size, Access access, uint64_t at) {
  const uint64_t offset = address - region.begin;
  if (offset + size > region.size) {
    fail(at, "out of bounds: %s of %zu bytes at byte %llu of '%s', which has %llu bytes",
         is_write(access) ? "write" : "read", size, (unsigned long long)offset, region.name,
         (unsigned long long)region.size);
    stop();
  }
  if (is_write(access)) {
    region.bytes_written += size;
  } else {
    region.bytes_read += size;
    region.loads++;
  }
  if (region.writable) {
    check_cells(region.shadow + offset, size, region.name, offset, access, region.initialised, DEVICE_MEMORY, at);
  } else if (is_write(access)) {
    fail(at, "write to input '%s' at byte %llu", region.name, (unsigned long long)offset);
    stop();
  }
}

[[noreturn]] inline void fail_outside(char* address, size_t size, Access access, uint64_t at) {
  const Region* nearest = nullptr;
  uint64_t least = ~0ull;
  for (int i = 0; i < g_launch->region_count; i++) {
    const Region& region = g_launch->regions[i];
    uint64_t distance = address < region.begin ? region.begin - address : address - region.begin;
    if (distance < least) {
      least = distance;
      nearest = &region;
    }
  }
  fail(at, "out of bounds: %s of %zu bytes by thread %u; nearest buffer is '%s' (%llu bytes), at offset %lld",
       is_write(access) ? "write" : "read", size, g_current->id, nearest ? nearest->name : "?",
       (unsigned long long)(nearest ? nearest->size : 0), (long long)(nearest ? address - nearest->begin : 0));
  stop();
}

// Every access of a checked kernel comes here. Private memory lies on the fibre's stack and is its own.
inline void check_access(char* address, size_t size, Access access, uint64_t at) {
  if (!g_launch->check) return;
  if (address >= g_current->stack_low && address < g_current->stack_high) return;
  if (address >= g_launch->shared_begin && address < g_launch->shared_end) {
    check_shared(address, size, access, at);
    return;
  }
  for (int i = 0; i < g_launch->region_count; i++) {
    Region& region = g_launch->regions[i];
    if (address >= region.begin && address < region.begin + region.size) {
      check_buffer(region, address, size, access, at);
      return;
    }
  }
  if (address < g_launch->image_begin || address >= g_launch->image_end) fail_outside(address, size, access, at);
  if (is_write(access)) {
    fail(at, "write to program-scope constant memory");
    stop();
  }
}

// An output that nobody initialised must have been written whole.
inline void check_outputs_written() {
  for (int i = 0; i < g_launch->region_count; i++) {
    const Region& region = g_launch->regions[i];
    if (!region.writable || region.initialised) continue;
    unsigned long long missing = 0, first = 0;
    for (uint64_t byte = region.size; byte-- > 0;) {
      if (region.shadow[byte].writer == NOBODY) {
        missing++;
        first = byte;
      }
    }
    if (missing) {
      fail(0, "output '%s': %llu of %llu bytes were never written (first: byte %llu)", region.name, missing,
           (unsigned long long)region.size, first);
    }
  }
}

}  // namespace msl
