"""Writes tiny random GGUF files with llama.cpp's own `gguf` package, for the converter's tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

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


def shapes(arch: str, n_vocab: int, tied: bool, bias: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a tiny model."""
    out: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    if not tied:
        out["output.weight"] = (n_vocab, HIDDEN)
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_gate.weight": (FFN, HIDDEN),
            "ffn_up.weight": (FFN, HIDDEN),
            "ffn_down.weight": (HIDDEN, FFN),
        }
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
) -> Written:
    """A tiny random model with all matrices of type `kind`. `metadata` overrides keys, None removes one."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    metadata = default_metadata(arch) | (metadata or {})
    add_metadata(writer, metadata)
    written = Written(path)
    for name, shape in shapes(arch, len(metadata["tokenizer.ggml.tokens"] or TOKENS), tied, bias).items():
        value = rng.standard_normal(shape).astype(np.float32) * 0.3 + ("norm" in name)
        if name in leave_out:
            continue
        quantisation = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        raw = gguf.quants.quantize(value, quantisation)
        written.arrays[name] = gguf.quants.dequantize(raw, quantisation).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=quantisation)
    for name, value in (extra or {}).items():
        written.arrays[name] = value
        writer.add_tensor(name, value)
    finish(writer)
    return written


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
