"""Proves which tokens end generation, through mlx-lm, and that contradictory vocabularies are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.vocabulary import special_id, stop_ids
from mtp_mlx.errors import ConversionError
from tests.cli.convert_runs import run
from tests.convert.gguf.gguf_files import BYTES, MERGES, SPECIAL, TOKENS, write_model

NO_ROLES = dict.fromkeys(("eos_token_id", "eot_token_id"))
N = len(TOKENS)
END = TOKENS.index("<|im_end|>")


def ggml(**values: Any) -> dict[str, Any]:
    """Metadata of the tokenizer."""
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def with_tokens(
    *tokens: str, kind: int = 3, merges: list[str] | None = None, **values: Any
) -> dict[str, Any]:
    """The tiny vocabulary with these tokens of type `kind` after it."""
    types = [3] * len(SPECIAL) + [1] * (N - len(SPECIAL)) + [kind] * len(tokens)
    return ggml(
        tokens=TOKENS + list(tokens),
        token_type=types,
        merges=MERGES + (merges or []),
        **{**NO_ROLES, **values},
    )


def stops(tmp_path: Path, metadata: dict[str, Any]) -> list[int]:
    """Ids that end generation for the converted model, in the file's order."""
    folder = convert_gguf(
        write_model(tmp_path / "m.gguf", metadata=metadata).path, tmp_path / "out", force=True
    )
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    found = found if isinstance(found, list) else [found]
    assert mlx_lm.load(str(folder))[1].eos_token_ids == set(found)
    return found


def test_a_control_token_ends_generation_by_its_name(tmp_path: Path) -> None:
    """<|endoftext|> beside an eos of <|im_end|>: without it the text runs on into the next document."""
    assert stops(tmp_path, ggml(eos_token_id=END, eot_token_id=None)) == [END, TOKENS.index("<|endoftext|>")]


def test_the_end_of_sequence_comes_first_then_roles_then_names(tmp_path: Path) -> None:
    metadata = with_tokens("<|eom_id|>", "a1", "a2", "<|eot_id|>", eos_token_id=N + 1, eom_token_id=N + 2)
    ids = [N + 1, N + 2, TOKENS.index("<|endoftext|>"), END, N, N + 3]
    assert stops(tmp_path, metadata) == ids
    folder = tmp_path / "out"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "a1"
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == N + 1


def test_without_a_role_a_name_is_the_end_of_sequence(tmp_path: Path) -> None:
    assert set(stops(tmp_path, ggml(**NO_ROLES))) == {0, END}
    assert mlx_lm.load(str(tmp_path / "out"))[1].eos_token == TOKENS[0]


def test_ollamas_list_is_read(tmp_path: Path) -> None:
    assert stops(tmp_path, ggml(eos_token_id=END, eos_token_ids=[END, 7, 9], eot_token_id=0)) == [
        END,
        7,
        9,
        0,
    ]


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (
            ("<|return|>", "<|call|>", "<|end|>"),
            (0, 1),
        ),  # of harmony's three, <|end|> ends a part of an answer
        (("<|calls|>", "<|flush|>", "<|end|>"), (0, 1)),
        (("<|return|>", "<|end|>"), (0, 1)),
        (("</s>", "<|tool_response>"), (1,)),
        (("</s>", "<s>"), (0,)),
        (("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"), (0, 1, 2)),
        (("<end_of_turn>", "<eos>", "[EOS]", "<|end_of_text|>", "<PAD>"), (0, 1, 2, 3, 4)),
        (("<|IM_END|>", "im_end", "<|user|>"), ()),
    ],
)
def test_names(tmp_path: Path, tokens: tuple[str, ...], ends: tuple[int, ...]) -> None:
    metadata = with_tokens(*tokens, eos_token_id=END)
    gguf = read_gguf(write_model(tmp_path / "m.gguf", metadata=metadata).path)
    assert set(stop_ids(gguf)) == {END, 0, *(N + i for i in ends)}


def test_an_end_of_another_type_is_still_one_token(tmp_path: Path) -> None:
    """Files that call <|eot_id|> a normal or a user-defined token: prompts hold it whole, and it ends the text."""
    for kind in (1, 4):
        assert N in stops(tmp_path, with_tokens("<|eot_id|>", kind=kind, eos_token_id=END))
        tokenizer = mlx_lm.load(str(tmp_path / "out"))[1]
        assert tokenizer.encode("hello<|eot_id|>") == [TOKENS.index("hello"), N]
        assert tokenizer.decode([N], skip_special_tokens=True) == ""


def test_text_that_looks_like_an_end_is_text(tmp_path: Path) -> None:
    """</s> strikes words out in HTML: as a normal token that merges make, it ends nothing."""
    merges = ["< /", "</ s", "</s >"]
    metadata = with_tokens("</", "</s", "</s>", kind=1, merges=merges, eos_token_id=END)
    assert N + 2 not in stops(tmp_path, metadata)
    tokenizer = mlx_lm.load(str(tmp_path / "out"))[1]
    assert tokenizer.decode(tokenizer.encode("hello</s>"), skip_special_tokens=True) == "hello</s>"
    assert N + 2 in stops(tmp_path, with_tokens("</", "</s", "</s>", merges=merges, eos_token_id=END))


