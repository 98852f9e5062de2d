"""Recognises what is not a cascade: Medusa's heads, Meta's parallel heads, and LoRA adapters of PEFT.

None has a fuse weight. Medusa's head i reads the trunk's last hidden state and predicts the token i + 2 ahead;
Meta's extra head i is one more layer on the state before the trunk's last layer, and predicts the same.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtp_mlx.convert.heads.blocks import llama
from mtp_mlx.convert.heads.families import Found
from mtp_mlx.convert.heads.parts import Stored
from mtp_mlx.convert.heads.targets import TRANSPOSED, Step, Target
from mtp_mlx.convert.read.lazy_tensor import LazyTensor
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import ConversionError

_META = re.compile(r"extra_heads\.(\d+)\.")
_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class Form:
    """A form of heads.

    Attributes:
        title: what people call it.
        form: what the heads are, for people.
        name: of a tensor that only they have.
    """

    title: str
    convention: HeadConvention
    form: str
    name: str


MEDUSA = Form(
    "Medusa",
    HeadConvention("medusa", "medusa", "", recycled_hidden="none", output_norm="identity", lm_head="own"),
    "independent residual layers",
    "0.0.linear.weight",
)
META = Form(
    "Meta multi-token",
    HeadConvention(
        "meta", "parallel", "", first_hidden="before-last-layer", recycled_hidden="none", output_norm="trunk"
    ),
    "independent layers",
    "extra_heads.{n}.attention.wq.weight",
)
LORA = Form(
    "PEFT LoRA adapter",
    HeadConvention("peft-lora", "lora", "", recycled_hidden="none", output_norm="trunk"),
    "low-rank factors, with slot embeddings a mask-token adapter",
    "model.layers.{n}.self_attn.q_proj.lora_A.weight",
)
OTHER_FORMS = (MEDUSA, META, LORA)

# mlx-lm's name within a layer -> Meta's.
_META_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def find_medusa(tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> Found | None:
    """Medusa's heads: `{i}.{j}.linear.*`, residual layers, and `{i}.{n}.weight`, the LM head."""
    if "0.0.linear.weight" not in tensors:
        return None
    owned = {name for name in tensors if re.match(r"\d+\.", name)}
    width = tensors["0.0.linear.weight"].shape[0]
    # The published config gives another number of heads than the file has, so they are counted by name; one by one,
    # so that a name with a large number does not make millions of heads (it is reported as unexpected later).
    count = next(i for i in itertools.count(1) if not any(name.startswith(f"{i}.") for name in owned))
    depth = next(j for j in itertools.count(1) if f"0.{j}.linear.weight" not in tensors)
    lm_head = tensors.get(f"0.{depth}.weight")
    vocabulary = lm_head.shape[0] if lm_head else int(config.get("vocab_size") or 0)
    targets = []
    for i in range(count):
        for j in range(depth):
            for part, shape in (("weight", (width, width)), ("bias", (width,))):
                stored = ((f"{i}.{j}.linear.{part}", shape),)
                targets.append(Target(f"heads.{i}.residual.{j}.{part}", shape, stored))
        shape = (vocabulary, width)
        targets.append(Target(f"heads.{i}.lm_head.weight", shape, ((f"{i}.{depth}.weight", shape),)))
    return Found(MEDUSA.title, MEDUSA.convention, targets, [], owned, config, count=count)


def find_meta(tensors: Mapping[str, LazyTensor], params: dict[str, Any]) -> Found | None:
    """Meta's multi-token checkpoints: `extra_heads.{i}.` beside Llama-2's own names; `params` is params.json."""
    heads = sorted({int(m[1]) for m in map(_META.match, tensors) if m})
    if not heads:
        return None
    config = _llama_config(params)
    owned = {name for name in tensors if _META.match(name)}
    found = Found(META.title, META.convention, [], [], owned, config, count=len(heads))
    for i, n in enumerate(heads):
        block = llama(Stored(config, tensors.keys(), "", i, n))
        targets = tuple(_meta_target(target, f"extra_heads.{n}.", config) for target in block.targets)
        found.blocks.append(replace(block, targets=targets))
        found.targets += [replace(target, name=f"heads.{i}.block.{target.name}") for target in targets]
    return found


def _meta_target(target: Target, prefix: str, config: dict[str, Any]) -> Target:
    stem, suffix = target.name.rsplit(".", 1)
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    stored = ((f"{prefix}{_META_NAMES[stem]}.{suffix}", target.shape),)
    return (
        replace(target, sources=stored, step=_halves(heads[stem]))
        if stem in heads
        else replace(target, sources=stored)
    )


def _halves(heads: int) -> Step:
    """From neighbouring rows of q and k, which Meta's rotary embedding pairs, to mlx-lm's two halves of each head."""

    def apart(arrays: Any) -> Any:
        rows = arrays[0].reshape(heads, -1, 2, arrays[0].shape[1])
        return rows.swapaxes(1, 2)

    return Step("rows of each attention head put in halves", bits=apart)


def _llama_config(params: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a llama made of Meta's params.json, whose n_layers counts the extra heads too."""
    try:
        width, heads, layers = params["dim"], params["n_heads"], params["n_layers"]
        inner = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * width / 3))
        multiple = params.get("multiple_of", 256)
        future = params.get("n_future_tokens", 1)
    except (KeyError, TypeError) as error:
        raise ConversionError(
            f"params.json lacks {error}, so the shape of Meta's heads is unknown; put the checkpoint's own "
            "params.json beside the weights"
        ) from error
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers - future + 1,
        "intermediate_size": math.ceil(inner / multiple) * multiple,
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": params.get("vocab_size", 32000),
        "tie_word_embeddings": False,
    }


def find_lora(tensors: Mapping[str, LazyTensor], config: dict[str, Any]) -> Found | None:
    """A PEFT LoRA adapter: `<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].

    Its targets are the low-rank factors of a mask-token adapter: `low_rank.<layer>.down` [in, r], `.up` [r, out].
    """
    layers = sorted({m[1] for m in map(_LORA.fullmatch, tensors) if m})
    if not layers:
        return None
    by_layer: dict[tuple[str, str], str] = {}
    for name, match in ((name, _LORA.fullmatch(name)) for name in tensors):
        if not match:
            continue
        if len(tensors[name].shape) != 2:
            raise ConversionError(
                f"{name} is {list(tensors[name].shape)}, but low-rank factors of linear layers are matrices; "
                "adapters of other layers cannot be converted"
            )
        other = by_layer.setdefault((match[1], match[2]), name)
        if other != name:
            raise ConversionError(f"{other} and {name} are the same factor twice; keep one of them")
    paths = [layer.removeprefix("model.") for layer in layers]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConversionError(
            f"layer {twice} is there twice, once with the prefix 'model.'; keep one of them"
        )
    targets = []
    for layer in layers:
        path = layer.removeprefix("model.")
        down, up = by_layer.get((layer, "A")), by_layer.get((layer, "B"))
        rank, width = tensors[down].shape if down else (int(config.get("r") or 0), 0)
        height = tensors[up].shape[0] if up else 0
        a = down or str(up).replace("lora_B", "lora_A")
        b = up or str(down).replace("lora_A", "lora_B")
        targets += [
            Target(f"low_rank.{path}.down", (width, rank), ((a, (rank, width)),), TRANSPOSED),
            Target(f"low_rank.{path}.up", (rank, height), ((b, (height, rank)),), TRANSPOSED),
        ]
    return Found(LORA.title, LORA.convention, targets, [], set(tensors), config)
