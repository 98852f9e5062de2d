"""Proves that processes of `mlx.launch` agree over loopback, and that one lost or hanging ends the rest in words."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtp_mlx.cli import main
from mtp_mlx.distributed import TIMEOUT_VARIABLE, Peers, join, launched_rank, launched_size, whose
from mtp_mlx.errors import MTPError
from tests.launched import Launched

SCRIPT = "tests.peers_script"


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_give_every_process_the_same(tmp_path: Path, size: int) -> None:
    stdout, stderr = Launched(size, [SCRIPT, "exchange"], tmp_path).finish()
    answers = [json.loads(line) for line in stdout.splitlines()]
    assert sorted(one.pop("rank") for one in answers) == list(range(size)), stderr
    for one in answers:
        texts = [row["text"] for row in one["gathered"]]
        assert texts == ["ü" * (1 + 40 * rank) for rank in range(size)]
        assert all(row["nan"] != row["nan"] and row["n"] == rank for rank, row in enumerate(one["gathered"]))
        assert one["shared"]["ids"] == [7, 2**31 + 1] and one["shared"]["steps"] == 2**40
        assert one["shared"]["bf16"] == pytest.approx([0.1, -3.0], rel=1e-2)
        weights = [(rank + 1) / sum(range(1, size + 1)) for rank in range(size)]
        factor = sum(weight * (rank + 1) for rank, weight in enumerate(weights))
        assert one["mean"][0][0] == pytest.approx([factor, 2 * factor], rel=1e-6)
        assert one["mean"][1] == pytest.approx(5 + factor, rel=1e-6)
        differ, tensors = one["refusals"]
        assert differ == "model of process 2 is 'm1', of process 1 'm0': start all with the same model"
        assert "the processes hold different tensors" in tensors


def test_a_killed_process_ends_the_other_with_a_sentence(tmp_path: Path) -> None:
    launched = Launched(2, [SCRIPT, "killed"], tmp_path, **{TIMEOUT_VARIABLE: "60"})
    _, stderr = launched.finish(50)
    assert (
        "another process of this run was lost" in stderr
    )  # its own, or of mlx.launch's signal if that was first
    assert launched.code(0) == 2


def test_a_process_that_hangs_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    launched = Launched(2, [SCRIPT, "stopped"], tmp_path, **{TIMEOUT_VARIABLE: "2"})
    stopped, waiting = launched.pid(1), launched.pid(0)
    try:
        for _ in range(300):
            if not _runs(waiting):
                break
            time.sleep(0.1)
        else:
            pytest.fail("process 1 still waits")
    finally:
        with suppress(ProcessLookupError):  # mlx.launch waits for it, unless it has already ended it
            os.kill(stopped, signal.SIGKILL)
    _, stderr = launched.finish(30)
    assert "Error (process 1 of 2): another process of this run has not answered for 2 seconds" in stderr
    assert TIMEOUT_VARIABLE in stderr and "MTPError after" not in stderr


def _runs(pid: int) -> bool:
    """Whether a process of somebody else's still runs; one that has ended is waited for by its parent."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- what the environment says --------------------------------------------------------------------------------


def launched_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, rank: int) -> None:
    """The environment of `mlx.launch -n size --backend ring`."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in range(size)]) if size > 1 else "\n")
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", str(rank))


def test_one_process_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (launched_size(), launched_rank(), whose()) == (1, 0, "")
    launched_by(monkeypatch, tmp_path, 1, 0)
    assert launched_size() == 1 and join() == Peers()
    alone = Peers()
    assert alone.alone and alone.leads and alone.gather({"a": 1}) == [{"a": 1}]
    tree: dict = {"a": object()}
    assert alone.share(tree) is tree and alone.weighted_mean(tree, 1.0) is tree
    with pytest.raises(RuntimeError, match="not ours"), alone.waiting():
        raise RuntimeError("[ring] not ours")


@pytest.mark.parametrize("verb", ["info", "distill", "convert", "bench"])
def test_commands_that_share_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    launched_by(monkeypatch, tmp_path, 3, 1)
    result = CliRunner().invoke(main, [verb])
    assert result.exit_code == 2 and result.stdout == ""
    assert (
        f"Error (process 2 of 3): mtp-mlx {verb} is for one process, and mlx.launch started 3"
        in result.stderr
    )


def test_other_launchers_are_known_and_a_bad_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert whose() == " (process 4 of 4)"
    for value in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, value)
        with pytest.raises(MTPError, match="give a number of seconds above 0"):
            join()


def test_an_error_that_is_not_of_the_connection_stays_itself() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), Peers(size=2).waiting():
        raise RuntimeError("out of memory")
    with pytest.raises(MTPError, match="was lost"), Peers(size=2).waiting():
        raise RuntimeError("[ring] connection to a peer was lost")
