"""Proves that a converted tokenizer cuts text as the file says, loads through mlx-lm, and loses no text.

Ids are compared with ones worked out by hand for digits, spaces, unicode and special tokens, and with
SentencePiece itself.
"""

from __future__ import annotations

import io
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer

from mtp_mlx.convert.gguf.model import convert_gguf
from mtp_mlx.convert.gguf.parts import read_gguf
from mtp_mlx.convert.gguf.tokenizer import PRE_TOKENIZERS, build_tokenizer
from tests.convert.gguf.gguf_files import TOKENS, add_metadata, default_metadata, finish, write_model

ID = {token: i for i, token in enumerate(TOKENS)}


def tokenizer_for(folder: Path, pre: str) -> Tokenizer:
    """The tokenizer of a file with the tiny vocabulary and this pre-tokenizer."""
    path = folder / f"{pre}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, default_metadata("llama") | {"tokenizer.ggml.pre": pre})
    finish(writer)
    return build_tokenizer(read_gguf(path))


DIGITS = {
    "smollm": ["1", "2", "3", "4"],  # every digit alone
    "qwen2": ["1", "2", "3", "4"],
    "llama-bpe": ["123", "4"],  # three at most
    "default": ["123", "4"],
    "gpt-2": ["1234"],
}


@pytest.mark.parametrize("pre", DIGITS)
def test_digits_are_cut_as_the_pre_tokenizer_says(tmp_path: Path, pre: str) -> None:
    ids = tokenizer_for(tmp_path, pre).encode("1234", add_special_tokens=False).ids
    assert ids == [ID[token] for token in DIGITS[pre]]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "default"])
def test_spaces_unicode_and_special_tokens(tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_for(tmp_path, pre)
    ids = tokenizer.encode("hello  the\né<|im_end|>hello", add_special_tokens=False).ids
    # Of two spaces the first stands alone and the second joins the word: a pre-tokenizer's business.
    expected = ["hello", "Ġ", "Ġthe", "Ċ", "Ã©", "<|im_end|>", "hello"]
    assert ids == [ID[token] for token in expected]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30))
def test_no_text_is_lost(tmp_path_factory: pytest.TempPathFactory, pre: str, text: str) -> None:
    if pre not in _CACHE:
        _CACHE[pre] = tokenizer_for(tmp_path_factory.mktemp("t"), pre)
    tokenizer = _CACHE[pre]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    expected = unicodedata.normalize("NFC", text) if tokenizer.normalizer else text
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


_CACHE: dict[str, Tokenizer] = {}


def test_mlx_lm_loads_it_with_chat_template_and_stops(tmp_path: Path) -> None:
    """transformers may rebuild a tokenizer it knows by model type; ours must come through unchanged."""
    written = write_model(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(convert_gguf(written.path, tmp_path / "out"))
    assert tokenizer.encode("1234 hello") == [ID[t] for t in ["1", "2", "3", "4", "Ġ", "hello"]]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the é"}], tokenize=False)
    assert chat == "<|im_start|>the é<|im_end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids[0] == ID["<|im_start|>"] and ids[-1] == ID["<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_the_first_token_follows_add_bos(tmp_path: Path, pre: str) -> None:
    for add_bos in (True, False):
        metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos}
        written = write_model(tmp_path / "m.gguf", metadata=metadata)
        tokenizer = load_tokenizer(convert_gguf(written.path, tmp_path / "out", force=True))
        assert tokenizer.encode("hello") == [ID["<|im_start|>"]] * add_bos + [ID["hello"]]


@pytest.fixture(scope="module")
def sentencepiece_pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    """A SentencePiece BPE model with byte fallback, and our tokenizer from a GGUF file holding it."""
    words = "the cat sat on the mat; a dog ran to them, then they sang in the theatre 12 123 1234".split()
    text = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = processor.get_piece_size()
    path = tmp_path_factory.mktemp("spm") / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([processor.get_score(i) for i in range(n)])
    writer.add_token_types([token_type(processor, i) for i in range(n)])
    writer.add_bos_token_id(processor.bos_id())
    writer.add_unk_token_id(processor.unk_id())
    finish(writer)
    return processor, build_tokenizer(read_gguf(path))


def token_type(processor: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """llama.cpp's token type of a piece: unknown, control, byte or normal."""
    if processor.is_unknown(i):
        return 2
    if processor.is_control(i):
        return 3
    return 6 if processor.is_byte(i) else 1


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="thecatsdogrnmi  12,é日", min_size=1, max_size=30))
def test_sentencepiece_ids_are_sentencepieces(
    sentencepiece_pair: tuple[sentencepiece.SentencePieceProcessor, Tokenizer], text: str
) -> None:
    processor, tokenizer = sentencepiece_pair
    ids = tokenizer.encode(text).ids
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert tokenizer.decode(ids) == text


def test_mlx_lm_loads_a_sentencepiece_vocabulary(
    sentencepiece_pair: tuple[sentencepiece.SentencePieceProcessor, Tokenizer], tmp_path: Path
) -> None:
    processor, _ = sentencepiece_pair
    n = processor.get_piece_size()
    metadata = {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in range(n)],
        "scores": [float(processor.get_score(i)) for i in range(n)],
        "token_type": [token_type(processor, i) for i in range(n)],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        **dict.fromkeys(("pre", "merges", "eot_token_id", "add_bos_token")),
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    written = write_model(tmp_path / "m.gguf", metadata=metadata)
    tokenizer = load_tokenizer(convert_gguf(written.path, tmp_path / "out"))
    for text in ("the cat sat", " the  cat é日", "1234", "a\nb"):
        ids = processor.encode(text)
        assert tokenizer.encode(text) == [processor.bos_id(), *ids]
        assert tokenizer.decode(ids) == text
