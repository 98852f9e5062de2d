"""Noise that is fixed by (seed, position, token id): a counter-based generator.

Contract: every value is a pure function of these integers. Nothing is stored, so the noise of a position is the
same in any block, at any row, for target and drafter, over a full or a reduced vocabulary.
Non-goal: cryptography.

The generator, in unsigned 32-bit arithmetic modulo 2^32, so that a Metal kernel can reproduce it bit for bit:

1. Row keys. (key_0, key_1) = Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy
   as 1, 2, 3", SC 2011), key = (seed mod 2^32, seed div 2^32), counter = (position, 0).
2. Bits of a token id, a finaliser of two multiplications (constants: Wellons' "lowbias32"):
       x = id ^ key_0
       x = (x ^ (x >> 16)) * 0x7feb352d
       x = x ^ key_1
       x = (x ^ (x >> 15)) * 0x846ca68b
       x = x ^ (x >> 16)
3. Uniform, in float32: w = min((float(x) + 0.5) * 2^-32, 1 - 2^-24), inside (0, 1). float(x) rounds to
   nearest, which alone would give w = 1 for the 128 largest x.
4. Gumbel, in float32: g = -log(e) with e = -log1p(-w). Libraries round log1p differently, so it is written out
   (Kahan's form; -, *, / are IEEE operations, each rounded once):
       u = 1 - w
       e = w                             where u = 1
       e = (-log(u)) * (w / (1 - u))     elsewhere
   Large g come from small w, where float32 is finest, so the tail that decides an argmax keeps its precision:
   g lies in [-2.82, 22.88]. No product feeds an addition, so contraction into fused operations changes nothing.

Parallel Token Prediction uses one uniform per position instead, for the inverse CDF:
   u = (key_0 >> 8) * 2^-24, exact in float32, in [0, 1).

On a given device, every program that follows the four steps with the device's float32 `log` gets the same bits (the
Metal kernels do). Between devices steps 1 to 3 are identical, and step 4 can differ in the last bits, with `log`.

Legend: R rows, N token ids.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

THREEFRY_PARITY = 0x1BD11BDA
THREEFRY_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
THREEFRY_ROUNDS = 20
FINALISER = (0x7FEB352D, 0x846CA68B)
LARGEST_UNIFORM = 1.0 - 2.0**-24


def _uint32(value: int) -> mx.array:
    return mx.array(value, dtype=mx.uint32)


def _threefry2x32(
    key_0: mx.array, key_1: mx.array, word_0: mx.array, word_1: mx.array
) -> tuple[mx.array, mx.array]:
    """Threefry-2x32 with 20 rounds on uint32 arrays of one shape."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ _uint32(THREEFRY_PARITY))
    word_0, word_1 = word_0 + keys[0], word_1 + keys[1]
    for index in range(THREEFRY_ROUNDS):
        rotation = THREEFRY_ROTATIONS[index % 8]
        word_0 = word_0 + word_1
        word_1 = ((word_1 << rotation) | (word_1 >> (32 - rotation))) ^ word_0
        if index % 4 == 3:
            injection = index // 4 + 1
            word_0 = word_0 + keys[injection % 3]
            word_1 = word_1 + keys[(injection + 1) % 3] + _uint32(injection)
    return word_0, word_1


@partial(mx.compile, shapeless=True)
def _row_keys(seed_words: mx.array, positions: mx.array) -> mx.array:
    zeros = mx.zeros_like(positions)
    return mx.stack(list(_threefry2x32(seed_words[0], seed_words[1], positions, zeros)), axis=-1)


def row_keys(seed: int, positions: mx.array) -> mx.array:
    """The row keys of positions, uint32 [R, 2].

    seed       0 <= seed < 2^64
    positions  [R] integers >= 0, the absolute position of the token each row picks
    """
    seed_words = mx.array([seed & 0xFFFFFFFF, seed >> 32], dtype=mx.uint32)
    return _row_keys(seed_words, positions.astype(mx.uint32))


def uniform_bits(keys: mx.array, token_ids: mx.array) -> mx.array:
    """32 uniform bits per row and token id, uint32 [R, N].

    keys       uint32 [R, 2] from `row_keys`
    token_ids  [N] integers >= 0, real vocabulary ids
    """
    key_0, key_1 = keys[:, :1], keys[:, 1:]
    x = token_ids.astype(mx.uint32)[None, :] ^ key_0
    x = (x ^ (x >> 16)) * _uint32(FINALISER[0])
    x = x ^ key_1
    x = (x ^ (x >> 15)) * _uint32(FINALISER[1])
    return x ^ (x >> 16)


def gumbel_of_bits(bits: mx.array) -> mx.array:
    """Standard Gumbel noise, float32, of uniform bits, uint32, of any shape."""
    uniform = (bits.astype(mx.float32) + 0.5) * 2.0**-32
    uniform = mx.minimum(uniform, LARGEST_UNIFORM)
    rest = 1.0 - uniform
    # 1 - rest is what is left of the uniform after rounding; the ratio restores what was rounded away.
    exponential = (-mx.log(rest)) * (uniform / (1.0 - rest))
    return -mx.log(mx.where(rest == 1.0, uniform, exponential))


@mx.compile
def gumbel_of_keys(keys: mx.array, token_ids: mx.array) -> mx.array:
    """Standard Gumbel noise of row keys and token ids, float32 [R, N]; arguments as `uniform_bits`."""
    return gumbel_of_bits(uniform_bits(keys, token_ids))


def gumbel(seed: int, positions: mx.array, token_ids: mx.array) -> mx.array:
    """Standard Gumbel noise of (seed, position, token id), float32 [R, N], finite.

    seed       0 <= seed < 2^64
    positions  [R] integers >= 0
    token_ids  [N] integers >= 0
    """
    return gumbel_of_keys(row_keys(seed, positions), token_ids)


def position_uniforms(seed: int, positions: mx.array) -> mx.array:
    """One uniform per (seed, position), float32 of the shape of `positions`, a multiple of 2^-24 in [0, 1).

    seed       0 <= seed < 2^64
    positions  integers >= 0, the absolute position of the token that the uniform picks
    """
    words = row_keys(seed, positions.reshape(-1))[:, 0]
    return ((words >> 8).astype(mx.float32) * 2.0**-24).reshape(positions.shape)
