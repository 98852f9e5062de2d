// y = x @ dequantize(w).T for the few rows of a verification step; each row equals bit for bit what MLX 0.32.4 computes
// for that row alone. The float32 operations and their order are those of its affine_qmv_fast, affine_qmv or
// affine_qmv_quad, but each weight is read and unpacked once for all rows.
//
//   x        [ROWS, K]      T
//   w        [N, K*BITS/32] uint32  value k of a row: bits BITS*(k%V) .. of word k/V, V = 32/BITS
//   scales   [N, K/GROUP]   T       weight = scale * value + bias
//   biases   [N, K/GROUP]   T
//   y        [ROWS, N]      T
// K is a multiple of GROUP, N is any number; both are read from the shapes.
// template: T (float, half, bfloat), BITS (4, 8), GROUP (32, 64, 128), ROWS (2..16), and MLX's order:
//   LANES   lanes that share a column: 32 (qmv_fast, qmv), 4 (qmv_quad)
//   VALUES  consecutive values of k per lane and turn: 64/BITS (qmv_fast), 32/BITS (qmv), K/4 (qmv_quad)
// threadgroup (64, 1, 1): two independent simdgroups; each computes 4 columns of y (LANES = 32) or 8 (LANES = 4).
// grid (64 * ceil(N / (2 * columns per simdgroup)), 1, 1).
//
// MLX's order: a lane's turns go through K in steps of LANES * VALUES. A turn adds
// scale * (sum of x * value) + (sum of x) * bias; simd_sum or quad_sum adds up the lanes. With 4 bits, the values stay
// at their place in a 16-bit half of a word (value j of four counts 16^j times, and x is divided by that), and products
// and x are added in groups of four. Sums are written as in MLX, without fma, so that a compiler that contracts them
// should do so in the same way. Only a Mac can show that it does; the self-check there compares bits.
//
// A lane's values are kept as half, which is exact (at most 8 significant bits, below 65504), and are used ROWS times.
// A simdgroup reads 32 * VALUES * BITS / 8 consecutive bytes of a weight row per turn. With ROWS = 16, a thread needs 64
// sums and at most 32 + 16 registers for values and x. x is read through the cache, without threadgroup memory.
//@header
// The values of a lane's words as MLX multiplies them: 8-bit values as they are, 4-bit value j of four times 16^j.
template <int BITS>
inline void unpack(uint word, thread half* values) {
  if (BITS == 4) {
    for (int i = 0; i < 8; i++) {
      values[i] = half(float((word >> (16 * (i / 4))) & (0xfu << (4 * (i % 4)))));
    }
  } else {
    for (int i = 0; i < 4; i++) {
      values[i] = half(float((word >> (8 * i)) & 0xffu));
    }
  }
}

// Loads VALUES of x, divided to match `unpack`; returns their sum in MLX's order.
template <typename T, int BITS, int VALUES>
inline float load_row(const device T* x, thread float* xs) {
  float sum = 0.0f;
  for (int i = 0; i < VALUES; i += 4) {
    const vec<T, 4> four = *(const device vec<T, 4>*)(x + i);
    const float a = float(four[0]), b = float(four[1]), c = float(four[2]), d = float(four[3]);
    if (BITS == 4) {
      sum += a + b + c + d;
      xs[i] = a;
      xs[i + 1] = b / 16.0f;
      xs[i + 2] = c / 256.0f;
      xs[i + 3] = d / 4096.0f;
    } else {
      sum += a;
      sum += b;
      sum += c;
      sum += d;
      xs[i] = a;
      xs[i + 1] = b;
      xs[i + 2] = c;
      xs[i + 3] = d;
    }
  }
  return sum;
}

// What one turn adds to one column of one row.
template <int BITS, int VALUES>
inline float turn(const thread float* xs, const thread half* values, float scale, float bias, float x_sum) {
  float dot = 0.0f;
  for (int i = 0; i < VALUES; i += 4) {
    const float a = float(values[i]), b = float(values[i + 1]), c = float(values[i + 2]), d = float(values[i + 3]);
    if (BITS == 4) {
      dot += xs[i] * a + xs[i + 1] * b + xs[i + 2] * c + xs[i + 3] * d;
    } else {
      dot += xs[i] * a;
      dot += xs[i + 1] * b;
      dot += xs[i + 2] * c;
      dot += xs[i + 3] * d;
    }
  }
  return scale * dot + x_sum * bias;
}
//@body
  constexpr int SIMDGROUPS = 2;
  constexpr int COLUMNS = LANES == 32 ? 4 : 1;       // columns of y per lane
  constexpr int WORDS = VALUES * BITS / 32;          // per lane, column and turn
  constexpr int PER_WORD = 32 / BITS;
  constexpr int SHARE = GROUP / VALUES;              // neighbouring lanes with the same scale

  const int K = x_shape[1];
  const int N = w_shape[0];
  const int lane = int(thread_index_in_simdgroup);
  const int k_lane = lane % LANES;
  const int simdgroup = int(threadgroup_position_in_grid.x) * SIMDGROUPS + int(simdgroup_index_in_threadgroup);
  const int first = (simdgroup * (32 / LANES) + lane / LANES) * COLUMNS;  // this lane's first column
  const size_t row_words = size_t(K / PER_WORD);
  const size_t row_groups = size_t(K / GROUP);

  float sums[COLUMNS][ROWS];
  for (int c = 0; c < COLUMNS; c++) {
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
      sums[c][m] = 0.0f;
    }
  }

  for (int base = 0; base < K; base += LANES * VALUES) {  // uniform across a simdgroup
    const int k = base + k_lane * VALUES;
    half values[COLUMNS][VALUES];
    float scale[COLUMNS], bias[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) {
      const bool live = k < K && first + c < N;
      const size_t row = size_t(first + c);
      #pragma unroll
      for (int i = 0; i < WORDS; i++) {
        unpack<BITS>(live ? w[row * row_words + size_t(k / PER_WORD + i)] : 0u, values[c] + i * PER_WORD);
      }
      float s = 0.0f, b = 0.0f;
      if (live && k_lane % SHARE == 0) {
        s = float(scales[row * row_groups + size_t(k / GROUP)]);
        b = float(biases[row * row_groups + size_t(k / GROUP)]);
      }
      scale[c] = simd_shuffle(s, ushort(lane - k_lane % SHARE));
      bias[c] = simd_shuffle(b, ushort(lane - k_lane % SHARE));
    }
    if (k < K && first < N) {
      #pragma unroll
      for (int m = 0; m < ROWS; m++) {
        float xs[VALUES];
        const float x_sum = load_row<T, BITS, VALUES>(x + size_t(m) * size_t(K) + size_t(k), xs);
        for (int c = 0; c < COLUMNS; c++) {
          sums[c][m] += turn<BITS, VALUES>(xs, values[c], scale[c], bias[c], x_sum);
        }
      }
    }
  }

  for (int c = 0; c < COLUMNS; c++) {
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
      const float sum = LANES == 32 ? simd_sum(sums[c][m]) : quad_sum(sums[c][m]);
      if (k_lane == 0 && first + c < N) {
        y[size_t(m) * size_t(N) + size_t(first + c)] = T(sum);
      }
    }
  }
