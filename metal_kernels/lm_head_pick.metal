// LM head and pick without storing logits, first of two launches: every threadgroup computes the logits of a few tiles
// of 16 columns, and keeps only what a pick and its probability need. lm_head_pick_merge combines the parts.
//
// inputs
//   hidden               [rows, size]     T        rows <= ROWS, size a multiple of 32
//   weight               BITS 0: [columns, size] T; else [columns, size * BITS / 32] uint32, as mx.quantize packs it
//   scales, biases       BITS 0: unused; else [columns, size / GROUP] T; weight = scale * value + bias, in float32
//   keys                 [rows, 2]        uint32   row keys of the noise; unused when not noisy
//   token_ids            [columns]        int32    real id of each column, for the noise; unused when column = id
//   inverse_temperature  [1]              float
//   plan                 [3]              int32    tiles per threadgroup, whether noisy, whether token_ids is used
// outputs, one part per threadgroup
//   part_values          [4, rows, parts] float    best noisy score, its score without noise, largest score without
//                                                  noise, sum of exp(score - largest)
//   part_columns         [rows, parts]    int32    column of the best noisy score; `columns` if there is none
// template: T (float, half, bfloat), BITS (0, 4, 8), GROUP (0 or 32, 64, 128), ROWS (1, 2, 4, 8, 16)
// threadgroup (128, 1, 1), grid (128 * parts, 1, 1), parts = ceil(columns / (16 * tiles per threadgroup))
//
// score = logit * inverse_temperature; noisy score = score + gumbel, each rounded once. If noisy scores are equal, the
// lowest column wins. Rows from `rows` to ROWS repeat the last one and are not written.
//
// A simdgroup is 8 lanes along size by 4 lanes along columns, 4 columns each; the four simdgroups divide size among
// them, 128 values in turn. A weight is loaded by one lane, once, for all rows. The order of a sum depends only on size
// and BITS, and its products are explicit fma, so a row's logits do not depend on the other rows. The longer loops are
// explicitly unrolled: an array with a run-time index would not stay in registers.
//@header
struct PickState {
  float best;    // noisy score
  float plain;   // its score without noise
  uint column;   // of best
  float top;     // largest score without noise
  float mass;    // sum of exp(score - top)
};

inline PickState no_pick(uint columns) {
  PickState state;
  state.best = -INFINITY;
  state.plain = -INFINITY;
  state.column = columns;
  state.top = -INFINITY;
  state.mass = 0.0f;
  return state;
}

// exp(x - top), and exp(0) where both are the same infinity
inline float mass_of(float x, float top) {
  return x == top ? 1.0f : exp(x - top);
}

// Merges two states, in any order: the larger best wins, or the lower column if they are equal.
inline PickState joined(PickState a, PickState b) {
  const uint lead_a = lead_of(a.best);
  const uint lead_b = lead_of(b.best);
  const bool second = lead_b > lead_a || (lead_b == lead_a && b.column < a.column);
  PickState state;
  state.best = second ? b.best : a.best;
  state.plain = second ? b.plain : a.plain;
  state.column = second ? b.column : a.column;
  state.top = a.top > b.top ? a.top : b.top;
  const float mass_a = a.mass * mass_of(a.top, state.top);
  const float mass_b = b.mass * mass_of(b.top, state.top);
  state.mass = mass_a + mass_b;
  return state;
}

