// Attention of the few rows of a block over a long KV cache: partial results of one chunk of the keys.
//
// The cache's last R keys are the block's own rows. Row r sees every key before those (the prefix) and, among the
// block's rows, those whose bit is set in visible[r]. The g = Hq / Hkv query heads of a key head and the R rows are
// packed: `packed` = g * R rows share each key and value, which are read from device memory once per threadgroup.
//
//   queries [Hq, R, D]          T       as [Hkv, packed, D]: the query heads of a key head are adjacent
//   keys    [Hkv, capacity, D]  T       only the first `length` rows of a head are read
//   values  [Hkv, capacity, D]  T
//   visible [R]                 uint32  bit j of row r: r sees block row j
//   scale   [1]                 float
//   numbers [5]                 int32   R, packed, length, capacity, chunk (keys per chunk, a multiple of 32)
//   out     [chunks, Hq, R, D]  O       softmax-weighted mean of the chunk's visible values; 0 if none is visible
//   stats   [chunks, Hq, R, 2]  float   largest score, and sum of exp(score - largest) over the chunk's visible keys
// template: T, O (T for a single chunk, else float), D (64, 80, 96, 128, 256), ROWS packed rows per simdgroup,
//           GROUPS simdgroups per threadgroup.
// threadgroup (32 * GROUPS, 1, 1); grid (32 * GROUPS * chunks, Hkv, ceil(packed / (GROUPS * ROWS))).
//
// Keys are processed in tiles of 32. For scores, each lane has one key; for weighted values, every 32nd column. Keys
// and values pass through one small slab of threadgroup memory, keys a few columns at a time, values a few rows.
// Rows past `packed` are computed from zeros and not stored, so that control flow does not diverge.
//@header
constant constexpr int TILE = 32;           // keys per tile, one per lane
constant constexpr float LOWEST = -3.0e38f;  // finite, so that differences with it are not NaN

// Columns of keys in the slab: all if there are at most 96, else 64.
inline constexpr int slab_columns(int D) {
  return D <= 96 ? D : 64;
}

template <typename T>
inline float4 widen(vec<T, 4> v) {
  return float4(float(v[0]), float(v[1]), float(v[2]), float(v[3]));
}

// The running softmax of a simdgroup's rows. `sum` is the lane's own share.
template <int ROWS, int COLUMNS>
struct Partial {
  float top[ROWS];
  float sum[ROWS];
  float mean[ROWS][COLUMNS];
};

template <int ROWS, int COLUMNS>
inline void clear(thread Partial<ROWS, COLUMNS>& rows) {
  for (int i = 0; i < ROWS; i++) {
    rows.top[i] = LOWEST;
    rows.sum[i] = 0.0f;
    for (int j = 0; j < COLUMNS; j++) {
      rows.mean[i][j] = 0.0f;
    }
  }
}

// Rows of a matrix [., D] in device memory. load: STEP vectors of a row, beginning with vector `at`.
template <typename T, int D>
struct PlainRows {
  enum { STEP = 1 };
  const device T* start;
  inline void load(int row, int at, thread vec<T, 4>* v) const {
    v[0] = *(const device vec<T, 4>*)(start + size_t(row) * D + 4 * at);
  }
};

// Copies `count` rows beginning with `first`, `width` vectors of each beginning with vector `column`, to the slab. Rows
// from `end` on are not read and become zero.
template <typename T, typename Rows>
inline void stage(
    threadgroup vec<T, 4>* slab,
    int stride,
    const Rows source,
    int first,
    int count,
    int end,
    int column,
    int width,
    int me,
    int threads) {
  constexpr int STEP = int(Rows::STEP);
  const int steps = width / STEP;
  for (int i = me; i < count * steps; i += threads) {
    const int row = i / steps;
    const int at = i % steps * STEP;
    vec<T, 4> v[STEP];
    for (int j = 0; j < STEP; j++) {
      v[j] = vec<T, 4>(T(0));
    }
    if (first + row < end) {
      source.load(first + row, column + at, v);
    }
    for (int j = 0; j < STEP; j++) {
      slab[row * stride + at + j] = v[j];
    }
  }
}

// Adds the dot products of `width` vectors of this lane's key with the simdgroup's rows.
template <typename T, int D, int ROWS>
inline void add_scores(
    thread float* score,
    const threadgroup vec<T, 4>* q,
    const threadgroup vec<T, 4>* key,
    int width) {
  for (int at = 0; at < width; at++) {
    const float4 k = widen<T>(key[at]);
    for (int i = 0; i < ROWS; i++) {
      score[i] += dot(widen<T>(q[i * (D / 4) + at]), k);
    }
  }
}

// Updates the running softmax with a tile's scores, and writes the tile's weights to threadgroup memory.
// `offset` is the lane's key counted from the block's first row; it is negative in the prefix.
template <int ROWS, int COLUMNS>
inline void fold(
    thread Partial<ROWS, COLUMNS>& rows,
    thread const float* score,
    thread const uint* sees,
    float scale,
    int offset,
    bool live,
    threadgroup float* weights,
    uint lane) {
  for (int i = 0; i < ROWS; i++) {
    const bool seen = live && (offset < 0 || ((sees[i] >> uint(max(offset, 0))) & 1u) != 0u);
    const float s = seen ? score[i] * scale : LOWEST;
    const float top = max(rows.top[i], simd_max(s));
    const float keep = fast::exp(rows.top[i] - top);
    const float weight = seen ? fast::exp(s - top) : 0.0f;
    rows.top[i] = top;
    rows.sum[i] = rows.sum[i] * keep + weight;
    for (int j = 0; j < COLUMNS; j++) {
      rows.mean[i][j] *= keep;
    }
    weights[i * TILE + int(lane)] = weight;
  }
}

