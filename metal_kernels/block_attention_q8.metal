// Attention of the few rows of a block over a long 8-bit KV cache: as block_attention.metal, with keys and values in
// MLX's affine 8-bit layout, as in mlx-lm's QuantizedKVCache. The header of block_attention.metal precedes this one.
//
//   queries [Hq, R, D]               T       as [Hkv, packed, D]
//   keys    [Hkv, capacity, D / 4]   uint32  element d of a row is byte d % 4 of word d / 4
//   key_scales, key_biases [Hkv, capacity, D / G] T   element = byte * scale + bias, rounded to T
//   values, value_scales, value_biases              like the keys
//   visible [R]                      uint32
//   scale   [1]                      float
//   numbers [5]                      int32
//   out     [chunks, Hq, R, D]       O
//   stats   [chunks, Hq, R, 2]       float
// template: T, O, D, ROWS, GROUPS as there (D: 64, 96, 128, 256), G elements per scale (32, 64, 128).
// threadgroup and grid: as there.
//@header
// Rows of an affine 8-bit matrix [., D], dequantised sixteen elements at a time, which share one scale.
template <typename T, int D, int G>
struct PackedRows {
  enum { STEP = 4 };
  const device uint* words;
  const device T* scales;
  const device T* biases;
  inline void load(int row, int at, thread vec<T, 4>* v) const {
    const uint4 word = *(const device uint4*)(words + size_t(row) * (D / 4) + at);
    const size_t group = size_t(row) * (D / G) + 4 * at / G;
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    for (int j = 0; j < STEP; j++) {
      for (int i = 0; i < 4; i++) {
        v[j][i] = T(float((word[j] >> uint(8 * i)) & 0xffu) * scale + bias);
      }
    }
  }
};
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
  const size_t cache = size_t(head) * size_t(numbers[3]);
  const PlainRows<T, D> head_queries = {queries + size_t(head) * packed * D};
  const size_t words = cache * (D / 4);
  const size_t groups = cache * (D / G);
  const PackedRows<T, D, G> head_keys = {keys + words, key_scales + groups, key_biases + groups};
  const PackedRows<T, D, G> head_values = {values + words, value_scales + groups, value_biases + groups};

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
