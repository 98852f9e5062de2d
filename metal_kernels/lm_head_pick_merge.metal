// LM head and pick without storing logits, second of two launches: combines the parts of lm_head_pick, with one
// threadgroup per row. The header of lm_head_pick.metal precedes it.
//
// inputs
//   part_values   [4, rows, parts]  float
//   part_columns  [rows, parts]     int32
//   token_ids     [columns]         int32   real id of each column; unused when column = id
//   plan          [2]               int32   columns, whether token_ids is used
// outputs
//   picks         [rows]            int32   real id of the best noisy score
//   confidence    [rows]            float   exp(its score without noise) / sum of exp(score)
// grid (threads, rows, 1), threadgroup (threads, 1, 1), threads a multiple of 32, at most 1024
//@body
  threadgroup float group_values[4][32];  // one slot per simdgroup
  threadgroup uint group_columns[32];

  const uint rows = uint(part_columns_shape[0]);
  const uint parts = uint(part_columns_shape[1]);
  const uint columns = uint(plan[0]);
  const uint row = threadgroup_position_in_grid.y;
  const uint thread_index = thread_position_in_threadgroup.x;
  const uint lane = thread_index_in_simdgroup;
  const uint group = simdgroup_index_in_threadgroup;
  const uint field = rows * parts;

  PickState state = no_pick(columns);
  for (uint part = thread_index; part < parts; part += threads_per_threadgroup.x) {
    const uint at = row * parts + part;
    PickState here;
    here.best = part_values[at];
    here.plain = part_values[field + at];
    here.top = part_values[2 * field + at];
    here.mass = part_values[3 * field + at];
    here.column = uint(part_columns[at]);
    state = joined(state, here);
  }
  for (ushort step = 1; step < 32; step *= 2) {
    state = joined(state, state_across(state, step));
  }
  if (lane == 0) {
    group_values[0][group] = state.best;
    group_values[1][group] = state.plain;
    group_values[2][group] = state.top;
    group_values[3][group] = state.mass;
    group_columns[group] = state.column;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (group == 0) {
    state = no_pick(columns);
    if (lane < simdgroups_per_threadgroup) {
      state.best = group_values[0][lane];
      state.plain = group_values[1][lane];
      state.top = group_values[2][lane];
      state.mass = group_values[3][lane];
      state.column = group_columns[lane];
    }
    for (ushort step = 1; step < 32; step *= 2) {
      state = joined(state, state_across(state, step));
    }
    if (lane == 0) {
      const uint column = state.column < columns ? state.column : 0u;
      picks[row] = plan[1] != 0 ? token_ids[column] : int(column);
      confidence[row] = exp(state.plain - state.top) / state.mass;
    }
  }
