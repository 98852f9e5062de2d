"""Train an adapter for a folder of your own notes and measure its speed-up, in one command.

    python examples/finetune_notes.py NOTES --out notes-adapter
    python examples/finetune_notes.py NOTES --model ./model --steps 500 --out notes-adapter

NOTES is a folder with .md and .txt files, including subfolders. There are four stages; after a stop, the same command
resumes:

1. The notes are split into passages at paragraphs, and each passage becomes prompts: "continue", "summarise",
"explain". 2. The model answers the prompts (an adapter learns best from what its model writes). 3. A gated-LoRA
adapter is trained on these answers, without those to the held-out prompts. 4. The held-out prompts are answered by
plain decoding and with the adapter, to compare texts and tokens per second.

Nothing leaves this machine, and the notes are not stored in the adapter: it contains only weights and counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from mtp_mlx.cli import main as mtp_mlx
from mtp_mlx.errors import MTPError

PASSAGE = 1200  # characters
TASKS = (
    "Continue this note:\n\n{passage}",
    "Summarise this note in a few sentences:\n\n{passage}",
    "Explain this note to somebody who is new to it:\n\n{passage}",
)
HELD_OUT = 8  # prompts that are never trained on


@dataclass(frozen=True)
class Result:
    """The results."""

    prompts: int
    acceptance: list[float]
    ratio: float | None
    tokens_per_step: float
    same: int
    compared: int


def passages(folder: Path) -> list[str]:
    """Passages of about `PASSAGE` characters from every note, split between paragraphs.

    Raises:
        MTPError: if there is no such folder, or no text in it.
    """
    if not folder.is_dir():
        raise MTPError(f"{folder} is not a folder: name the folder with your notes")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".md", ".txt") or not path.is_file():
            continue
        piece = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            if piece and len(piece) + len(paragraph) > PASSAGE:
                found.append(piece.strip())
                piece = ""
            piece += paragraph[:PASSAGE] + "\n\n"
        found.append(piece.strip())
    found = [piece for piece in found if len(piece) > 40]
    if not found:
        raise MTPError(f"{folder} has no .md or .txt file with more than a line of text")
    return found


def write_prompts(pieces: list[str], work: Path) -> int:
    """Write prompts.jsonl for training and held_out.jsonl for measuring; returns the number of prompts.

    Raises:
        MTPError: if there are too few passages.
    """
    rows = [{"prompt": task.format(passage=piece), "category": "notes"} for piece in pieces for task in TASKS]
    held_out = rows[:: max(2, len(rows) // HELD_OUT)][:HELD_OUT]
    trained = [row for row in rows if row not in held_out]
    if len(trained) < 2:
        raise MTPError(f"{len(pieces)} passages are too few to train on: give a folder with more notes")
    for name, some in (("prompts", trained), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(rows)


def run(*words: str) -> dict:
    """Run an mtp-mlx command and return the JSON object it prints.

    Raises:
        MTPError: if it fails, with its message.
    """
    print("$ mtp-mlx", *words, file=sys.stderr, flush=True)
    result = CliRunner().invoke(mtp_mlx, [*words, "--json"])
    if result.exit_code == 130:
        raise KeyboardInterrupt
    if result.exit_code:
        said = (result.stderr or str(result.exception)).strip()
        raise MTPError(f"mtp-mlx {words[0]}: {said.rpartition('Error: ')[2]}")  # behind a progress bar
    return json.loads(result.stdout)


def finetune(notes: Path, model: str, out: Path, steps: int, max_tokens: int, extra: list[str]) -> Result:
    """Run all four stages; files are written beside `out`.

    Args:
        extra: further options of `mtp-mlx train`.

    Raises:
        MTPError: if a stage fails.
    """
    work = out.with_name(out.name + "-files")
    work.mkdir(parents=True, exist_ok=True)
    count = write_prompts(passages(notes), work)
    answers = work / "answers.jsonl"
    asked = ["--prompts", str(work / "prompts.jsonl"), "--out", str(answers), "--max-tokens", str(max_tokens)]
    run("distill", "--model", model, *asked)
    training = ["--data", str(answers), "--out", str(out), "--steps", str(steps), *extra]
    trained = run("train", "--model", model, *training)
    measured = [
        "--prompts",
        str(work / "held_out.jsonl"),
        "--max-tokens",
        str(max_tokens),
        "--layout",
        "auto",
    ]
    report = run("bench", "--model", model, "--adapter", str(out), *measured)
    return read_report(count, trained, report)


def read_report(count: int, trained: dict, report: dict) -> Result:
    """The results, from the output of `train` and `bench`."""
    row = report["rows"][-1]  # the row of all prompts
    return Result(
        prompts=count,
        acceptance=trained["acceptance"] or [],
        ratio=row["speedup"],
        tokens_per_step=row["tokens_per_step"],
        same=row["identical"] + row["certified"],
        compared=row["prompts"],
    )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notes", type=Path, help="folder with .md and .txt files")
    parser.add_argument("--model", default="smollm2-135m", help="embedded model, mlx-lm folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("notes-adapter"), help="adapter folder to write")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--max-tokens", type=int, default=192, help="maximum number of tokens per answer")
    arguments, extra = parser.parse_known_args()
    try:
        result = finetune(
            arguments.notes, arguments.model, arguments.out, arguments.steps, arguments.max_tokens, extra
        )
    except MTPError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    depths = " ".join(f"{value:.2f}" for value in result.acceptance)
    print(f"{result.prompts} prompts; acceptance by depth on held-out answers: {depths}")
    speed = (
        "speed not measured"
        if result.ratio is None
        else f"{result.ratio:.2f} times the speed of plain mlx-lm"
    )
    print(
        f"{result.tokens_per_step:.2f} tokens per pass, {speed}; {result.same} of {result.compared} texts the same"
    )
    print(f'mtp-mlx generate --model {arguments.model} --adapter {arguments.out} --prompt "..."')


if __name__ == "__main__":
    main()
