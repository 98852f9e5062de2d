// The tail of a verification pass in one launch: the pick of every real row of a block, and which drafts are accepted.
// One threadgroup per row; atomics combine the rows, in any order.
//
// inputs
//   logits               [rows, columns]  float, half or bfloat   rows >= 1, columns >= 8, column = token id
//   tokens               [rows]           int32                   the block's real tokens: pending, then drafts
//   parents              [rows]           int32                   TREE: the row that each draft follows, a smaller one;
//                                                                 parents[0] is not read. Unused in a chain, where row
//                                                                 r follows row r - 1.
//   noise                MODE 0: unused; MODE 1: [rows, 2] uint32 row keys; MODE 2: [rows] float uniforms in [0, 1)
//   inverse_temperature  [1]              float                   unused in MODE 0
// output (atomic)
//   result               chain: [rows + 1] int32, starts at rows - 1: a pick per row, then the number of accepted drafts
//                        tree:  [2 rows] int32, starts at 0: a pick per row, then for every row whether its draft, or
//                        one on the way to it, is not the pick of the row before it
// template
//   TREE  whether drafts have branches
//   MODE  0 greedy: the largest logit
//         1 Gumbel: the largest logit * inverse_temperature + gumbel, both operations rounded once
//         2 inverse CDF in vocabulary order: the first column whose cumulative probability exceeds the uniform
// grid (threads, rows, 1), threadgroup (threads, 1, 1), threads a multiple of 32, at most 1024.
//
// Modes 0 and 1 read the logits once. Mode 2 gives each simdgroup a contiguous range of columns, reads the logits once
// for the mass of each range, and then again only the range that holds the pick, split over all threads.
// If scores are equal, the lowest column wins. If nothing is above -inf, the pick is column 0. Modes 0 and 1 pick the
// first NaN, as mx.argmax does; in mode 2, NaN has no mass.
//@header
// exp((x - top) * inverse_temperature) with exp(0) where both are the same infinity
inline float mass_of(float x, float top, float inverse_temperature) {
  return x == top ? 1.0f : exp((x - top) * inverse_temperature);
}
//@body
  // one slot per simdgroup
  threadgroup uint group_lead[32];
  threadgroup uint group_column[32];
  threadgroup float range_top[32];
  threadgroup float range_mass[32];
  threadgroup float group_mass[32];
  threadgroup uint group_first[32];
  threadgroup uint group_last[32];

  const uint rows = uint(logits_shape[0]);
  const uint columns = uint(logits_shape[1]);
  const uint row = threadgroup_position_in_grid.y;
  const uint thread_index = thread_position_in_threadgroup.x;
  const uint threads = threads_per_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint groups = simdgroups_per_threadgroup;
  const uint base = row * columns;
  uint pick = columns;  // none
  uint writer = 0;      // the thread that has the pick

  if (MODE != 2) {
    const uint key_0 = MODE == 1 ? uint(noise[2 * row]) : 0u;
    const uint key_1 = MODE == 1 ? uint(noise[2 * row + 1]) : 0u;
    const float scale = MODE == 1 ? inverse_temperature[0] : 1.0f;

    float best = -INFINITY;
    uint best_column = columns;  // loses every tie
    for (uint start = 0; start < columns; start += 4 * threads) {
      // The best score of the simdgroup so far: noise is computed only where a column could still win. No winner is
      // missed, because rounding is monotonic: score <= scaled + most_gumbel < to_beat. NaN is never skipped.
      const float to_beat = MODE == 1 ? simd_max(best) : 0.0f;
      float score[4];  // four loads in flight
      for (uint k = 0; k < 4; k++) {
        const uint column = start + k * threads + thread_index;
        score[k] = column < columns ? float(logits[base + column]) : -INFINITY;
      }
      for (uint k = 0; k < 4; k++) {
        const uint column = start + k * threads + thread_index;
        if (MODE == 1) {
          const float w = uniform_of_bits(noise_bits(key_0, key_1, column));
          const float scaled = score[k] * scale;
          if (scaled + most_gumbel(w) < to_beat) {
            continue;
          }
          score[k] = scaled + gumbel_of_uniform(w);
        }
        if (takes_lead(score[k], best)) {
          best = score[k];
          best_column = column;
        }
      }
    }

    uint lead = lead_of(best);
    uint top = simd_max(lead);
    uint first = simd_min(lead == top ? best_column : columns);
    if (lane == 0) {
      group_lead[group] = top;
      group_column[group] = first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    lead = lane < groups ? group_lead[lane] : 0u;
    first = lane < groups ? group_column[lane] : columns;
    top = simd_max(lead);
    pick = simd_min(lead == top ? first : columns);
  } else {
    const float scale = inverse_temperature[0];

    // 1. The mass of each simdgroup's range, relative to its own largest logit.
    const uint range = (columns + groups - 1) / groups;
    const uint range_end = min((group + 1) * range, columns);
    float top = -INFINITY;
    float mass = 0.0f;
    for (uint start = group * range + lane; start < range_end; start += 4 * 32) {
      float x[4];  // four loads in flight
      float new_top = top;
      for (uint k = 0; k < 4; k++) {
        const uint column = start + k * 32;
        x[k] = column < range_end ? float(logits[base + column]) : -INFINITY;
        new_top = x[k] > new_top ? x[k] : new_top;
      }
      mass *= mass_of(top, new_top, scale);
      top = new_top;
      for (uint k = 0; k < 4; k++) {
        mass += x[k] > -INFINITY ? mass_of(x[k], top, scale) : 0.0f;
      }
    }
    const float simd_top = simd_max(top);
    const float simd_mass = simd_sum(mass * mass_of(top, simd_top, scale));
    if (lane == 0) {
      range_top[group] = simd_top;
      range_mass[group] = simd_mass;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // 2. The range that holds the pick, found by every simdgroup; lane = range.
    const float lane_top = lane < groups ? range_top[lane] : -INFINITY;
    const float row_top = simd_max(lane_top);
    const float lane_mass = lane < groups ? range_mass[lane] * mass_of(lane_top, row_top, scale) : 0.0f;
    const float through = simd_prefix_inclusive_sum(lane_mass);
    const float total = simd_shuffle(through, 31);
    const float goal = float(noise[row]) * total;
    const uint crossing = simd_min(lane_mass > 0.0f && through > goal ? lane : 32u);
    const uint last_lane = simd_max(lane_mass > 0.0f ? lane : 0u);  // in case rounding puts the goal past the end
    const uint chosen = crossing < 32u ? crossing : last_lane;
    const float before_range = simd_shuffle(through - lane_mass, chosen);

    // 3. Within that range, a contiguous stretch per thread, in vocabulary order.
    const uint chosen_start = min(chosen * range, columns);
    const uint chosen_end = min(chosen_start + range, columns);
    const uint stretch = (chosen_end - chosen_start + threads - 1) / threads;
    const uint stretch_start = min(chosen_start + thread_index * stretch, chosen_end);
    const uint stretch_end = min(stretch_start + stretch, chosen_end);
    float mine = 0.0f;
    for (uint column = stretch_start; column < stretch_end; column++) {
      const float x = float(logits[base + column]);
      mine += x > -INFINITY ? mass_of(x, row_top, scale) : 0.0f;
    }
    const float simd_through = simd_prefix_inclusive_sum(mine);
    if (lane == 31) {
      group_mass[group] = simd_through;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float before_group = simd_sum(lane < group ? group_mass[lane] : 0.0f);
    const float before_mine = before_range + before_group + (simd_through - mine);
    const bool reaches = mine > 0.0f && before_mine + mine > goal;
    const uint first_here = simd_min(reaches ? thread_index : threads);
    const uint last_here = simd_max(mine > 0.0f ? thread_index : 0u);
    if (lane == 0) {
      group_first[group] = first_here;
      group_last[group] = last_here;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint first = simd_min(lane < groups ? group_first[lane] : threads);
    const uint last = simd_max(lane < groups ? group_last[lane] : 0u);
    const uint owner = first < threads ? first : last;

    // 4. The thread with the right stretch goes through it.
    writer = first < threads ? first : last;
    if (thread_index == writer) {
      float sum = before_mine;
      for (uint column = stretch_start; column < stretch_end; column++) {
        const float x = float(logits[base + column]);
        const float here = x > -INFINITY ? mass_of(x, row_top, scale) : 0.0f;
        if (here > 0.0f) {
          sum += here;
          pick = column;
          if (sum > goal) {
            break;
          }
        }
      }
    }
  }

  if (thread_index == writer) {
    const int token = pick < columns ? int(pick) : 0;
    atomic_store_explicit(&result[row], token, memory_order_relaxed);
    if (TREE) {
      for (uint child = row + 1; child < rows; child++) {
        if (uint(parents[child]) != row || tokens[child] == token) {
          continue;
        }
        for (uint behind = child; behind < rows; behind++) {  // the wrong draft, and all that follow it
          uint above = behind;
          while (above > child) {
            above = uint(parents[above]);
          }
          if (above == child) {
            atomic_store_explicit(&result[rows + behind], 1, memory_order_relaxed);
          }
        }
      }
    } else if (row + 1 < rows && tokens[row + 1] != token) {
      atomic_fetch_min_explicit(&result[rows], int(row), memory_order_relaxed);
    }
  }
