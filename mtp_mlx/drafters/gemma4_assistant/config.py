"""What an assistant's checkpoint says of it, and its section of the adapter folder's header. Needs no mlx.

    assistant.backbone_hidden_size            D, width of the model that it was trained with
    assistant.text_config                     of its layers, as in the checkpoint; read as mlx-lm's `gemma4_text`
    assistant.tie_word_embeddings             whether its LM head is its own embedding
    assistant.use_ordered_embeddings          whether it has centroids (E2B and E4B)
    assistant.num_centroids, assistant.centroid_intermediate_top_k    clusters of tokens, and how many are scored
    assistant.position                        where it looks back from: a key of `POSITIONS`
    assistant.quantization                    of layers that are stored quantised, as in folders of MTP heads

The form is that of transformers' `gemma4_assistant` and `gemma4_unified_assistant`, which differ in defaults alone.
The tensors keep the names of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mtp_mlx.adapter_folder import CardLines, Header, check_method, damage

METHOD = "gemma4-assistant"
MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
SLIDING, FULL = "sliding_attention", "full_attention"
# All drafts of a step have one position: that of the row whose state the first of them takes (mlx-vlm, vLLM), or that
# of the token behind it, the target's own pick (transformers' code). No checkpoint says which.
POSITIONS = {"state": "the row whose state it takes", "token": "the token that it takes"}
DEFAULT_DRAFTS = 3  # a step, if they are not planned; as mlx-vlm's blocks of 4 tokens
MOST_DRAFTS = 16

# Fields of the text configuration that decide how the layers are built.
_TEXT = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim"),
    *("global_head_dim", "rms_norm_eps", "vocab_size", "layer_types", "rope_parameters", "sliding_window"),
    *("max_position_embeddings", "rope_traditional"),
)
_NUMBERS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "head_dim")
# What no assistant has: layers built by it would need more than they are given.
_ABSENT = ("hidden_size_per_layer_input", "enable_moe_block", "use_double_wide_mlp", "attention_bias")


def is_assistant(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of an assistant."""
    return config.get("model_type") in MODEL_TYPES


