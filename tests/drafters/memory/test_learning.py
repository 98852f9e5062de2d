"""A memory learns answers in chat and in the server if it is asked to, and never otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.api import load
from mtp_mlx.conversation import Conversation
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.drafters.memory import source as source_module
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.errors import MTPError
from mtp_mlx.serve.request import GenerationRequest
from mtp_mlx.serve.sequence import DecodeSettings
from tests.drafters.memory.tables import as_counter, memory_of, naive_counts
from tests.serve.test_engine import Client, running
from tests.tiny import VOCABULARY, never_end, save_tiny


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learning") / "model"
    save_tiny(folder, "llama", seed=3)
    never_end(folder)
    return folder


def opened(model_folder: Path, path: Path, learns: bool) -> tuple[Any, Any]:
    return load(str(model_folder), None, memory=str(path), memory_learn=learns or None)


def talk(loaded: tuple[Any, Any], messages: list[str]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of every turn, at temperature 1."""
    conversation, turns = Conversation(*loaded), []
    for seed, message in enumerate(messages):
        sampling = SamplingConfig(1.0, seed=seed)
        list(conversation.ask(message, 15, layout="linear", sampling=sampling))
        answer = conversation.turns[-1].tokens
        turns.append((conversation._cached[: conversation.turns[-1].prompt_tokens], answer))
    return turns


def test_a_conversation_is_learnt(model_folder: Path, tmp_path: Path) -> None:
    """The answers, with the end of each question as context; and the next conversation drafts from them."""
    path = tmp_path / "own.mem"
    loaded = opened(model_folder, path, learns=True)
    turns = talk(loaded, ["The sky", "And the sea?"])
    assert loaded[0].text_source.close() == 30
    texts = [([*prompt, *answer], len(prompt)) for prompt, answer in turns]
    assert as_counter(MemoryFile(path).table()) == naive_counts(texts)
    again = opened(model_folder, path, learns=False)
    conversation = Conversation(*again)
    sampling = SamplingConfig(1.0, seed=0)
    list(conversation.ask("The sky", 15, layout="linear", lookup=False, sampling=sampling))
    assert conversation.turns[0].tokens == turns[0][1] and conversation.turns[0].stats.steps < 5


def test_nothing_is_learnt_by_default(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.mem"
    memory_of(path, [([1, 2, 3], 0)], vocabulary=vocabulary_fingerprint(load(str(model_folder), None)[1]))
    before = path.read_bytes()
    loaded = opened(model_folder, path, learns=False)
    talk(loaded, ["The sky"])
    assert loaded[0].text_source.close() == 0 and path.read_bytes() == before


@pytest.mark.parametrize("concurrent", [1, 3])
def test_the_server_learns(model_folder: Path, tmp_path: Path, concurrent: int) -> None:
    """Answers that were decoded alone and in shared passes, each without what a stop string cut off."""
    path = tmp_path / "own.mem"
    loaded = opened(model_folder, path, learns=True)
    requests = [GenerationRequest([5 + n, 6, 7, 8], 9 + n) for n in range(3)]
    settings = DecodeSettings(layout="linear")
    with running(loaded, decode=settings, concurrent=concurrent) as engine:
        clients = [Client(engine, request) for request in requests]
        for client in clients:
            client.text()
    file = MemoryFile(path)
    assert file.header.tokens == 9 + 10 + 11
    plain = opened(model_folder, path, learns=False)
    with running(plain, decode=DecodeSettings(layout="plain")) as engine:
        texts = []
        for request in requests:
            engine_answer: list[int] = []
            client = Client(engine, GenerationRequest(request.prompt, request.max_tokens, top_logprobs=0))
            while True:
                piece: Any = client.next()
                engine_answer.append(piece.logprob.token)
                if piece.summary is not None:
                    break
            texts.append(([*request.prompt, *engine_answer], len(request.prompt)))
    assert as_counter(file.table()) == naive_counts(texts)


def test_portions_are_added_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "PORTION", 10)
    file = memory_of(tmp_path / "a.mem", [])
    memory = Memory(file, VOCABULARY, learns=True)
    texts = [([n, n + 30, n + 60, n + 90, n + 110, n + 130], 2) for n in range(3, 23)]
    for tokens, start in texts:
        memory.learn(tokens[:start], tokens[start:])
        if memory._thread.ident is not None:
            memory._thread.join()
    assert memory.learnt > 60  # before the end
    assert memory.open(running_text=False).tree(1).tokens == ()  # no text yet
    later = memory.open(running_text=False)
    later.extend([5, 35])
    assert later.tree(1).tokens == (65,)
    assert memory.close() == 80
    assert as_counter(MemoryFile(tmp_path / "a.mem").table()) == naive_counts(texts)


def test_what_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The answers go on, and the file that somebody else put there stays."""
    path = tmp_path / "a.mem"
    memory = Memory(memory_of(path, []), VOCABULARY, learns=True)
    memory_of(tmp_path / "b.mem", [([1, 2], 0)], vocabulary="another").path.rename(path)
    memory.learn([1, 2], [3, 4, 5])
    assert memory.close() == 0 and "3 tokens were not learnt" in caplog.text
    assert MemoryFile(path).header.vocabulary == "another"


def test_mistakes(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MTPError, match="`memory_learn` needs a file"):
        load(str(model_folder), None, memory_learn=True)
    with pytest.raises(MTPError, match="`memory_learn` needs a file"):
        load(str(model_folder), None, memory="off", memory_learn=True)
    with pytest.raises(MTPError, match="there is no memory that can be read"):
        load(str(model_folder), None, memory=str(tmp_path / "missing.mem"))
    memory_of(tmp_path / "a.mem", [([1, 2], 0)], vocabulary="another")
    for learns in (None, True):
        with pytest.raises(MTPError, match="another tokenizer"):
            load(str(model_folder), None, memory=str(tmp_path / "a.mem"), memory_learn=learns)
    assert load(str(model_folder), None, memory="off")[0].text_source is None
