"""Draft trees: depths, chances of paths, parts of a tree, and trees that are none."""

from __future__ import annotations

import pytest

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.policy import Proposal, without_branches
from mtp_mlx.decode.tree import ROOT, DraftTree, depths_of

#        0: 5 (.5)          1: 6 (.4)
#   2: 7 (.5)  3: 8 (.25)   4: 7 (.9)
TREE = DraftTree((5, 6, 7, 8, 7), (ROOT, ROOT, 0, 0, 1), (0.5, 0.4, 0.5, 0.25, 0.9))


def test_depths_and_chances_follow_the_path() -> None:
    assert TREE.depths == (1, 1, 2, 2, 2)
    assert TREE.path_chances == pytest.approx([0.5, 0.4, 0.25, 0.125, 0.36])
    assert TREE.path(3) == [0, 3] and TREE.path(ROOT) == []
    assert TREE.choices == [1, 2, 1, 2, 1]
    assert DraftTree((5, 6, 7), (ROOT,) * 3, (0.2, 0.5, 0.2)).choices == [2, 1, 3]
    assert not TREE.is_chain and DraftTree.chain([1, 2], [0.5, 0.5]).is_chain


def test_a_part_has_new_parents() -> None:
    assert TREE.keep([1, 4]) == DraftTree.chain([6, 7], [0.4, 0.9])
    assert TREE.keep([0, 1, 3]) == DraftTree((5, 6, 8), (ROOT, ROOT, 0), (0.5, 0.4, 0.25))
    with pytest.raises(ValueError, match="lack a parent"):
        TREE.keep([2])


def test_the_likeliest_path_takes_the_best_child_each_time() -> None:
    assert TREE.likeliest_path() == [0, 2]
    proposal = Proposal("slots", TREE, ("slots", "lookup", "slots", "lookup", "lookup"))
    assert proposal.chained() == Proposal("slots", DraftTree.chain([5, 7], [0.5, 0.5]), ("slots", "slots"))
    chain, layout = without_branches(proposal, Layout.tree(TREE.parents, (1, 2, 3, 4, 5, 6), 4))
    assert chain == proposal.chained() and layout == Layout(2, (1, 2, 4))


@pytest.mark.parametrize(
    ("parents", "message"),
    [((0, ROOT), "parent of node 0 must come before it"), ((ROOT, 1), "node 1"), ((-2, 0), "not at -2")],
)
def test_a_parent_comes_first(parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depths_of(parents)
    with pytest.raises(ValueError, match=message):
        DraftTree((1, 2), parents, (0.5, 0.5))


def test_siblings_differ() -> None:
    with pytest.raises(ValueError, match="siblings must have different tokens"):
        DraftTree((5, 6, 5), (ROOT, ROOT, ROOT), (0.5, 0.3, 0.2))
    assert len(DraftTree((5, 5), (ROOT, 0), (0.5, 0.5))) == 2


def test_a_layout_knows_its_tree() -> None:
    layout = Layout.tree(TREE.parents, (0,) * 6, 4)
    assert (layout.depth, layout.drafts, layout.rows) == (2, 5, 6)
    assert [layout.continues(row) for row in range(6)] == [True, True, True, False, False, False]
    assert Layout(2, (0, 0, 1), parents=(ROOT, 0)) == Layout(2, (0, 0, 1)), "a chain has one name"
    chain = Layout(2, (0, 0, 1))
    assert [chain.continues(row) for row in range(3)] == [True, True, False] and chain.depth == 2
    for parents, width, message in (
        ((ROOT,), 1, "2 drafts have 2 parents"),
        ((ROOT, ROOT), 0, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout(2, (0, 0, 0), parents=parents, width=width)