@dataclass(frozen=True)
class AssistantConfig:
    """How an assistant is built; see the module.

    Raises:
        ValueError: if it does not describe an assistant.
    """

    backbone_hidden_size: int
    text_config: Mapping[str, Any]
    tie_word_embeddings: bool = True
    use_ordered_embeddings: bool = False
    num_centroids: int = 2048
    centroid_intermediate_top_k: int = 32
    position: str = "state"
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.text_config
        if not isinstance(text, Mapping):
            raise ValueError("it has no text_config")
        sizes = {"backbone_hidden_size": self.backbone_hidden_size, "vocab_size": text.get("vocab_size")}
        for name, value in {**sizes, **{name: text.get(name) for name in _NUMBERS}}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"its {name} is {value!r}")
        kinds = text.get("layer_types")
        if not isinstance(kinds, list | tuple) or len(kinds) != text["num_hidden_layers"]:
            raise ValueError(f"its layer_types are {kinds!r}")
        if unknown := set(kinds) - {SLIDING, FULL}:
            raise ValueError(f"it has layers of the kind {sorted(map(str, unknown))[0]!r}")
        if SLIDING in kinds and type(text.get("sliding_window")) is not int:
            raise ValueError(f"its sliding_window is {text.get('sliding_window')!r}")
        if odd := next((name for name in _ABSENT if text.get(name)), None):
            raise ValueError(f"it has {odd} {text[odd]!r}, which assistants do not have")
        if self.position not in POSITIONS:
            raise ValueError(f"its position is {self.position!r}, not one of {', '.join(POSITIONS)}")
        if self.use_ordered_embeddings:
            self._check_centroids(text["vocab_size"])

    def _check_centroids(self, vocab_size: int) -> None:
        count, most = self.num_centroids, self.centroid_intermediate_top_k
        if type(count) is not int or count < 1 or vocab_size % count:
            raise ValueError(f"its vocabulary of {vocab_size} cannot be divided among {count!r} centroids")
        if type(most) is not int or not 1 <= most <= count:
            raise ValueError(f"it scores {most!r} of {count} centroids")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AssistantConfig:
        """The assistant that a `config.json`, or the section of a header, describes.

        Raises:
            KeyError, TypeError, ValueError: if it does not describe one.
        """
        known = {item.name: config[item.name] for item in fields(cls) if item.name in config}
        text = config["text_config"]
        if isinstance(text, Mapping):
            absent = {name: text[name] for name in _ABSENT if text.get(name)}
            known["text_config"] = {name: text[name] for name in _TEXT if name in text} | absent
        return cls(**known)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer."""
        return tuple(self.text_config["layer_types"])

    @property
    def window(self) -> int:
        """Rows that a sliding layer sees, that of its own position included; 0 if there is none."""
        return int(self.text_config.get("sliding_window") or 0)

    def head_dim(self, kind: str) -> int:
        """Numbers of a head in layers of a kind."""
        wide = self.text_config.get("global_head_dim") if kind == FULL else None
        return int(wide or self.text_config["head_dim"])

    def to_json(self) -> dict[str, Any]:
        """The section `assistant` of the header."""
        section = {item.name: getattr(self, item.name) for item in fields(self)}
        if not self.use_ordered_embeddings:
            section.pop("num_centroids")
            section.pop("centroid_intermediate_top_k")
        return {name: value for name, value in section.items() if name != "quantization" or value}


def assistant_header(
    config: AssistantConfig, base_name: str, fingerprint: str | None, **about: Any
) -> Header:
    """The header of an assistant's folder; `about`: what else `Header` holds."""
    return Header(METHOD, base_name, fingerprint, {"assistant": config.to_json()}, **about)


def config_of(folder: Path, header: Header) -> AssistantConfig:
    """What the header of `folder` says of its assistant.

    Raises:
        MTPError: if the folder is of another method, or damaged.
    """
    check_method(folder, header, METHOD)
    with damage(folder):
        return AssistantConfig.of(header.own["assistant"])


def facts(folder: Path, header: Header) -> dict[str, Any]:
    """What `mtp-mlx info` shows of the method's own section."""
    return shown(config_of(folder, header))


def shown(config: AssistantConfig) -> dict[str, Any]:
    """An assistant's shape, for people."""
    text, bits = config.text_config, config.quantization.get("bits")
    scored = f"{config.centroid_intermediate_top_k} of {config.num_centroids} clusters of tokens"
    return {
        "family": "Gemma 4 assistant",
        "layers": len(config.kinds),
        "width": text["hidden_size"],
        "width of its model": config.backbone_hidden_size,
        "reads": "keys and values of its model's last layers with " + " and ".join(sorted(set(config.kinds))),
        "looks back from": POSITIONS[config.position],
        "scores": scored if config.use_ordered_embeddings else "the whole vocabulary",
        "stored": f"{bits}-bit" if bits else "not quantised",
    }


def card_lines(folder: Path, header: Header) -> CardLines:
    """The method's lines of the model card."""
    config, source = config_of(folder, header), header.source
    with damage(folder):
        files, notes = ", ".join(source.get("files", [])), source.get("notes", [])
    return CardLines(
        title=f"Gemma 4 assistant for {header.base_name}",
        about=(
            f"{len(config.kinds)} layers that draft tokens from the keys and values of {header.base_name}, taken "
            f"over by mtp-mlx from {files or 'its checkpoint'}.\n"
            "The base model's own output is unchanged: drafts are verified."
        ),
        method="Gemma 4 assistant (multi-token prediction by Google)",
        facts=tuple(f"{name}: {value}" for name, value in shown(config).items()),
        sections={"Source": "", "Notes": "\n".join(f"- {note}" for note in notes)},
    )
