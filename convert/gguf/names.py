"""Which tensors of a GGUF file become which weights of mlx-lm, and which cannot. Needs no mlx."""

from __future__ import annotations

import re

from mtp_mlx.convert.gguf.blocks import BY_LIBRARY, DEQUANTISERS, library
from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.errors import ConversionError, needs_extra

SUPPORTED_TYPES = (*DEQUANTISERS, *BY_LIBRARY)

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
# Read into config.json (rope scaling), not a weight.
ROPE_FACTORS = "rope_freqs.weight"


def mlx_name(gguf_name: str) -> str | None:
    """mlx-lm's name of a GGUF tensor, or None if no dense llama, qwen2 or qwen3 model has that weight."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    match = LAYER.fullmatch(gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def check_tensors(gguf: GGUFFile) -> None:
    """Raise one ConversionError listing every tensor with an unsupported type or an unknown name."""
    by_type: dict[str, list[str]] = {}
    for info in gguf.tensors.values():
        by_type.setdefault(info.type_name, []).append(info.name)
    unsupported = [kind for kind in by_type if kind not in SUPPORTED_TYPES]
    if unsupported:
        raise ConversionError(
            f"{gguf.path}: tensors of unsupported type: {_listed(unsupported, by_type)}. Supported are "
            f"{', '.join(SUPPORTED_TYPES)}: requantise the checkpoint to one of these, Q8_0 for example."
        )
    borrowed = [kind for kind in by_type if kind in BY_LIBRARY]
    if borrowed and library() is None:
        what = f"{gguf.path}: tensors of type {_listed(borrowed, by_type)} are read through the package"
        raise ConversionError(str(needs_extra(what, "gguf", "gguf")))
    arch = gguf.metadata.get("general.architecture")
    read = {ROPE_FACTORS} if arch == "llama" else set()  # llama.cpp scales no other model by them
    unknown = [name for name in gguf.tensors if name not in read and mlx_name(name) is None]
    if unknown:
        raise ConversionError(
            f"{gguf.path}: {len(unknown)} tensors have no place in a dense {arch} model: "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}."
        )


def _listed(kinds: list[str], by_type: dict[str, list[str]]) -> str:
    """Types with one of their tensors each."""
    return "; ".join(f"{kind} ({by_type[kind][0]} and {len(by_type[kind]) - 1} more)" for kind in kinds)
