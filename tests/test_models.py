"""The adapters that ship go with the embedded model, are found by name, and leave the model's text as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mtp_mlx.adapter_folder import read_header
from mtp_mlx.api import chat_prompt, load, stream_generate
from mtp_mlx.drafters.heads.folder import config_of
from mtp_mlx.errors import MTPError
from mtp_mlx.files import cache_dir
from mtp_mlx.models import bundled_adapter, named_adapter

CACHED = list((cache_dir() / "models").glob("smollm2-135m-*")) and "MTP_MLX_CACHE" not in os.environ


def test_the_heads_have_a_name_and_the_adapter_s_base() -> None:
    folder, adapter = named_adapter("demo-heads"), bundled_adapter("smollm2-135m")
    header = read_header(folder)
    assert adapter is not None and header.base_fingerprint == read_header(adapter).base_fingerprint
    heads = config_of(folder, header)
    assert heads.count == heads.drafts == len(heads.blocks) == len(header.acceptance) == 2


def test_other_names_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named_adapter("heads") == Path("heads") and named_adapter(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-heads").mkdir()
    assert named_adapter("demo-heads") == Path("demo-heads"), "a folder of the user's goes first"
    with pytest.raises(MTPError, match="demo-heads"):
        read_header(named_adapter("demo-heads"))


@pytest.mark.skipif(not CACHED, reason="the demo model is not in the cache")
def test_the_text_with_demo_heads_is_the_model_s_own() -> None:
    texts, drafts = [], 0
    for adapter, layout in ((None, "plain"), ("demo-heads", "linear")):
        model, tokenizer = load("smollm2-135m", adapter)
        prompt = chat_prompt(tokenizer, "What is 12 + 30? Explain step by step.")
        found = list(stream_generate(model, tokenizer, prompt, 24, layout=layout))
        texts.append([response.token for response in found])
        drafts += sum(response.from_draft for response in found)
    assert texts[0] == texts[1] and len(texts[0]) == 24 and drafts > 2
