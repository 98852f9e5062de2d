// y = x @ dequantize(w).T for the few rows of a verification step, with one pass over the weights.
//
//   x        [ROWS, K]      T
//   w        [N, K*BITS/32] uint32  value k of a row: bits BITS*(k%V) .. of word k/V, V = 32/BITS; at least 8 words
//   scales   [N, K/GROUP]   T       weight = scale * value + bias, in float32
//   biases   [N, K/GROUP]   T
//   y        [ROWS, N]      T       sums in float32, rounded once
// K is a multiple of GROUP, N is any number; both are read from the shapes.
// template: T (float, half, bfloat), BITS (4, 8), GROUP (32, 64, 128), ROWS (2..16).
// threadgroup (128, 1, 1): four simdgroups that compute TILE = 16 columns of y; grid (128 * ceil(N / 16), 1, 1).
//
// A simdgroup is 8 lanes along K times 4 lanes along N; a lane holds 16 values of k for 4 columns. So it unpacks a
// weight once and uses it ROWS times, and uses a loaded x 4 times. The 8 lanes along K read 64 (4-bit) or 128 (8-bit)
// consecutive bytes of a weight row; the 4 lanes along N read the same x, which the memory system fetches once. The
// simdgroups divide K among them, 128 values in turn: only one of them needs each x, so there is no copy of x in
// threadgroup memory and no barrier in the loop. Lanes that share a scale get it by a shuffle, so it is also read only
// once. With ROWS = 16, a thread needs 64 sums and about 40 other registers; the longer loops over them are explicitly
// unrolled, because an array with a run-time index does not stay in registers.
//
// The order of a sum depends only on K: 16 values at a time per lane, then the 8 lanes as a butterfly, then the
// simdgroups from 0 to 3. It does not depend on ROWS or N, and every product is an explicit fma, which no compiler can
// contract differently in another specialisation. So a row's result does not depend on the other rows.
//@header
// Values 4*quad .. 4*quad+3 of the 16 in `words`, as floats.
template <int BITS>
inline void unpack(const thread uint* words, int quad, thread float* values) {
  const uint word = BITS == 4 ? words[quad / 2] >> (16 * (quad % 2)) : words[quad];
  for (int j = 0; j < 4; j++) {
    values[j] = float((word >> (BITS * j)) & ((1u << BITS) - 1u));
  }
}
//@body
  constexpr int K_LANES = 8;                      // lanes of a simdgroup along K
  constexpr int COLUMNS = 4;                      // columns of y per lane
  constexpr int TILE = (32 / K_LANES) * COLUMNS;  // columns of y per threadgroup
  constexpr int SPLITS = 4;                       // simdgroups, each with its part of K
  constexpr int VALUES = 16;                      // values of k per lane and turn
  constexpr int TURN = K_LANES * VALUES;          // values of k per simdgroup and turn
  constexpr int WORDS = VALUES * BITS / 32;
  constexpr int SHARE = GROUP / VALUES;           // neighbouring lanes with the same scale

  const int K = x_shape[1];
  const int N = w_shape[0];
  const int lane = int(thread_index_in_simdgroup);
  const int split = int(simdgroup_index_in_threadgroup);
  const int k_lane = lane % K_LANES;
  const int tile = int(threadgroup_position_in_grid.x) * TILE;
  const int first = tile + lane / K_LANES * COLUMNS;  // this lane's first column
  const size_t row_words = size_t(K * BITS / 32);
  const size_t row_groups = size_t(K / GROUP);

  threadgroup float partial[SPLITS * ROWS * TILE];
  float sums[COLUMNS][ROWS];
  for (int c = 0; c < COLUMNS; c++) {
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
      sums[c][m] = 0.0f;
    }
  }

  for (int base = split * TURN; base < K; base += SPLITS * TURN) {  // uniform across a simdgroup
    const int k = base + k_lane * VALUES;
    uint words[COLUMNS][WORDS];
    float scale[COLUMNS], bias[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      const bool live = k < K && first + c < N;
      for (int i = 0; i < WORDS; i++) {
        words[c][i] = 0u;
      }
      float s = 0.0f, b = 0.0f;
      if (live) {
        const size_t row = size_t(first + c);
        for (int i = 0; i < WORDS; i += 2) {
          const uint2 pair = *(const device uint2*)(w + row * row_words + size_t(k * BITS / 32 + i));
          words[c][i] = pair.x;
          words[c][i + 1] = pair.y;
        }
        if (k_lane % SHARE == 0) {
          s = float(scales[row * row_groups + size_t(k / GROUP)]);
          b = float(biases[row * row_groups + size_t(k / GROUP)]);
        }
      }
      scale[c] = simd_shuffle(s, ushort(lane - k_lane % SHARE));
      bias[c] = simd_shuffle(b, ushort(lane - k_lane % SHARE));
    }
    if (k < K && first < N) {
      #pragma unroll
      for (int quad = 0; quad < VALUES / 4; quad++) {
        float weight[COLUMNS][4];
        for (int c = 0; c < COLUMNS; c++) {
          unpack<BITS>(words[c], quad, weight[c]);
          for (int j = 0; j < 4; j++) {
            weight[c][j] = fma(weight[c][j], scale[c], bias[c]);
          }
        }
        #pragma unroll
        for (int m = 0; m < ROWS; m++) {
          const vec<T, 4> four = *(const device vec<T, 4>*)(x + size_t(m) * size_t(K) + size_t(k + 4 * quad));
          for (int c = 0; c < COLUMNS; c++) {
            for (int j = 0; j < 4; j++) {
              sums[c][m] = fma(float(four[j]), weight[c][j], sums[c][m]);
            }
          }
        }
      }
    }
  }

  for (int c = 0; c < COLUMNS; c++) {
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
      float sum = sums[c][m];
      for (int step = 1; step < K_LANES; step *= 2) {
        sum += simd_shuffle_xor(sum, ushort(step));
      }
      if (k_lane == 0) {
        partial[(split * ROWS + m) * TILE + first - tile + c] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index_in_threadgroup); i < ROWS * TILE; i += 32 * SPLITS) {
    const int m = i / TILE;
    const int n = tile + i % TILE;
    if (n < N) {
      float sum = partial[i];
      for (int s = 1; s < SPLITS; s++) {
        sum += partial[s * ROWS * TILE + i];
      }
      y[size_t(m) * size_t(N) + size_t(n)] = T(sum);
    }
  }
