"""The memory's drafts are the likeliest followers by its formula, and the running text weighs more than any file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_mlx.drafters.memory.draft import DOUBT, FADING, LEAST_CHANCE, NEGLIGIBLE, NEWEST, MemoryDrafter
from mtp_mlx.drafters.memory.memory_file import MemoryFile
from mtp_mlx.drafters.memory.ngrams import LONGEST, OTHERS
from mtp_mlx.drafters.memory.running_text import MOST_SEEN
from tests.drafters.memory.tables import memory_of

SMALL = st.lists(st.integers(0, 3), max_size=25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("memories")


def drafter_of(
    file: MemoryFile | None, text: list[int], vocabulary: int = 100, running: bool = True
) -> MemoryDrafter:
    drafter = MemoryDrafter(file, vocabulary, running_text=running)
    drafter.extend(text)
    return drafter


def naive(known: list[int], text: list[int], running: bool) -> dict[int, float]:
    """{token: chance} by a search of both texts."""
    levels: list[dict[int, float]] = []
    for size in range(1, min(LONGEST, len(text)) + 1):
        end, counts = text[-size:], dict[int, float]()
        for place in range(size, len(known)):
            if known[place - size : place] == end:
                counts[known[place]] = counts.get(known[place], 0) + 1
        seen = [place for place in range(size, len(text)) if text[place - size : place] == end]
        for rank, place in enumerate(reversed(seen[-MOST_SEEN:] if running else [])):
            counts[text[place]] = counts.get(text[place], 0) + NEWEST * FADING**rank
        if not counts:
            break
        levels.append(counts)
    chances, left = dict[int, float](), 1.0
    for counts in reversed(levels):
        share = sum(counts.values()) / (sum(counts.values()) + DOUBT * len(counts))
        for token, count in counts.items():
            chances[token] = chances.get(token, 0) + left * share * count / sum(counts.values())
        left *= 1 - share
        if left < NEGLIGIBLE:
            break
    return chances


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=SMALL, text=SMALL, cut=st.integers(0, 25), running=st.booleans())
def test_chances(folder: Path, known: list[int], text: list[int], cut: int, running: bool) -> None:
    path = folder / "chances.mem"
    path.unlink(missing_ok=True)
    drafter = drafter_of(memory_of(path, [(known, 0)]), text[:cut], running=running)
    drafter.tree(3)  # asking changes nothing
    drafter.extend(text[cut:])
    expected = naive(known, text, running)
    found = dict(drafter.candidates(text[-LONGEST:]))
    assert found == pytest.approx(expected) and sum(found.values()) <= 1 + 1e-9
    tree = drafter.tree(1)
    assert len(tree) == (max(expected.values(), default=0) >= LEAST_CHANCE)
    if tree.tokens:
        assert tree.chances[0] == pytest.approx(max(expected.values()))
        assert expected[tree.tokens[0]] == pytest.approx(max(expected.values()))


def test_a_loop_is_drafted_whole() -> None:
    drafter = drafter_of(None, [1, 2, 3, 1, 2, 3, 1])
    tree = drafter.tree(7)
    assert tree.tokens == (2, 3, 1, 2, 3, 1, 2) and tree.is_chain and min(tree.chances) > 0.8


def test_the_newest_text_weighs_most(tmp_path: Path) -> None:
    file = memory_of(tmp_path / "a.mem", [([1, 2, 3, 1, 2, 3, 1, 2, 3], 0)])
    assert drafter_of(file, [1, 2]).tree(1).tokens == (3,)
    assert drafter_of(file, [1, 2, 9, 1, 2]).tree(1).tokens == (9,)
    assert drafter_of(file, [1, 2, 9, 1, 2], running=False).tree(1).tokens == (3,)
    assert drafter_of(None, [1, 2, 9, 1, 2, 8, 1, 2]).tree(1).tokens == (8,)


def test_what_was_written_before_is_drafted(tmp_path: Path) -> None:
    """Chains end where the memory knows nothing more, and after `most` drafts."""
    file = memory_of(tmp_path / "a.mem", [([5, 6, 7, 8, 9, 10, 11], 0)] * 9)
    assert drafter_of(file, [6, 7]).tree(9).tokens == (8, 9, 10, 11)
    assert drafter_of(file, [6, 7]).tree(2).tokens == (8, 9)
    assert not drafter_of(file, [6, 99]).tree(9).tokens and not drafter_of(file, []).tree(9).tokens


def test_unlikely_chains_are_cut(tmp_path: Path) -> None:
    texts = [([1, 2, token, 3, other, 4], 0) for token in range(10, 14) for other in range(20, 24)]
    drafter = drafter_of(memory_of(tmp_path / "a.mem", texts * 50), [1, 2])
    tree, path = drafter.tree(100), 1.0
    for chance in tree.chances:
        path *= chance
    assert len(tree) == 4 and path >= LEAST_CHANCE


def test_ids_beyond_the_model_are_never_drafted(tmp_path: Path) -> None:
    """A file may say anything: the model has no row for them."""
    file = memory_of(tmp_path / "a.mem", [([1, 50], 0), ([1, 50], 0), ([1, OTHERS - 1], 0), ([1, 7], 0)])
    drafter = drafter_of(file, [1], vocabulary=50)
    assert [token for token, _ in drafter.candidates([1])] == [7] and drafter.tree(3).tokens == (7,)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=SMALL, text=SMALL, most=st.integers(0, 12))
def test_trees_hold_the_likeliest_paths(folder: Path, known: list[int], text: list[int], most: int) -> None:
    """Against all paths of as many tokens, tried one by one; a node's chance is that of the text before it."""
    path = folder / "trees.mem"
    path.unlink(missing_ok=True)
    file = memory_of(path, [(known, 0)])
    drafter = MemoryDrafter(file, 100, branching=True)
    drafter.extend(text)
    tree = drafter.tree(most)
    found = [
        (tuple(tree.tokens[node] for node in tree.path(place)), chance)
        for place, chance in enumerate(tree.path_chances)
    ]
    every, ends = dict[tuple[int, ...], float](), {(): 1.0}
    for _ in range(most):
        ends = {
            (*end, token): before * chance
            for end, before in ends.items()
            for token, chance in drafter.candidates([*text, *end][-LONGEST:])
            if before * chance >= LEAST_CHANCE
        }
        every |= ends
    likeliest = sorted(every.values(), reverse=True)[:most]
    assert [chance for _, chance in found] == pytest.approx(likeliest)
    assert all(every[nodes] == pytest.approx(chance) for nodes, chance in found)


def test_several_followers_are_drafted_at_once(tmp_path: Path) -> None:
    file = memory_of(tmp_path / "a.mem", [([5, 6, 7], 0)] * 3 + [([5, 8, 9], 0)] * 2)
    drafter = MemoryDrafter(file, 100, branching=True)
    drafter.extend([5])
    tree = drafter.tree(4)
    assert sorted(tree.tokens) == [6, 7, 8, 9] and not tree.is_chain
    assert [tree.tokens[node] for node in tree.likeliest_path()] == [6, 7]
