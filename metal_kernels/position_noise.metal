// The noise of metal_kernels/position_noise.py, bit for bit, and the order of scores: a header for the kernels that pick
// tokens, placed before their own. It is never launched and has no body.
//@header
// A product must not be fused with the sum it feeds: MLX computes and rounds them separately.
#pragma METAL fp contract(off)

// 32 uniform bits of a row (its two keys) and a token id.
inline uint noise_bits(uint key_0, uint key_1, uint token) {
  uint x = token ^ key_0;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = x ^ key_1;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The uniform of these bits, in (0, 1).
inline float uniform_of_bits(uint bits) {
  const float shifted = float(bits) + 0.5f;
  return min(shifted * 2.3283064365386962890625e-10f, 0.999999940395355224609375f);
}

// Standard Gumbel noise of a uniform; -log1p(-w) is written out as in position_noise.py.
inline float gumbel_of_uniform(float w) {
  const float rest = 1.0f - w;
  float exponential = w;
  if (rest != 1.0f) {
    const float ratio = w / (1.0f - rest);
    exponential = (-precise::log(rest)) * ratio;
  }
  return -precise::log(exponential);
}

// A cheap upper bound of gumbel_of_uniform(w): -log1p(-w) >= w. The slack is far above both functions' errors.
inline float most_gumbel(float w) {
  return 0.001f - 0.693147182f * fast::log2(w);
}

// Whether a score beats the best of the lower columns: it is greater, or the first NaN, as in mx.argmax.
inline bool takes_lead(float score, float best) {
  return !(score <= best) && best == best;
}

// An unsigned integer with the order of takes_lead: NaN is the largest, -0 equals 0. Reductions over threads use it
// because Metal does not define simd_max for NaN.
inline uint lead_of(float score) {
  const uint bits = as_type<uint>(score == 0.0f ? 0.0f : score);
  const uint ordered = (bits >> 31) != 0u ? ~bits : (bits | 0x80000000u);
  return score == score ? ordered : 0xffffffffu;
}
//@body
