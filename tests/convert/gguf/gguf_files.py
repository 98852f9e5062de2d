"""Writes tiny random GGUF files with llama.cpp's own `gguf` package, for the converter's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

# Types that `gguf` reads but does not write: (bytes of a block, where its scales lie, as float16).
READ_ONLY = {"Q2_K": (84, (80, 82)), "Q3_K": (110, (108,)), "IQ4_NL": (18, (0,)), "IQ4_XS": (136, (0,))}
# All sizes differ, so that swapped axes cannot pass.
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
MERGES = ["1 2", "12 3", "123 4", "Ġ t", "h e", "Ġt he", "l l", "he ll", "hell o", "Ã ©"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = SPECIAL + BYTES + [merge.replace(" ", "") for merge in MERGES]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@dataclass
class Written:
    """What a file holds: `arrays` as `gguf` itself dequantises them, under the file's names and in its row
    order."""

    path: Path
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def shapes(
    arch: str, n_vocab: int, tied: bool, bias: bool, hidden: int = HIDDEN
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a tiny model."""
    out: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    if not tied:
        out["output.weight"] = (n_vocab, hidden)
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "ffn_norm.weight": (hidden,),
            "attn_q.weight": (HEADS * HEAD_DIM, hidden),
            "attn_k.weight": (KV_HEADS * HEAD_DIM, hidden),
            "attn_v.weight": (KV_HEADS * HEAD_DIM, hidden),
            "attn_output.weight": (hidden, HEADS * HEAD_DIM),
            "ffn_gate.weight": (FFN, hidden),
            "ffn_up.weight": (FFN, hidden),
            "ffn_down.weight": (hidden, FFN),
        }
        if arch == "qwen3":
            layer |= {f"attn_{p}_norm.weight": (HEAD_DIM,) for p in "qk"}
        if bias or arch == "qwen2":
            layer |= {f"attn_{p}.bias": layer[f"attn_{p}.weight"][:1] for p in "qkv"}
        out |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return out


def write_model(
    path: Path,
    arch: str = "llama",
    kind: str = "F32",
    *,
    seed: int = 0,
    tied: bool = True,
    bias: bool = False,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    hidden: int = HIDDEN,
    split_max_tensors: int = 0,
) -> Written:
    """A tiny random model with all matrices of type `kind`, where their rows are whole blocks of it.

    `metadata` overrides keys, None removes one. With `split_max_tensors` it is written in parts of that many tensors.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    metadata = default_metadata(arch) | (metadata or {})
    add_metadata(writer, metadata)
    written = Written(path)
    n_vocab = len(metadata["tokenizer.ggml.tokens"] or TOKENS)
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    for name, shape in shapes(arch, n_vocab, tied, bias, hidden).items():
        value = rng.standard_normal(shape).astype(np.float32) * 0.3 + ("norm" in name)
        if name in leave_out:
            continue
        stored = kind if len(shape) == 2 and shape[1] % block == 0 else "F32"
        quantisation = gguf.GGMLQuantizationType[stored]
        raw = (
            random_blocks(rng, shape, kind)
            if stored in READ_ONLY
            else gguf.quants.quantize(value, quantisation)
        )
        written.arrays[name] = gguf.quants.dequantize(raw, quantisation).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=quantisation)
    for name, value in (extra or {}).items():
        written.arrays[name] = value
        writer.add_tensor(name, value)
    finish(writer)
    if split_max_tensors:
        written.path = min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return written


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A matrix of a type of READ_ONLY: (rows, bytes) random bytes with scales that keep the numbers near 1."""
    n_bytes, scales = READ_ONLY[kind]
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    raw = rng.integers(0, 256, (shape[0] * shape[1] // block, n_bytes), dtype=np.uint8)
    for at in scales:
        raw[:, at : at + 2] = rng.uniform(0.001, 0.01, len(raw)).astype("<f2")[:, None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def default_metadata(arch: str) -> dict[str, Any]:
    """The keys a converter needs, a byte-level tokenizer among them."""
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def add_metadata(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    """Add every entry that is not None under the type its Python value suggests."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write everything to disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