// The state of the lane whose index differs in the bits of `step`.
inline PickState state_across(PickState a, ushort step) {
  PickState state;
  state.best = simd_shuffle_xor(a.best, step);
  state.plain = simd_shuffle_xor(a.plain, step);
  state.column = simd_shuffle_xor(a.column, step);
  state.top = simd_shuffle_xor(a.top, step);
  state.mass = simd_shuffle_xor(a.mass, step);
  return state;
}
//@body
  constexpr uint K_LANES = 8;                       // lanes of a simdgroup along size
  constexpr uint COLUMNS = 4;                       // columns per lane
  constexpr uint TILE = (32 / K_LANES) * COLUMNS;   // columns per tile
  constexpr uint SPLITS = 4;                        // simdgroups
  constexpr uint THREADS = 32 * SPLITS;
  constexpr uint VALUES = 16;                       // values per lane and turn, in four quads
  constexpr uint TURN = K_LANES * VALUES;           // values per simdgroup and turn
  constexpr uint SLOTS = (ROWS * TILE + THREADS - 1) / THREADS;  // summed logits per thread
  constexpr uint WORDS = BITS == 0 ? 2 : VALUES * BITS / 32;
  constexpr uint PER_WORD = BITS == 0 ? 1 : 32 / BITS;
  constexpr uint SHARE = BITS == 0 ? 1 : GROUP / VALUES;  // neighbouring lanes with the same scale

  threadgroup float partial[SPLITS * ROWS * TILE];

  const uint rows = uint(hidden_shape[0]);
  const uint size = uint(hidden_shape[1]);
  const uint columns = uint(weight_shape[0]);
  const uint thread_index = thread_index_in_threadgroup;
  const uint lane = thread_index_in_simdgroup;
  const uint split = simdgroup_index_in_threadgroup;
  const uint k_lane = lane % K_LANES;
  const uint lane_column = lane / K_LANES * COLUMNS;  // this lane's first column within the tile
  const uint part = threadgroup_position_in_grid.x;
  const uint parts = threadgroups_per_grid.x;
  const uint n_tiles = uint(plan[0]);
  const float scale_of_logits = inverse_temperature[0];

  PickState states[SLOTS];
  for (uint slot = 0; slot < SLOTS; slot++) {
    states[slot] = no_pick(columns);
  }

  for (uint turn = 0; turn < n_tiles; turn++) {
    const uint tile = (part * n_tiles + turn) * TILE;
    const uint first = tile + lane_column;
    float sums[COLUMNS][ROWS];
    for (uint c = 0; c < COLUMNS; c++) {
      #pragma unroll
      for (uint m = 0; m < ROWS; m++) {
        sums[c][m] = 0.0f;
      }
    }

    for (uint base = split * TURN; base < size; base += SPLITS * TURN) {  // the same for all lanes of a simdgroup
      uint words[COLUMNS][WORDS];
      float scale[COLUMNS];
      float bias[COLUMNS];
      if (BITS != 0) {
        const uint k = base + k_lane * VALUES;
        for (uint c = 0; c < COLUMNS; c++) {
          const bool live = k < size && first + c < columns;
          const size_t row = first + c;
          for (uint i = 0; i < WORDS; i += 2) {
            uint2 pair = uint2(0u);
            if (live) {
              pair = *(const device uint2*)(weight + row * (size / PER_WORD) + k / PER_WORD + i);
            }
            words[c][i] = pair.x;
            words[c][i + 1] = pair.y;
          }
          const bool loads = live && k_lane % SHARE == 0;  // and shares it with the lanes of its group
          const size_t at = row * (size / (SHARE * VALUES)) + k / (SHARE * VALUES);
          scale[c] = simd_shuffle(loads ? float(scales[at]) : 0.0f, ushort(lane - k_lane % SHARE));
          bias[c] = simd_shuffle(loads ? float(biases[at]) : 0.0f, ushort(lane - k_lane % SHARE));
        }
      }
      #pragma unroll
      for (uint quad = 0; quad < VALUES / 4; quad++) {
        // Lanes read adjacent memory: 16 values per lane if quantised, 4 at a time if dense.
        const uint k = BITS == 0 ? base + quad * 32 + k_lane * 4 : base + k_lane * VALUES + quad * 4;
        if (k < size) {
          float values[COLUMNS][4];
          for (uint c = 0; c < COLUMNS; c++) {
            if (BITS == 0) {
              vec<T, 4> four = vec<T, 4>(T(0.0f));
              if (first + c < columns) {
                four = *(const device vec<T, 4>*)(weight + size_t(first + c) * size + k);
              }
              for (uint j = 0; j < 4; j++) {
                values[c][j] = float(four[j]);
              }
            } else {
              for (uint j = 0; j < 4; j++) {
                const uint at = quad * 4 + j;
                const uint value = (words[c][at / PER_WORD] >> (BITS * (at % PER_WORD))) & ((1u << BITS) - 1u);
                values[c][j] = fma(float(value), scale[c], bias[c]);
              }
            }
          }
          #pragma unroll
          for (uint m = 0; m < ROWS; m++) {
            const uint row = min(m, rows - 1);
            const vec<T, 4> four = *(const device vec<T, 4>*)(hidden + row * size + k);
            for (uint j = 0; j < 4; j++) {
              const float x = float(four[j]);
              for (uint c = 0; c < COLUMNS; c++) {
                sums[c][m] = fma(x, values[c][j], sums[c][m]);
              }
            }
          }
        }
      }
    }

    for (uint c = 0; c < COLUMNS; c++) {
      #pragma unroll
      for (uint m = 0; m < ROWS; m++) {
        float sum = sums[c][m];
        for (ushort step = 1; step < K_LANES; step *= 2) {
          sum += simd_shuffle_xor(sum, step);
        }
        if (k_lane == 0) {
          partial[(split * ROWS + m) * TILE + lane_column + c] = sum;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (uint slot = 0; slot < SLOTS; slot++) {
      const uint index = thread_index + slot * THREADS;  // row * TILE + column of the tile
      const uint column = tile + index % TILE;
      const uint row = index / TILE;
      if (row < rows && column < columns) {
        float logit = partial[index];
        for (uint s = 1; s < SPLITS; s++) {
          logit += partial[s * ROWS * TILE + index];
        }
        PickState here;
        here.plain = logit * scale_of_logits;
        here.best = here.plain;
        if (plan[1] != 0) {
          const uint token = plan[2] != 0 ? uint(token_ids[column]) : column;
          const uint bits = noise_bits(keys[2 * row], keys[2 * row + 1], token);
          here.best = here.plain + gumbel_of_uniform(uniform_of_bits(bits));
        }
        here.column = column;
        here.top = here.plain;
        here.mass = 1.0f;
        states[slot] = joined(states[slot], here);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the next tile overwrites what was read here
  }

  for (uint slot = 0; slot < SLOTS; slot++) {
    PickState state = states[slot];
    for (ushort step = 1; step < TILE; step *= 2) {  // a row's columns are TILE neighbouring lanes
      state = joined(state, state_across(state, step));
    }
    const uint index = thread_index + slot * THREADS;
    const uint row = index / TILE;
    if (index % TILE == 0 && row < rows) {
      const uint at = row * parts + part;
      const uint field = rows * parts;
      part_values[at] = state.best;
      part_values[field + at] = state.plain;
      part_values[2 * field + at] = state.top;
      part_values[3 * field + at] = state.mass;
      part_columns[at] = int(state.column);
    }
  }
