"""The options of `mtp-mlx convert`, and which of them exclude each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtp_mlx.adapter_folder import sidecar
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.convert.heads.families import Found
    from mtp_mlx.convert.heads.plan import Overrides
    from mtp_mlx.convert.read.checkpoint import Checkpoint


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `mtp-mlx convert`, as their help describes them."""

    quantize: str | None
    quantize_heads: str | None
    group_size: str
    dtype: str | None
    heads_only: bool
    trunk_only: bool
    heads_as: str
    dry_run: bool
    head_norms: str
    head_order: str
    head_hidden: str
    head_recycled: str
    base: str | None
    verify: bool
    force: bool

    @property
    def bits(self) -> int | None:
        """Bits to quantise to, or None."""
        return int(self.quantize) if self.quantize else None

    @property
    def head_bits(self) -> int | None:
        """Bits to quantise heads to, or None."""
        return int(self.quantize_heads) if self.quantize_heads else None

    @property
    def overrides(self) -> Overrides:
        """How the heads are stored and run, where that is not their family's way."""
        from mtp_mlx.convert.heads.plan import Overrides

        return Overrides(self.head_norms, self.head_order, self.head_hidden, self.head_recycled)

    @property
    def conventions(self) -> list[str]:
        """The --head-... options given."""
        return ["--" + name.replace("_", "-") for name in self.overrides.given]

    @property
    def of_heads(self) -> list[str]:
        """The options given that need heads."""
        quantised = ["--quantize-heads"] if self.quantize_heads else []
        return [*self.conventions, *quantised, *(["--verify"] if self.verify else [])]

    def check(self, out: Path | None) -> None:
        """Raises click.UsageError for options of which one would be ignored."""
        if self.heads_only and self.trunk_only:
            raise click.UsageError(
                "--heads-only and --trunk-only together leave nothing to convert: give one of them."
            )
        if self.heads_only and (self.quantize or self.dtype):
            raise click.UsageError(
                "--quantize and --dtype are for the trunk, which --heads-only leaves out: heads keep their type."
            )
        if self.trunk_only and self.of_heads:
            raise click.UsageError(f"--trunk-only leaves out the heads that {self.of_heads[0]} is for.")
        if self.quantize_heads and (self.heads_as != "adapter" or self.dry_run):
            raise click.UsageError(
                "--quantize-heads is for the adapter folder that is written: leave it out."
            )
        if self.dry_run and self.verify:
            raise click.UsageError(
                "--dry-run reads no weights, so it cannot --verify: leave one of them out."
            )
        if self.heads_as != "adapter" and not self.heads_only and not self.dry_run:
            raise click.UsageError(
                "--heads-as is the layout that --heads-only writes: give --heads-only too."
            )
        if self.heads_as != "adapter" and self.verify:
            raise click.UsageError("--verify measures an adapter folder: leave --heads-as out.")
        if self.base and not self.heads_only and not self.dry_run:
            raise click.UsageError(
                "--base is for heads and adapters that come without their model: give --heads-only too."
            )
        if out is None and self.verify and self.heads_only:
            raise click.UsageError(
                "Missing argument 'OUT' (--verify does without only for converted folders)."
            )

    def check_heads(self, checkpoint: Checkpoint, found: Found | None) -> None:
        """Raises MTPError for options about heads that the checkpoint, or its kind of heads, does not have."""
        if sidecar(checkpoint.path) is not None:
            self.check_converted(checkpoint.path)
        elif self.of_heads and found is None:
            raise MTPError(
                f"{checkpoint.path}: there are no MTP heads; leave {' and '.join(self.of_heads)} out"
            )
        elif self.verify and found is not None and found.convention.kind != "cascade":
            raise MTPError(
                f"{checkpoint.path}: {found.title} heads have no conventions for --verify to try; leave it out"
            )

    def check_converted(self, folder: Path) -> None:
        """Raises MTPError for options about heads that were converted before."""
        late = [option for option in self.of_heads if option != "--verify"]
        if late:
            raise MTPError(
                f"{folder}: its heads were converted before, so {late[0]} comes too late; convert the original "
                "checkpoint"
            )

    def check_no_heads(self, what: str) -> None:
        """Raises MTPError for options about heads; its message begins with `what`, what the source is instead."""
        if self.of_heads or self.heads_as != "adapter":
            raise MTPError(f"{what}: leave --verify, --heads-as, --quantize-heads and --head-... out")
