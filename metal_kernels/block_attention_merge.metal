// Combines the partial attention of the chunks of a cache (block_attention.metal). One simdgroup per row.
//
//   partial [chunks, rows, D]  float   each chunk's mean of its visible values
//   stats   [chunks, rows, 2]  float   each chunk's largest score and sum of exp(score - largest); sum 0: nothing visible
//   numbers [2]                int32   rows (Hq * R), chunks (1..128)
//   out     [rows, D]          T       mean over all chunks
// template: T, D.
// threadgroup (32, 1, 1); grid (32 * rows, 1, 1).
//@body
  threadgroup float share[128];
  const int rows = numbers[0];
  const int chunks = numbers[1];
  const int row = int(threadgroup_position_in_grid.x);
  const int lane = int(thread_index_in_simdgroup);

  float tops[4];
  float top = -3.0e38f;  // finite; a chunk with nothing visible has this value and the sum 0
  for (int i = 0; i < 4; i++) {
    const int c = lane + 32 * i;
    tops[i] = c < chunks ? stats[2 * (size_t(c) * rows + row)] : -3.0e38f;
    top = max(top, tops[i]);
  }
  top = simd_max(top);
  float mine = 0.0f;
  for (int i = 0; i < 4; i++) {
    const int c = lane + 32 * i;
    if (c < chunks) {
      const float weight = stats[2 * (size_t(c) * rows + row) + 1] * fast::exp(tops[i] - top);
      share[c] = weight;
      mine += weight;
    }
  }
  const float total = simd_sum(mine);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int d = lane; d < D; d += 32) {
    float sum = 0.0f;
    for (int c = 0; c < chunks; c++) {
      sum += share[c] * partial[(size_t(c) * rows + row) * D + d];
    }
    out[size_t(row) * D + d] = T(sum / total);
  }
