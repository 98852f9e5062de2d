// Second of two launches of a large low-rank update on slot rows: out = y + scale * sum(hidden) @ up.
// The header of gated_lora.metal precedes this one.
//
//   hidden  [parts, R - n_real, rank]  float   read by every threadgroup
//   y       [R, outputs]      T      only rows n_real.. are read
//   up      [rank, outputs]   T      read once
//   scale   [1]               float
//   numbers [5]               int32  R, n_real, rank, outputs, parts
//   out     [R - n_real, outputs]  T
// template: T, SLOTS.
// threadgroup (256, 1, 1); grid (256 * ceil(outputs / 256), 1, 1): a thread has a column.
//@body
  threadgroup float near[DEPTH * SLOTS];
  const int n_real = numbers[1];
  const int slots = numbers[0] - n_real;
  const int rank = numbers[2];
  const int outputs = numbers[3];
  const int me = int(thread_position_in_threadgroup.x);
  const int column = int(threadgroup_position_in_grid.x) * THREADS + me;
  float acc[SLOTS];
  for (int s = 0; s < SLOTS; s++) {
    acc[s] = 0.0f;
  }
  for (int from = 0; from < rank; from += DEPTH) {
    const int depth = min(DEPTH, rank - from);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the copy may be overwritten
    for (int i = me; i < DEPTH * SLOTS; i += THREADS) {
      const int s = i / DEPTH;
      const int j = i % DEPTH;
      float sum = 0.0f;
      if (s < slots && j < depth) {
        for (int p = 0; p < numbers[4]; p++) {
          sum += hidden[(size_t(p) * slots + s) * rank + from + j];
        }
      }
      near[j * SLOTS + s] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the copy is complete
    if (column < outputs) {
      add_up<T, SLOTS>(acc, near, up + size_t(from) * outputs + column, depth, outputs);
    }
  }
  if (column < outputs) {
    add_base<T, SLOTS>(acc, y + size_t(n_real) * outputs + column, out + column, scale[0], slots, outputs);
  }
