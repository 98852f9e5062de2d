"""Recognises checkpoints of the released code for Parallel Token Prediction (arXiv 2512.21323). Needs no mlx.

Lightning files (.ckpt, whole or adapter-only) and the same names in safetensors:

    {model,student}.[model.]base_model.model.model.layers.{i}.<layer>.lora_{A,B}[.default].weight   [r, in], [out, r]
    {model,student}.{u_embed,u_adapter}.embedding.weight                                            [knots, D]
    {model,student}.{u_embed,u_adapter}.{u_adapter,u_embed}.{weight,bias}                           [D, 32], [D]

Of alternatives the older spelling is the second; the code's own loader renames it, inner names included. `ptp` writes
the adapter folder.
"""

from __future__ import annotations

import re

from mtp_mlx.convert.read.checkpoint import Checkpoint

_ROOT = r"(?:model|student)\."
LORA = re.compile(
    _ROOT + r"(?:model\.)?base_model\.model\.model\.(layers\.\d+\..+)\.lora_([AB])(?:\.default)?\.weight"
)
KNOTS = re.compile(_ROOT + r"(?:u_embed|u_adapter)\.embedding\.weight")
LINEAR = re.compile(_ROOT + r"(?:u_embed|u_adapter)\.(?:u_adapter|u_embed)\.(weight|bias)")


def is_ptp_checkpoint(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a PTP student: low-rank factors and an embedding of uniforms."""
    names = list(checkpoint.tensors)
    return any(map(LORA.fullmatch, names)) and any(KNOTS.fullmatch(n) or LINEAR.fullmatch(n) for n in names)


def student_line(checkpoint: Checkpoint) -> str:
    """The plan for a student, in a line for people."""
    count = sum(bool(LORA.fullmatch(name)) for name in checkpoint.tensors)
    return (
        f"student of Parallel Token Prediction: {count} low-rank factors and an embedding of uniforms; it becomes an "
        "adapter folder with `heads_only` and `base`"
    )