def test_the_plan_names_what_ends_generation(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf").path
    assert "generation ends at: <|im_end|>, <|endoftext|>\n" in run("convert", path, "--dry-run").stdout


def test_no_token_has_two_spellings(tmp_path: Path) -> None:
    """-1, also as an unsigned number, says that there is no such token."""
    metadata = ggml(bos_token_id=2**32 - 1, unknown_token_id=2**32 - 1)
    path = write_model(tmp_path / "m.gguf", metadata=metadata).path
    assert special_id(read_gguf(path), "bos") is None
    config = json.loads((convert_gguf(path, tmp_path / "out") / "tokenizer_config.json").read_text())
    assert "bos_token" not in config and "unk_token" not in config


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
SENTENCEPIECE_TYPES = [2, 3, 3, *[6] * 256, 1, 1, 1, 1]


def sentencepiece(**values: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary that names no special token."""
    roles = (
        "pre",
        "merges",
        "add_bos_token",
        *(f"{role}_token_id" for role in ("bos", "eos", "eot", "unknown")),
    )
    scores = [-float(i) for i in range(len(SENTENCEPIECE))]
    fields = {"model": "llama", "tokens": SENTENCEPIECE, "scores": scores, "token_type": SENTENCEPIECE_TYPES}
    return ggml(**{**fields, **dict.fromkeys(roles), **values})


def test_sentencepiece_vocabularies_begin_and_end_as_llama_cpp_does(tmp_path: Path) -> None:
    """Without ids in the file they are 1 and 2, but only where these are control tokens."""
    assert stops(tmp_path, sentencepiece()) == [2]
    assert mlx_lm.load(str(tmp_path / "out"))[1].encode("a")[0] == 1
    types = [2, 1, 3, *SENTENCEPIECE_TYPES[3:]]
    stops(tmp_path, sentencepiece(token_type=types))
    assert mlx_lm.load(str(tmp_path / "out"))[1].encode("a")[0] != 1


ROLES = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pad", "middle")
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    *(
        (
            ggml(**{f"{role}_token_id": N}),
            rf"tokenizer\.ggml\.{role}_token_id is {N}, and the ids of its tokens go from 0 to {N - 1}",
        )
        for role in ROLES
    ),
    (ggml(eos_token_ids=[0, 10**6]), r"eos_token_ids is 1000000, and the ids"),
    (ggml(bos_token_id=None, add_bos_token=True), r"\(add_bos_token\), but none is named"),
    (ggml(token_type=[1] * (N - 1)), f"{N} tokens, but {N - 1} token types"),
    (ggml(token_type=[1] * (N + 1)), f"{N} tokens, but {N + 1} token types"),
    (ggml(token_type=[9] + [1] * (N - 1)), "token 0 is of type 9, and there are only types 0 to 6"),
    (ggml(scores=[0.5] * (N + 2)), f"{N} tokens, but {N + 2} scores"),
    (sentencepiece(scores=[0.5]), f"{len(SENTENCEPIECE)} tokens, but 1 scores"),
    (ggml(tokens=[*TOKENS[:-1], TOKENS[5]]), f"the tokens 5 and {N - 1} are both"),
    (sentencepiece(tokens=[*SENTENCEPIECE[:-1], "a"]), "the tokens 260 and 262 are both 'a'"),
    (ggml(merges=["x"]), "the merge 'x' is no pair of tokens"),
    (ggml(merges=["no such"]), "the merge 'no such' needs the token 'no', which is not there"),
    (ggml(merges=[f"{BYTES[0]} {BYTES[1]}"]), "the merge .* needs the token '!\"', which is not there"),
    (ggml(tokens=[]), "'tokenizer.ggml.tokens' is missing|is no list of tokens"),
    ({"llama.vocab_size": N + 5}, rf"llama\.vocab_size is {N + 5}, with {N} tokens and {N} rows"),
]


@pytest.mark.parametrize(("metadata", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:60])
def test_contradictions_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    written = write_model(tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(ConversionError, match=message):
        convert_gguf(written.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_vocabulary_of_any_stated_size_that_fits_is_converted(tmp_path: Path) -> None:
    for i, size in enumerate((N, None)):
        convert_gguf(
            write_model(tmp_path / "m.gguf", metadata={"llama.vocab_size": size}).path, tmp_path / f"out{i}"
        )
        assert json.loads((tmp_path / f"out{i}" / "config.json").read_text())["vocab_size"] == N


def test_tokens_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """Replaced by a question mark they would be read and written as other tokens; a garbled name does no harm."""
    path = write_model(tmp_path / "m.gguf", metadata={"general.name": "hell\u00f6 world"}).path
    raw = path.read_bytes()
    path.write_bytes(raw.replace("hell\u00f6 world".encode(), b"hell\xff\xff world"))
    read_gguf(path)
    path.write_bytes(raw.replace("Ã©".encode(), b"\xc3\xff\xc2\xa9"))
    with pytest.raises(ConversionError, match=r"key 'tokenizer\.ggml\.tokens' holds text that is not UTF-8"):
        read_gguf(path)
