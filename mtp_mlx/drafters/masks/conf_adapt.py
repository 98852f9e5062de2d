"""Training one mask token by online self-distillation (arXiv 2602.06019), with LoRA or a full fine-tune.

Gated LoRA leaves real rows as they are: it writes an adapter folder, and verified decoding gives the base model's own
text. Ordinary LoRA and a full fine-tune change real rows, so they write a whole model folder that has a mask token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mtp_mlx.drafters.masks.folder import config_of, mask_header, save
from mtp_mlx.drafters.masks.joint_step import JointRunner, LowRankStudent, Student, WholeStudent
from mtp_mlx.drafters.masks.memory import joint_memory, online_memory
from mtp_mlx.drafters.masks.method import mask_shape
from mtp_mlx.drafters.masks.model_folder import mask_only, write_model_folder
from mtp_mlx.drafters.masks.online_loss import Online
from mtp_mlx.drafters.masks.online_step import OnlineRunner
from mtp_mlx.drafters.masks.options import ConfAdaptSettings
from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.drafters.slots.agreement import measure_agreement
from mtp_mlx.drafters.slots.memory import chunk_blocks_of
from mtp_mlx.drafters.slots.method import SlotMethod
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block_linear import is_quantised
from mtp_mlx.model.tensor_fit import check_fit
from mtp_mlx.models import resolve_model
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.memory import MemoryEstimate
from mtp_mlx.train.method import Tell
from mtp_mlx.train.plan import StepPlan
from mtp_mlx.train.step import MicroBatchRunner


class ConfAdapt(SlotMethod[ConfAdaptSettings]):
    """Trains a mask token, and with it what `settings.tuning` says.

    Raises:
        MTPError: the model cannot be attached to, is quantised or has recurrent state although its own weights
            should change, or `settings.start_from` does not fit.
    """

    what = "masks"

    def __init__(
        self, model: nn.Module, train: Sequence[Example], settings: ConfAdaptSettings, tell: Tell
    ) -> None:
        super().__init__(model, train, settings, tell)
        self._gated, self._whole = settings.tuning == "gated-lora", settings.tuning == "full"
        if not self._gated:
            _check_unquantised(model, settings.tuning)
            _check_joint(model, settings.tuning)
        draft_ids = self.draft_vocabulary(train) if self._gated else None
        self.adapter: MaskAdapter = new_adapter(model, self._shape(), draft_ids)
        if settings.start_from is not None:
            self.start_from(settings.start_from, config_of, tell)
        self.attached: AttachedModel = attach(model, self.adapter)
        if self._whole:
            model.unfreeze()
        self.plan = self.choose_plan(train)
        self._runner = self._make_runner()

    def _shape(self) -> MaskAdapterConfig:
        settings = self.settings
        if self._whole:
            return mask_only(settings.slots)
        return mask_shape(settings, sampler_width=0)

    def _make_runner(self) -> MicroBatchRunner:
        settings = self.settings
        columns = mx.array(draft_columns(self.attached))
        objective = Online(settings.supervision, columns, self.adapter.draft_ids)
        common = (objective, settings.slots + 1, settings.region_rows, settings.seed)
        if self._gated:
            return OnlineRunner(
                self.attached,
                *common,
                chunk_blocks=chunk_blocks_of(settings.chunk_blocks, settings.slots, self.plan),
                chunk_rows=settings.loss_rows,
                plan=self.plan,
            )
        student: Student = WholeStudent(self.attached) if self._whole else LowRankStudent(self.attached)
        return JointRunner(student, *common, chunk_rows=settings.loss_rows)

    def plans(self) -> Iterator[StepPlan]:
        """See `Method`; a joint pass is one piece, and the teacher replaces the model's weights in it."""
        return super().plans() if self._gated else iter([StepPlan()])

    @property
    def module(self) -> nn.Module:
        """See `Method`: the adapter, or the whole model with the mask token."""
        return self.attached.model if self._whole else super().module

    def tensors(self) -> dict[str, mx.array]:
        """See `Method`."""
        return _flat(self.module) if self._whole else super().tensors()

    def load_tensors(self, tensors: dict[str, mx.array]) -> None:
        """See `Method`."""
        if not self._whole:
            super().load_tensors(tensors)
            return
        check_fit(_flat(self.module), tensors)
        self.module.update(tree_unflatten(list(tensors.items())))

    def measure(self, batches: Sequence[Sequence[Example]]) -> Agreement:
        """See `Method`; with LoRA on real rows too, if it was trained so."""
        if self.settings.tuning != "lora":
            return measure_agreement(self.attached, batches, self.depth)
        with self.attached.ungated():
            return measure_agreement(self.attached, batches, self.depth)

    def export(self, folder: Path, training: dict[str, Any], acceptance: list[float]) -> None:
        """See `Method`: an adapter folder for gated LoRA, else a model folder."""
        if self._gated:
            about = self.about(training, acceptance)
            header = mask_header(self.adapter.config, self.settings.model, self.fingerprint, **about)
            save(folder, self.adapter, header)
            return
        source = Path(resolve_model(self.settings.model))
        training = {"base": source.name, "base_fingerprint": self.fingerprint, **training}
        header = mask_header(mask_only(self.depth), folder.name, None, **self.about(training, acceptance))
        mask = self.adapter.slot_embeddings.weight[0]
        with self.attached.unwrapped() as bare:
            model = bare if self._whole else merged(bare, self.adapter)
            write_model_folder(folder, source, model, mask, header)

    def estimate_memory(self, examples: Sequence[Example], plan: StepPlan) -> MemoryEstimate:
        """See `Method`."""
        if self._gated:
            return online_memory(self.attached, examples, self.settings, plan)
        return joint_memory(self.attached, examples, self.settings)


def merged(model: nn.Module, adapter: MaskAdapter) -> nn.Module:
    """A copy of a model, not attached, with the adapter's LoRA merged into its weights; other weights are shared."""
    out = copy.deepcopy(model)
    modules = dict(out.model.named_modules())
    for path, low_rank in adapter.low_rank.items():
        linear = modules[path]
        update = low_rank.product()  # [D_in, D_out]
        linear.weight = (linear.weight.astype(mx.float32) + update.T).astype(linear.weight.dtype)
    return out


def _flat(module: nn.Module) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def _check_joint(model: nn.Module, tuning: str) -> None:
    """MTPError if real rows and masks cannot be trained in one pass."""
    bare = attach(model)
    reason = bare.why_linear
    bare.detach()
    if reason:
        raise MTPError(
            f"`tuning` {tuning} trains real tokens and masks in one pass, and {reason}, masks too: set `tuning` to "
            "gated-lora"
        )


def _check_unquantised(model: nn.Module, tuning: str) -> None:
    """MTPError if weights that should change are quantised."""
    if any(is_quantised(layer) for _, layer in model.named_modules()):
        raise MTPError(
            f"`tuning` {tuning} changes the model's own weights, and these are quantised: train the unquantised "
            "model, or set `tuning` to gated-lora"
        )
