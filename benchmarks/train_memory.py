"""Print what training takes, memory and time, computed from sizes: the tables of docs/training.md.

    python benchmarks/train_memory.py                      models of 0.5B, 4B and 8B at 4 bits
    python benchmarks/train_memory.py --model ./model      a model of your own; only its config.json is read
    python benchmarks/train_memory.py --tflops 3           a computer that trains at 3 TFLOP/s

Nothing is trained and no weights are read. Memory is the trainer's own estimate (`mtp-mlx train` prints the same
before its first step). Time is arithmetic: the FLOP of 1,000 steps over the speed of a Mac, which is taken from what
others published; none of it was measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from model_shapes import config_of, weightless

from mtp_mlx.cli.train_options import settings_from
from mtp_mlx.drafters.heads.draft_heads import DraftHeads, heads_of
from mtp_mlx.drafters.registry import method_class
from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import candidate_anchors
from mtp_mlx.drafters.slots.method import block_choice
from mtp_mlx.model.gated_lora import linear_sizes
from mtp_mlx.model.seams import embedding_shape, find_seams
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import MemoryBudget, gigabytes, parameter_bytes, parsed_size
from mtp_mlx.train.method import Method
from mtp_mlx.train.plan import MOST_ROWS_GPU, StepPlan

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STEPS = 1000
PROMPT, ANSWER = 100, 300  # tokens of every row
ANSWERS = 2000  # for `distill`
# A step of `distill` answers eight prompts, at up to this many times the cost of one (mtp_mlx/measure/curves.json).
AT_ONCE, COST_AT_ONCE = 8, 2.7
# Part of the speed of reading a prompt that training reaches: mlx-lm's LORA.md trains at 250 tokens/s on an M1 Max,
# about 4 TFLOP/s, which reads prompts at 7 (https://github.com/brand-o/normiebench/issues/40).
TRAINING_SHARE = 0.5


@dataclass(frozen=True)
class Mac:
    """A Mac's speed with 4-bit models, as published.

    Attributes:
        name: of the chip.
        tflops: TFLOP/s while it reads a prompt: tokens/s times two FLOP per weight of a decoder layer.
        gbps: GB/s of weights while it writes: tokens/s times bytes of all weights.
    """

    name: str
    tflops: float
    gbps: float


MACS = (
    Mac("M4", 3.1, 94),  # Llama-3.1-8B, 225 and 21 tokens/s: https://github.com/brand-o/normiebench/issues/3
    Mac("M3 Pro", 4.5, 101),  # Qwen3-4B, 615 and 45: https://github.com/ml-explore/mlx-lm/pull/1569
    Mac("M4 Max", 11.8, 304),  # Qwen3-4B, 1,622 and 135: BENCHMARKS.md of mlx-lm
)

# The command, its method, its YAML file, and its options.
CASES: tuple[tuple[str, str, Path | None, dict[str, Any]], ...] = (
    ("train mask-tokens", "mask-tokens", None, {}),
    ("train mtp-heads", "mtp-heads", None, {}),
    ("train mtp-heads --shared", "mtp-heads", None, {"shared": True}),
    ("recipes/mask-tokens.yaml", "mask-tokens", RECIPES / "mask-tokens.yaml", {}),
    ("recipes/mtp-heads.yaml", "mtp-heads", RECIPES / "mtp-heads.yaml", {}),
)


@dataclass(frozen=True)
class Run:
    """A training run: its plan, the memory of that and of the smallest plan, and its FLOP per step."""

    plan: StepPlan
    memory: int
    least: int
    flop: float

    def cells(self, budget: MemoryBudget) -> list[str]:
        """Memory, least memory and plan, as cells of a table."""
        if self.memory > budget.bytes:
            return ["does not fit", gigabytes(self.least), "-"]
        return [gigabytes(self.memory), gigabytes(self.least), str(self.plan).replace(", one at a time", "")]


PROCESS = 300_000_000  # bytes of a training process without weights, on a Linux machine (measured)


def rows_of(vocabulary: int) -> list[Example]:
    """Training rows of random ids; only their lengths matter."""
    random = np.random.default_rng(0)
    return [Example(random.integers(0, vocabulary, PROMPT + ANSWER).tolist(), PROMPT) for _ in range(4)]


def on_a_gpu(method: type[Method[Any]], budget: MemoryBudget) -> type[Method[Any]]:
    """The method as it plans on a GPU, within `budget` instead of the memory of this machine."""

    class OnGpu(method):  # type: ignore[misc, valid-type]
        most_workers, most_rows = 1, MOST_ROWS_GPU

        def choose_plan(self, train: Sequence[Example]) -> StepPlan:
            """The fastest plan that fits, or the smallest if none does."""
            plans = list(self.plans())
            sizes = [self.estimate_memory(train, plan).total for plan in plans]
            fitting = [plan for plan, size in zip(plans, sizes) if size <= budget.bytes]
            return fitting[0] if fitting else plans[int(np.argmin(sizes))]

        def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> Any:
            found = super().estimate_memory(examples, plan)
            return replace(found, process=PROCESS)  # not of this process, which has no weights

    return OnGpu


def run_of(
    model: nn.Module,
    name: str,
    config: Path | None,
    options: dict[str, Any],
    rows: list[Example],
    budget: MemoryBudget,
) -> Run:
    """The run of a method, by a YAML file or the defaults, with these options."""
    given = {"model": "model", "data": Path("data.jsonl"), "out": Path("adapter"), **options}
    method = on_a_gpu(method_class(name), budget)
    settings: Any = method.settled(settings_from(config, given, name), rows)
    if settings.max_length < PROMPT + ANSWER:
        raise SystemExit(f"{config}: rows here have {PROMPT + ANSWER} tokens, and max_length is less")
    trained = method(model, rows, settings, lambda message: None)
    least = min(trained.estimate_memory(rows, plan).total for plan in trained.plans())
    memory = trained.estimate_memory(rows, trained.plan).total
    flop = (heads_flop if name == "mtp-heads" else slots_flop)(model, trained, settings)
    trained.attached.detach()
    return Run(trained.plan, memory, least, flop)


# --- FLOP: two per weight and row forward, two for the gradient of the input, two for that of the weights -------


@dataclass(frozen=True)
class Trunk:
    """Sizes of a base model.

    Attributes:
        weights: of all linear layers of the decoder.
        layers: number of decoder layers.
        attention: width of the queries of a layer, all heads.
        hidden: hidden size.
        vocabulary: number of ids.
    """

    weights: int
    layers: int
    attention: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model: nn.Module) -> Trunk:
        """The sizes of a bare model, or of one with an adapter."""
        seams = find_seams(model)
        sizes = {
            path.removesuffix(".base"): linear_sizes(getattr(layer, "base", layer))
            for path, layer in seams.linears.items()
        }
        outputs = [inputs for path, (inputs, _) in sizes.items() if path.endswith("o_proj")]
        embedding = getattr(seams.embedding, "base", seams.embedding)
        vocabulary, hidden = embedding_shape(embedding)
        return cls(
            weights=sum(inputs * outs for inputs, outs in sizes.values()),
            layers=len(seams.trunk.layers),
            attention=outputs[0] if outputs else hidden,
            hidden=hidden,
            vocabulary=vocabulary,
        )

    def forward(self, keys: float) -> float:
        """FLOP of a row that sees so many keys."""
        return 2 * self.weights + 4 * self.layers * self.attention * keys

    @property
    def lm_head(self) -> int:
        """FLOP of a row of logits over the whole vocabulary."""
        return 2 * self.hidden * self.vocabulary


def slots_flop(model: nn.Module, method: Method[Any], settings: Any) -> float:
    """FLOP of a step of mask tokens: the base over the text, its logits, and slot rows forward and backward."""
    trunk, adapter = Trunk.of(model), adapter_of(method.attached)
    length, choice = PROMPT + ANSWER, block_choice(settings)
    sequences = settings.batch_size * settings.micro_batches
    first = 0 if settings.learn_from == "all" else PROMPT
    positions = sequences * len(candidate_anchors(length, first))
    rows = choice.share * positions * choice.mean_slots
    low_rank = sum(_size(module) for module in adapter.low_rank.values())
    columns = trunk.vocabulary if adapter.draft_ids is None else len(adapter.draft_ids)
    heads = 8 * trunk.hidden * columns  # two of them, with the gradient of their input
    a_row = 2 * trunk.forward(length) + 6 * (low_rank + _size(adapter.sampler)) + heads
    if method.plan.grad_checkpoint:
        a_row += trunk.forward(length)
    teacher = min(positions, rows) * trunk.lm_head
    return sequences * length * trunk.forward(length / 2) + teacher + rows * a_row


def heads_flop(model: nn.Module, method: Method[Any], settings: Any) -> float:
    """FLOP of a step of MTP heads: the base over the text, its logits, and every depth forward and backward."""
    trunk, heads = Trunk.of(model), heads_of(method.attached)
    length = PROMPT + ANSWER
    sequences = settings.batch_size * settings.micro_batches
    learnt = length if settings.learn_from == "all" else ANSWER
    columns = method.attached.draft_head.columns
    a_row = 6 * _head_size(heads) + 12 * len(heads.heads[0].layers) * trunk.attention * length / 2
    lm_head = 4 * trunk.hidden * columns
    text = length * (trunk.forward(length / 2) + heads.drafts * a_row)
    return sequences * (text + learnt * (trunk.lm_head + heads.drafts * lm_head))


def _head_size(heads: DraftHeads) -> float:
    """Weights that are used for one draft."""
    return sum(map(_size, heads.heads)) / len(heads.heads)


def _size(module: nn.Module) -> int:
    return sum(value.size for _, value in tree_flatten(module.parameters()))


# --- the tables ---------------------------------------------------------------------------------------------------


def hours(seconds: float) -> str:
    """A time, rounded to what a computed one is good for."""
    if seconds < 6000:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.{1 if seconds < 36000 else 0}f} h"


def print_training(names: Sequence[str], bits: int, budget: MemoryBudget, macs: Sequence[Mac]) -> None:
    """A row for every model and command."""
    print(
        "| model | command | memory | at least | computed in |", *(f" {mac.name} |" for mac in macs), sep=""
    )
    print("|---|---|---|---|---|" + "---|" * len(macs))
    for name in names:
        model = weightless(config_of(name), bits)
        model.freeze()
        rows = rows_of(embedding_shape(find_seams(model).embedding)[0])
        for command, method, config, options in CASES:
            run = run_of(model, method, config, options, rows, budget)
            times = [hours(STEPS * run.flop / (TRAINING_SHARE * mac.tflops * 1e12)) for mac in macs]
            print(f"| {' | '.join([name, f'`{command}`', *run.cells(budget), *times])} |", flush=True)


def print_answers(names: Sequence[str], bits: int, macs: Sequence[Mac]) -> None:
    """A row for every model: the time of `ANSWERS` answers."""
    print(f"\n| model | weights | {' | '.join(mac.name for mac in macs)} |\n|---|---|" + "---|" * len(macs))
    for name in names:
        size = parameter_bytes(weightless(config_of(name), bits))
        steps = ANSWERS * ANSWER / AT_ONCE * COST_AT_ONCE
        times = [hours(steps * size / (mac.gbps * 1e9)) for mac in macs]
        print(f"| {' | '.join([name, gigabytes(size), *times])} |")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two Markdown tables: training, and the answers to train on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", action="append", help="a shape of model_shapes.py, or a folder with config.json"
    )
    parser.add_argument("--bits", type=int, default=4, help="precision of an unquantised model; 16: bfloat16")
    parser.add_argument(
        "--memory", default="11GB", help="as for `mtp-mlx train` (a Mac of 16 GB allows about 11)"
    )
    parser.add_argument("--tflops", type=float, help="the computer's own speed in training")
    given = parser.parse_args(arguments)
    budget = MemoryBudget(parsed_size(given.memory), "`memory` allows")
    names = given.model or ["qwen2.5-0.5b", "qwen3-4b", "qwen3-8b"]
    own = [] if given.tflops is None else [Mac(f"{given.tflops:g} TFLOP/s", given.tflops / TRAINING_SHARE, 0)]
    print_training(names, given.bits, budget, own or MACS)
    if not own:
        print_answers(names, given.bits, MACS)


if __name__ == "__main__":
    main()
