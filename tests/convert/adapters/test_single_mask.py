"""Proves that a tiny random checkpoint in the released ConfAdapt format converts, loads and decodes as numpy does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import mtp_mlx
from mtp_mlx.adapter_folder import read_header
from mtp_mlx.convert.adapters.single_mask import MASK_TOKEN, find_mask
from mtp_mlx.convert.whole import WholeSettings, report_lines
from mtp_mlx.decode.emission import Emission
from mtp_mlx.drafters.masks.folder import config_of
from mtp_mlx.errors import ConversionError
from mtp_mlx.model.block import Block
from tests.convert.conversions import whole_model
from tests.convert.heads import numpy_trunk
from tests.decode import naive_emit
from tests.tiny import VOCABULARY, hf_tokenizer, save_tiny

PROMPT = [5, 9, 30, 7, 11]
ROWS = 192  # the matrix is padded beyond the tokenizer, as the released ones are


def released(folder: Path, architecture: str, **config: Any) -> Path:
    """A tiny checkpoint as the authors release theirs: added tokens, padded matrix, and code nobody should run."""
    save_tiny(folder, architecture, seed=3, vocab_size=VOCABULARY)
    (folder / "tokenizer.json").unlink()
    save = {"hidden_size": 64, "intermediate_size": 96, **config}
    rebuilt = folder / "rebuilt"
    _save_padded(rebuilt, architecture, save)
    for name in ("config.json", "model.safetensors"):
        (rebuilt / name).replace(folder / name)
    rebuilt.rmdir()
    tokenizer = hf_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|mtp_special_token_{index}|>" for index in range(32)]}
    )
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoModelForCausalLM": "modeling_mtp.Model"}, "eos_token_id": [2, 0]}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "modeling_mtp.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def _save_padded(folder: Path, architecture: str, overrides: dict[str, Any]) -> None:
    from mlx.utils import tree_flatten

    from tests.tiny import tiny_config, tiny_model

    folder.mkdir()
    config = tiny_config(architecture, vocab_size=ROWS, **overrides)
    model = tiny_model(architecture, seed=3, vocab_size=ROWS, **overrides)
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


def numpy_of(source: Path) -> naive_emit.Logits:
    """Logits of numpy from the source's own tensors."""
    config = json.loads((source / "config.json").read_text())
    tensors = {name: np.array(v) for name, v in mx.load(str(source / "model.safetensors")).items()}
    mask = VOCABULARY

    def logits(text: list[int], masks: int) -> np.ndarray:
        return numpy_trunk.logits(tensors, config, text + [mask] * masks)[len(text) - 1 :]

    return logits


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("qwen3", True)])
def test_converts_loads_and_decodes_as_numpy(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = released(tmp_path / "source", architecture, tie_word_embeddings=tied)
    result = whole_model(source, tmp_path / "out")
    assert f"mask token: id {VOCABULARY}, in {tmp_path / 'out' / 'mtp'}" in report_lines(result)
    model, tokenizer = mtp_mlx.load(str(tmp_path / "out"))
    assert model.most_drafts == 15 and model.vocab_size == ROWS
    reference = numpy_of(source)
    ids = mx.array([[*PROMPT, ROWS, ROWS + 1, ROWS + 2]])  # slots, which are all the mask
    found = np.array(model.head(model.forward(Block(ids=ids, n_real=len(PROMPT)), model.make_cache()))[0])
    assert np.abs(found[len(PROMPT) - 1 :] - reference(PROMPT, 3)).max() < 1e-4
    for emit in (Emission("static"), Emission("conf-adapt", 0.2), Emission("conf-adapt", 1.0)):
        expected = naive_emit.emit(reference, PROMPT, 12, 4, emit.threshold)
        assert expected.margin > 1e-4
        tokenizer.eos_token_ids = set()
        lossy = list(mtp_mlx.stream_generate(model, tokenizer, PROMPT, 12, emission=emit, slots=3))
        assert [r.token for r in lossy] == expected.tokens
        assert {r.lossless for r in lossy} == {False}
    verified = mtp_mlx.stream_generate(model, tokenizer, PROMPT, 12, layout="quadratic", slots=3)
    assert [r.token for r in verified] == naive_emit.emit(reference, PROMPT, 12, 1, None).tokens


def test_the_sidecar_names_the_mask(tmp_path: Path) -> None:
    whole_model(released(tmp_path / "source", "qwen3"), tmp_path / "out")
    info = read_header(tmp_path / "out" / "mtp")
    assert info.mask["id"] == VOCABULARY and info.mask["token"] == MASK_TOKEN and info.mask["stops"] == [2, 0]
    shape = config_of(tmp_path / "out" / "mtp", info)
    assert info.mask["prompt"].startswith("raw") and shape.slots == 15 and shape.rank == 0
    card = (tmp_path / "out" / "mtp" / "README.md").read_text()
    assert MASK_TOKEN in card and "lossy" in card


def test_a_quantised_conversion_keeps_its_mask(tmp_path: Path) -> None:
    """The mask's embedding is that of the quantised matrix, which is what the model was left with."""
    source = released(tmp_path / "source", "llama")
    whole_model(source, tmp_path / "out", WholeSettings(quantize=8, group_size=32))
    model, tokenizer = mtp_mlx.load(str(tmp_path / "out"))
    plain = mlx_lm.load(str(tmp_path / "out"))[0]
    own = model.speculator.slot_embeddings.weight[0]  # type: ignore[union-attr]
    assert mx.allclose(own, plain.model.embed_tokens(mx.array([VOCABULARY]))[0], atol=1e-3)
    text = list(mtp_mlx.stream_generate(model, tokenizer, PROMPT, 6, emission=Emission("static"), slots=2))
    assert len(text) == 6 or text[-1].finish_reason == "stop"


def test_without_the_heads_there_is_no_sidecar(tmp_path: Path) -> None:
    source = released(tmp_path / "source", "llama")
    whole_model(source, tmp_path / "out", WholeSettings(heads=False))
    assert not (tmp_path / "out" / "mtp").exists()


def test_a_folder_without_the_token_has_no_mask(tmp_path: Path) -> None:
    assert find_mask(save_tiny(tmp_path / "plain")) is None


def test_tokenizer_files_that_disagree_are_refused(tmp_path: Path) -> None:
    source = released(tmp_path / "source", "llama")
    (source / "added_tokens.json").write_text(json.dumps({MASK_TOKEN: 9}))
    with pytest.raises(ConversionError, match=r"disagree about the id .* added_tokens.json says 9"):
        find_mask(source)
    (source / "added_tokens.json").write_text("[")
    with pytest.raises(ConversionError, match=r"added_tokens.json cannot be read"):
        find_mask(source)


def test_a_mask_without_a_row_is_refused(tmp_path: Path) -> None:
    source = released(tmp_path / "source", "llama")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["id"] += 100 * (token["content"] == MASK_TOKEN)
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match="has id 257, but the embedding matrix only 192 rows"):
        whole_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
