"""What a GGUF file says about its vocabulary: special tokens, tokens that end generation, contradictions."""

from __future__ import annotations

from mtp_mlx.convert.gguf.file import HOW_TO_MEND, GGUFFile
from mtp_mlx.errors import ConversionError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
_TYPES = range(BYTE + 1)  # 0 is "undefined"
_NO_TOKEN = (-1, 2**32 - 1)  # how writers say that there is no such token
# llama.cpp's ids for SentencePiece vocabularies that name none; they count where that token is a control token.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# tokenizer.ggml.{role}_token_id, spelled as llama.cpp spells them.
ROLES = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "cls", "mask"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle"),
)
_ENDING_ROLES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Tokens that end generation by their name, as in llama.cpp (llama-vocab.cpp, "special_eog_ids"), whatever their type:
# files often name one of them as end of sequence and leave the others to the name.
_ENDING_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
        *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
        *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
        # padding, repository and file of fill-in-the-middle models: past these lies another document
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
# A name that does not end generation where all of the others are there; of these three kinds of vocabulary it is part
# of an answer.
_EXCEPTIONS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)


def tokens_of(gguf: GGUFFile) -> list[str]:
    """All tokens in order of their ids; raises ConversionError where the file has none."""
    tokens = gguf.require("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ConversionError(f"{gguf.path}: tokenizer.ggml.tokens is no list of tokens. {HOW_TO_MEND}")
    return tokens


def types_of(gguf: GGUFFile) -> list[int]:
    """The type of each token; without any in the file all are normal."""
    return gguf.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens_of(gguf))


def special_id(gguf: GGUFFile, role: str) -> int | None:
    """The id of the token with a role of `ROLES`, or None if there is none."""
    token_id = gguf.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if token_id is not None:
        return None if token_id in _NO_TOKEN else token_id
    by_default = (
        _SENTENCEPIECE_IDS.get(role) if gguf.metadata.get("tokenizer.ggml.model") == "llama" else None
    )
    types = types_of(gguf)
    if by_default is None or by_default >= len(types) or types[by_default] not in (CONTROL, UNKNOWN):
        return None
    return by_default


def stop_ids(gguf: GGUFFile) -> list[int]:
    """Ids that end generation, the end-of-sequence token first: those with such a role, then those of such a name.

    A normal token of a byte-level vocabulary that merges can make is text, whatever it looks like, and ends nothing.
    """
    by_role = [token_id for role in _ENDING_ROLES if (token_id := special_id(gguf, role)) is not None]
    several = gguf.metadata.get("tokenizer.ggml.eos_token_ids", [])  # written by Ollama
    named = {token: i for i, token in enumerate(tokens_of(gguf)) if token in _ENDING_NAMES}
    for token, others in _EXCEPTIONS:
        if others <= named.keys():
            named.pop(token, None)
    text = _made_by_merges(gguf, {token for token, i in named.items() if types_of(gguf)[i] == NORMAL})
    by_name = [i for token, i in named.items() if token not in text]
    return list(dict.fromkeys([*by_role[:1], *several, *by_role[1:], *by_name]))


def _made_by_merges(gguf: GGUFFile, tokens: set[str]) -> set[str]:
    merges = gguf.metadata.get("tokenizer.ggml.merges", []) if tokens else []
    return tokens & {merge.replace(" ", "", 1) for merge in merges}


def check_vocabulary(gguf: GGUFFile) -> None:
    """Raises ConversionError where what the file says about its vocabulary does not fit together."""
    for check in (_check_lists, _check_special_ids, _check_merges):
        problem = check(gguf, tokens_of(gguf))
        if problem:
            raise ConversionError(f"{gguf.path}: the vocabulary contradicts itself: {problem}. {HOW_TO_MEND}")


def _check_lists(gguf: GGUFFile, tokens: list[str]) -> str | None:
    for key, what in (("token_type", "token types"), ("scores", "scores")):
        found = gguf.metadata.get(f"tokenizer.ggml.{key}")
        if found is not None and len(found) != len(tokens):
            return f"{len(tokens):,} tokens, but {len(found):,} {what}"
    wrong = next(((i, kind) for i, kind in enumerate(types_of(gguf)) if kind not in _TYPES), None)
    if wrong is not None:
        return f"token {wrong[0]} is of type {wrong[1]!r}, and there are only types 0 to {BYTE}"
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            return f"the tokens {first[token]} and {i} are both {token!r}"
    return None


def _check_special_ids(gguf: GGUFFile, tokens: list[str]) -> str | None:
    found = [(f"tokenizer.ggml.{role}_token_id", special_id(gguf, role)) for role in ROLES]
    several = gguf.metadata.get("tokenizer.ggml.eos_token_ids", [])
    found += [("tokenizer.ggml.eos_token_ids", token_id) for token_id in several]
    for key, token_id in found:
        if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(tokens)):
            return f"{key} is {token_id!r}, and the ids of its tokens go from 0 to {len(tokens) - 1}"
    if gguf.metadata.get("tokenizer.ggml.add_bos_token") and special_id(gguf, "bos") is None:
        return (
            "text begins with a beginning-of-sequence token (add_bos_token), but none is named (bos_token_id)"
        )
    return None


def _check_merges(gguf: GGUFFile, tokens: list[str]) -> str | None:
    if gguf.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    known = set(tokens)
    for merge in gguf.require("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space:
            return f"the merge {merge!r} is no pair of tokens"
        for token in (left, right, left + right):
            if token not in known:
                return f"the merge {merge!r} needs the token {token!r}, which is not there"
    return None
