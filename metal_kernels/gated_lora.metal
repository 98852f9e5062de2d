// The low-rank update of a linear layer on slot rows only, in one launch: out = y + scale * (x @ down) @ up.
// Each threadgroup computes x @ down by itself, keeps it in threadgroup memory, and computes a tile of columns.
//
//   x       [R, inputs]       T      only rows n_real.. are read
//   y       [R, outputs]      T      the base layer's result; only rows n_real.. are read
//   down    [inputs, RANK]    T      read once by every threadgroup
//   up      [RANK, outputs]   T
//   scale   [1]               float
//   numbers [5]               int32  R, n_real, inputs, outputs, columns per threadgroup
//   out     [R - n_real, outputs]  T
// template: T, RANK, SLOTS: number of slot rows computed, at least R - n_real (4, 8, 16 or 32); surplus rows are zeros.
// threadgroup (256, 1, 1); grid (256 * ceil(outputs / columns), 1, 1). Sums in float.
//@header
constant constexpr int THREADS = 256;
constant constexpr int DEPTH = 64;  // inputs of x, or ranks of hidden, held in threadgroup memory at a time

// Number of slot rows whose partial sums are added at a time.
inline constexpr int rows_at_once(int slots) {
  return slots < 8 ? slots : 8;
}

// Where x @ down goes: threadgroup memory [rank, SLOTS], or a part of it in device memory [slots, rank].
template <int SLOTS>
struct HiddenNear {
  threadgroup float* start;
  inline void put(int slot, int j, float value) const {
    start[j * SLOTS + slot] = value;
  }
};
struct HiddenFar {
  device float* start;
  int slots;
  int rank;
  inline void put(int slot, int j, float value) const {
    if (slot < slots) {
      start[slot * rank + j] = value;
    }
  }
};

// hidden = x[:, begin..end-1] @ down[begin..end-1] for `width` columns of down.
// A thread has one column and every `shares`-th input; the partial sums are added at the end, in order.
// tile: [DEPTH, SLOTS]; scratch: [rows_at_once, THREADS].
template <typename T, int SLOTS, typename Hidden>
inline void project_down(
    const Hidden hidden,
    const device T* x,
    const device T* down,
    threadgroup float* tile,
    threadgroup float* scratch,
    int slots,
    int inputs,
    int rank,
    int width,
    int begin,
    int end,
    int me) {
  constexpr int BLOCK = rows_at_once(SLOTS);
  const int shares = THREADS / width;
  const int share = me / width;
  const int column = me % width;
  float acc[SLOTS];
  for (int s = 0; s < SLOTS; s++) {
    acc[s] = 0.0f;
  }
  for (int from = begin; from < end; from += DEPTH) {
    const int depth = min(DEPTH, end - from);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile may be overwritten
    for (int i = me; i < DEPTH * SLOTS; i += THREADS) {
      const int s = i / DEPTH;
      const int k = i % DEPTH;
      tile[k * SLOTS + s] = s < slots && k < depth ? float(x[size_t(s) * inputs + from + k]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the tile is loaded
    for (int k = share < shares ? share : depth; k < depth; k += shares) {
      const float w = float(down[size_t(from + k) * rank + column]);
      for (int s = 0; s < SLOTS; s++) {
        acc[s] += tile[k * SLOTS + s] * w;
      }
    }
  }
  for (int first = 0; first < SLOTS; first += BLOCK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the scratch may be overwritten
    for (int s = 0; s < BLOCK; s++) {
      scratch[s * THREADS + me] = acc[first + s];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the scratch is written
    for (int i = me; i < BLOCK * width; i += THREADS) {
      const int s = i / width;
      const int j = i % width;
      float sum = 0.0f;
      for (int p = 0; p < shares; p++) {
        sum += scratch[s * THREADS + p * width + j];
      }
      hidden.put(first + s, j, sum);
    }
  }
}

// Adds `count` ranks of hidden [count, SLOTS] times one column of up.
template <typename T, int SLOTS>
inline void add_up(
    thread float* acc, const threadgroup float* hidden, const device T* up, int count, int outputs) {
  for (int j = 0; j < count; j++) {
    const float w = float(up[size_t(j) * outputs]);
    for (int s = 0; s < SLOTS; s++) {
      acc[s] += hidden[j * SLOTS + s] * w;
    }
  }
}

// One column of the result; y and out point to it in the first slot row.
template <typename T, int SLOTS>
inline void add_base(
    thread const float* acc, const device T* y, device T* out, float scale, int slots, int outputs) {
  for (int s = 0; s < SLOTS; s++) {
    if (s < slots) {
      const size_t at = size_t(s) * outputs;
      out[at] = T(float(y[at]) + scale * acc[s]);
    }
  }
}
//@body
  threadgroup float tile[DEPTH * SLOTS];
  threadgroup float scratch[rows_at_once(SLOTS) * THREADS];
  threadgroup float hidden[RANK * SLOTS];
  const int n_real = numbers[1];
  const int slots = numbers[0] - n_real;
  const int inputs = numbers[2];
  const int outputs = numbers[3];
  const int me = int(thread_position_in_threadgroup.x);
  const int begin = int(threadgroup_position_in_grid.x) * numbers[4];
  const int end = min(begin + numbers[4], outputs);

  const HiddenNear<SLOTS> near = {hidden};
  project_down<T, SLOTS>(
      near, x + size_t(n_real) * inputs, down, tile, scratch, slots, inputs, RANK, RANK, 0, inputs, me);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // hidden is complete
  for (int column = begin + me; column < end; column += THREADS) {
    float acc[SLOTS];
    for (int s = 0; s < SLOTS; s++) {
      acc[s] = 0.0f;
    }
    add_up<T, SLOTS>(acc, hidden, up + column, RANK, outputs);
    add_base<T, SLOTS>(acc, y + size_t(n_real) * outputs + column, out + column, scale[0], slots, outputs);
  }
