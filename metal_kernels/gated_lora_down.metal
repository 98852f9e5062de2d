// First of two launches of a large low-rank update on slot rows: hidden = x @ down, in parts that the second
// launch adds. The header of gated_lora.metal precedes this one.
//
//   x       [R, inputs]       T      only rows n_real.. are read
//   down    [inputs, rank]    T      read once
//   numbers [5]               int32  R, n_real, inputs, rank, inputs per part
//   hidden  [parts, R - n_real, rank]  float   part p: the sum over its own inputs
// template: T, SLOTS.
// threadgroup (256, 1, 1); grid (256 * parts, ceil(rank / 64), 1): a threadgroup has 64 columns of down.
//@body
  threadgroup float tile[DEPTH * SLOTS];
  threadgroup float scratch[rows_at_once(SLOTS) * THREADS];
  const int n_real = numbers[1];
  const int slots = numbers[0] - n_real;
  const int inputs = numbers[2];
  const int rank = numbers[3];
  const int part = int(threadgroup_position_in_grid.x);
  const int column = int(threadgroup_position_in_grid.y) * 64;
  const int begin = part * numbers[4];
  const int end = min(begin + numbers[4], inputs);
  const HiddenFar far = {hidden + size_t(part) * slots * rank + column, slots, rank};
  project_down<T, SLOTS>(far, x + size_t(n_real) * inputs, down + column, tile, scratch, slots, inputs, rank,
                         min(64, rank - column), begin, end, int(thread_position_in_threadgroup.x));
