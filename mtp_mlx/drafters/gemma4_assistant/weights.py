"""The assistant itself: decoder layers of mlx-lm's Gemma 4 that compute queries only.

Facts from transformers' `modeling_gemma4_assistant.py` and `candidate_generator.py`
(`SinglePositionMultiTokenCandidateGenerator`): a draft takes the target's embedding of the token before it, scaled as
the target scales it, and a state of the target's width, in this order; no norm comes before `pre_projection`. Every
layer attends to the keys and values of the target's last layer of the same kind that has some of its own. All drafts
of a step have one position. The LM head is the assistant's embedding, without a soft
cap; E2B and E4B score the tokens of the best clusters only.

Legend: D width of the target, A width of the assistant, V vocabulary, C centroids, n of them scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from mtp_mlx.drafters.gemma4_assistant.config import AssistantConfig


@dataclass(frozen=True)
class SeenRows:
    """What the layers of one kind attend to, the same for all drafts of a step.

    Attributes:
        keys, values: [1, H_kv, K, head width].
        mask: [K] bool, which of these rows are committed and inside the window.
    """

    keys: mx.array
    values: mx.array
    mask: mx.array


class _Stack(nn.Module):
    """The embedding, the layers and the last norm: `model` in the checkpoint."""

    def __init__(self, args: gemma4_text.ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [gemma4_text.DecoderLayer(args, index) for index in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class _Clusters(nn.Module):
    """Clusters of tokens and their centroids: `masked_embedding` in the checkpoint."""

    def __init__(self, width: int, vocab_size: int, count: int, scored: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(width, count, bias=False)
        self.token_ordering = mx.arange(vocab_size, dtype=mx.int32)  # the tokens of cluster 0, then 1, ...
        self._count, self._scored = count, scored

    def __call__(self, state: mx.array) -> mx.array:
        """[n * V / C] int32 ids of the tokens in the best clusters for a state [1, A], ascending."""
        best = mx.argpartition(-self.centroids(state)[0], kth=self._scored - 1)[: self._scored]
        return mx.sort(self.token_ordering.reshape(self._count, -1)[best].reshape(-1))


class Assistant(nn.Module):
    """An assistant; its parameters have the names of the checkpoint.

    Args:
        config: how it is built.
    """

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        args = _layer_args(config)
        width, backbone = args.hidden_size, config.backbone_hidden_size
        self.pre_projection = nn.Linear(2 * backbone, width, bias=False)
        self.post_projection = nn.Linear(width, backbone, bias=False)
        self.model = _Stack(args)
        if config.use_ordered_embeddings:
            scored = config.num_centroids, config.centroid_intermediate_top_k
            self.masked_embedding = _Clusters(width, args.vocab_size, *scored)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(width, args.vocab_size, bias=False)

    def __call__(
        self, embedding: mx.array, state: mx.array, seen: Mapping[str, SeenRows], position: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The state that the next token is scored by, [1, A], and the one that the next draft takes, [1, 1, D].

        Args:
            embedding: [1, 1, D] of the newest token, scaled.
            state: [1, 1, D] of the target after its last norm, or as returned for the draft before.
            seen: by kind of layer.
            position: int32 scalar, the same for all drafts of a step.
        """
        hidden = self.pre_projection(mx.concatenate([embedding, state], axis=-1))
        for layer in self.model.layers:
            rows = seen[layer.layer_type]
            hidden, _, _ = layer(hidden, rows.mask, shared_kv=(rows.keys, rows.values), offset=position)
        hidden = self.model.norm(hidden)
        return hidden[0], self.post_projection(hidden)

    def logits(self, state: mx.array) -> tuple[mx.array, mx.array | None]:
        """Logits [1, columns] of a state [1, A], and the columns' ids [columns] int32; None if these are all ids."""
        if "masked_embedding" not in self:
            head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
            return head(state), None
        ids = self.masked_embedding(state)
        if "lm_head" in self:
            return self.lm_head(state)[:, ids], ids
        return state @ self.model.embed_tokens(ids).T, ids


def _layer_args(config: AssistantConfig) -> gemma4_text.ModelArgs:
    """The arguments of mlx-lm's layers; all of them read the keys of another one."""
    layers = int(config.text_config["num_hidden_layers"])
    fixed = {
        "num_kv_shared_layers": layers,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
    }
    return gemma4_text.ModelArgs.from_dict({**config.text_config, **fixed})
