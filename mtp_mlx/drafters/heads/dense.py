"""Dense layers with the values of quantised ones: the only ones that can be trained."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mtp_mlx.errors import MTPError


def dequantise(module: nn.Module) -> None:
    """Replaces the quantised linear layers and embeddings below `module` by dense ones with the same values.

    Raises:
        MTPError: if a layer is quantised in a way that is not known here, so that it could not be trained.
    """
    dense = tree_map_with_path(
        lambda _, layer: _dense(layer), module.leaf_modules(), is_leaf=nn.Module.is_module
    )
    module.update_modules(dense)
    left = next((layer for _, layer in module.named_modules() if "scales" in layer), None)
    if left is not None:
        raise MTPError(
            f"a head cannot be a copy of layers with {type(left).__name__}, whose values are not known in full "
            "precision (no seam 'linear'): use prompt lookup or a draft model, or the unquantised model"
        )


def _dense(layer: Any) -> Any:
    """A dense layer with the values of a quantised one; any other module unchanged."""
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
    if not isinstance(layer, kinds):
        return layer
    weight = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
    )
    *stack, outputs, inputs = weight.shape
    out: nn.Module
    if isinstance(layer, nn.QuantizedLinear):
        out = nn.Linear(inputs, outputs, bias="bias" in layer)
    elif isinstance(layer, nn.QuantizedEmbedding):
        out = nn.Embedding(outputs, inputs)
    elif isinstance(layer, QuantizedSwitchLinear):
        out = SwitchLinear(inputs, outputs, stack[0], bias="bias" in layer)
    else:
        out = MultiLinear(inputs, outputs, stack[0])
    out.weight = weight
    if "bias" in layer:
        out.bias = layer.bias
    return out