// Adds `count` weighted value rows: this lane's columns are lane, lane + 32, ...
template <typename T, int D, int ROWS, int COLUMNS>
inline void add_values(
    thread Partial<ROWS, COLUMNS>& rows,
    const threadgroup float4* weights,
    const threadgroup T* slab,
    int count,
    uint lane) {
  for (int k = 0; k < count; k += 4) {
    float4 v[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) {
      const int d = int(lane) + 32 * j;
      v[j] = float4(0.0f);
      if (d < D) {
        const threadgroup T* at = slab + k * D + d;
        v[j] = float4(float(at[0]), float(at[D]), float(at[2 * D]), float(at[3 * D]));
      }
    }
    for (int i = 0; i < ROWS; i++) {
      const float4 weight = weights[(i * TILE + k) / 4];
      for (int j = 0; j < COLUMNS; j++) {
        rows.mean[i][j] += dot(weight, v[j]);
      }
    }
  }
}

// Attends to the keys begin..end-1; those from `own` on belong to the block. q and weights are the simdgroup's own.
template <typename T, int D, int ROWS, int COLUMNS, typename Rows>
inline void attend(
    thread Partial<ROWS, COLUMNS>& rows,
    const Rows keys,
    const Rows values,
    thread const uint* sees,
    const threadgroup vec<T, 4>* q,
    threadgroup vec<T, 4>* slab,
    threadgroup float4* weights,
    float scale,
    int begin,
    int end,
    int own,
    int me,
    int threads,
    uint lane) {
  constexpr int WIDTH = slab_columns(D) / 4;  // vectors of a key in the slab
  constexpr int STRIDE = WIDTH + 1;           // one more, so that lanes use different banks
  constexpr int VALUES = 4 * TILE * WIDTH / D;  // value rows in the slab
  for (int tile = begin; tile < end; tile += TILE) {
    float score[ROWS];
    for (int i = 0; i < ROWS; i++) {
      score[i] = 0.0f;
    }
    for (int column = 0; column < D / 4; column += WIDTH) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the slab may be overwritten, the queries are loaded
      stage<T>(slab, STRIDE, keys, tile, TILE, end, column, WIDTH, me, threads);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      add_scores<T, D, ROWS>(score, q + column, slab + int(lane) * STRIDE, WIDTH);
    }
    const int key = tile + int(lane);
    fold(rows, score, sees, scale, key - own, key < end, (threadgroup float*)weights, lane);
    for (int from = 0; from < TILE; from += VALUES) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // the slab may be overwritten, the weights are written
      stage<T>(slab, D / 4, values, tile + from, VALUES, end, 0, D / 4, me, threads);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      add_values<T, D>(rows, weights + from / 4, (const threadgroup T*)slab, VALUES, lane);
    }
  }
}

// Stores the simdgroup's rows, which begin at row `first` of this head's `packed` rows.
template <typename O, int D, int ROWS, int COLUMNS>
inline void store(
    thread const Partial<ROWS, COLUMNS>& rows,
    device O* out,
    device float* stats,
    int first,
    int packed,
    uint lane) {
  for (int i = 0; i < ROWS; i++) {
    const float sum = simd_sum(rows.sum[i]);
    const float share = sum > 0.0f ? 1.0f / sum : 0.0f;
    if (first + i < packed) {
      for (int j = 0; j < COLUMNS; j++) {
        const int d = int(lane) + 32 * j;
        if (d < D) {
          out[size_t(first + i) * D + d] = O(rows.mean[i][j] * share);
        }
      }
      if (lane == 0) {
        stats[2 * (first + i)] = rows.top[i];
        stats[2 * (first + i) + 1] = sum;
      }
    }
  }
}
//@body
  constexpr int PACKED = GROUPS * ROWS;  // rows of this threadgroup
  threadgroup vec<T, 4> q[PACKED * (D / 4)];
  threadgroup vec<T, 4> slab[TILE * (slab_columns(D) / 4 + 1)];
  threadgroup float4 weights[PACKED * TILE / 4];

  const uint lane = thread_index_in_simdgroup;
  const int mine = int(simdgroup_index_in_threadgroup) * ROWS;  // this simdgroup's first row in the threadgroup
  const int me = int(thread_position_in_threadgroup.x);
  const int R = numbers[0];
  const int packed = numbers[1];
  const int length = numbers[2];
  const int head = int(threadgroup_position_in_grid.y);
  const int first_row = int(threadgroup_position_in_grid.z) * PACKED;
  const int begin = int(threadgroup_position_in_grid.x) * numbers[4];
  const int end = min(begin + numbers[4], length);
  const size_t cache = size_t(head) * size_t(numbers[3]) * D;
  const PlainRows<T, D> head_queries = {queries + size_t(head) * packed * D};
  const PlainRows<T, D> head_keys = {keys + cache};
  const PlainRows<T, D> head_values = {values + cache};

  stage<T>(q, D / 4, head_queries, first_row, PACKED, packed, 0, D / 4, me, 32 * GROUPS);
  Partial<ROWS, (D + 31) / 32> rows;
  clear(rows);
  uint sees[ROWS];
  for (int i = 0; i < ROWS; i++) {
    sees[i] = visible[(first_row + mine + i) % R];
  }
  attend<T, D>(rows, head_keys, head_values, sees, q + mine * (D / 4), slab, weights + mine * TILE / 4, scale[0],
               begin, end, length - R, me, 32 * GROUPS, lane);
  const size_t block = (size_t(threadgroup_position_in_grid.x) * threadgroups_per_grid.y + head) * size_t(packed);
  store<O, D>(rows, out + block * D, stats + block * 2, first_row + mine, packed, lane);
