"""GGUF metadata -> `tokenizer.json` and `tokenizer_config.json`.

Two kinds of vocabulary: `gpt2` (byte-level BPE; how text is cut before BPE depends on `tokenizer.ggml.pre`)
and `llama` (SentencePiece BPE with byte fallback; merges follow from the scores). Others are refused.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mtp_mlx.convert.gguf.file import GGUFFile
from mtp_mlx.convert.gguf.vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    check_vocabulary,
    special_id,
    stop_ids,
    tokens_of,
    types_of,
)
from mtp_mlx.errors import ConversionError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGIT = r"\p{N}"
# llama.cpp's rule for files that do not say how their text is cut.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> the patterns applied one after the other.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
}
_WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a word that is a token is not merged
_NFC = ("qwen2", "deepseek-r1-qwen", "megrez")
_BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3")


def build_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """The tokenizer described by the metadata.

    Raises ConversionError: a kind that is not supported, or a vocabulary that contradicts itself.
    """
    kind = gguf.require("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConversionError(
            f"{gguf.path}: a {kind!r} vocabulary is not supported, only 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE) are. Use the model's safetensors checkpoint instead."
        )
    check_vocabulary(gguf)
    tokens, types = tokens_of(gguf), types_of(gguf)
    tokenizer = _byte_level(gguf, tokens) if kind == "gpt2" else _sentencepiece(gguf, tokens, types)
    # Some files call "<|im_end|>" a normal token; cut into letters in a prompt it would mean nothing to the model.
    ends = set(stop_ids(gguf))
    special = [i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN) or i in ends]
    plain = [i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in ends]
    tokenizer.add_special_tokens([_added(tokens[i], special=True) for i in special])
    tokenizer.add_tokens([_added(tokens[i], special=False) for i in plain])
    _prepend_bos(gguf, tokenizer, tokens)
    return tokenizer


def tokenizer_config(gguf: GGUFFile) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by role, and the chat template where the file has one."""
    tokens = tokens_of(gguf)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos(gguf),
        "model_max_length": gguf.metadata.get(
            f"{gguf.require('general.architecture')}.context_length", 2**20
        ),
    }
    ids = {"bos": special_id(gguf, "bos"), "eos": next(iter(stop_ids(gguf)), None)}
    ids |= {"unk": special_id(gguf, "unknown"), "pad": special_id(gguf, "padding")}
    for role, token_id in ids.items():
        if token_id is not None:
            config[f"{role}_token"] = tokens[token_id]
    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def adds_bos(gguf: GGUFFile) -> bool:
    """Whether encoding begins with the beginning-of-sequence token."""
    metadata = gguf.metadata
    by_default = metadata.get("tokenizer.ggml.model") == "llama"
    by_default = by_default or metadata.get("tokenizer.ggml.pre") in _BOS_BY_DEFAULT
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _prepend_bos(gguf: GGUFFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    bos_id = special_id(gguf, "bos")
    if not adds_bos(gguf) or bos_id is None:
        return
    bos = (
        tokens[bos_id].replace("\\", "\\\\").replace(":", "\\:") if ":" in tokens[bos_id] else tokens[bos_id]
    )
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(tokens[bos_id], bos_id)]
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    is_byte_level = gguf.metadata["tokenizer.ggml.model"] == "gpt2"
    tokenizer.post_processor = processors.Sequence([byte_level, template]) if is_byte_level else template


def _byte_level(gguf: GGUFFile, tokens: list[str]) -> Tokenizer:
    pre = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ConversionError(
            f"{gguf.path}: the pre-tokenizer {pre!r} is not known, so text would be cut wrongly. Known are "
            f"{', '.join(sorted(PRE_TOKENIZERS))}. Use the model's safetensors checkpoint instead."
        )
    merges = [tuple(pair.split(" ", 1)) for pair in gguf.require("tokenizer.ggml.merges")]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=pre in _WHOLE_TOKENS_FIRST,
    )
    tokenizer = Tokenizer(model)
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = gguf.require("tokenizer.ggml.scores")
    unk_id = special_id(gguf, "unknown") or 0
    model = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges_from_scores(tokens, scores, types),
        unk_token=tokens[unk_id],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    space, prefix = normalizers.Replace(" ", "▁"), gguf.metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_from_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores highest: BPE merges in that order.

    Every way to cut a normal token into two tokens is a merge; ties are broken by the ids of the halves.
    """
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], i, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]
