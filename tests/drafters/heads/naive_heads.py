"""The loss of MTP heads the slow way: a llama block in float64 numpy, one sequence, head and position at a time.

Shares no code with the package: which token, state and teacher row belong together is written out here again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HEADS, KV_HEADS, HEAD_DIM, THETA = 4, 2, 16, 10000.0  # of tests.tiny's llama
Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Knobs:
    """The settings of the loss."""

    ce: float = 1.0
    kl: float = 1.0
    share: float = 0.25
    temperature: float = 1.0
    decay: float = 1.0


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def rope(x: np.ndarray) -> np.ndarray:
    """x [T, H, 16], row t at position t, halves rotated."""
    half = HEAD_DIM // 2
    angles = np.arange(len(x))[:, None, None] * THETA ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1
    )


def block(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """One llama layer over [T, D]."""

    def apply(name: str, rows: np.ndarray) -> np.ndarray:
        return rows @ weights[f"{prefix}.{name}.weight"].T

    rows = len(x)
    h = norm(x, weights[f"{prefix}.input_layernorm.weight"])
    q = rope(apply("self_attn.q_proj", h).reshape(rows, HEADS, HEAD_DIM))
    k = rope(apply("self_attn.k_proj", h).reshape(rows, KV_HEADS, HEAD_DIM))
    v = apply("self_attn.v_proj", h).reshape(rows, KV_HEADS, HEAD_DIM)
    mixed = np.zeros_like(q)
    for t in range(rows):
        for head in range(HEADS):
            of = head // (HEADS // KV_HEADS)
            scores = k[: t + 1, of] @ q[t, head] / np.sqrt(HEAD_DIM)
            share = np.exp(scores - scores.max())
            mixed[t, head] = share @ v[: t + 1, of] / share.sum()
    x = x + apply("self_attn.o_proj", mixed.reshape(rows, -1))
    h = norm(x, weights[f"{prefix}.post_attention_layernorm.weight"])
    gate = apply("mlp.gate_proj", h)
    return x + apply("mlp.down_proj", gate / (1 + np.exp(-gate)) * apply("mlp.up_proj", h))


def fused(weights: Weights, states: np.ndarray) -> np.ndarray:
    """[T, D] of trunk states [T, (n + 1) * D], of which each is normalised by itself."""
    if "fusion.fuse.weight" not in weights:
        return states
    parts = np.split(states, states.shape[1] // len(weights["fusion.fuse.weight"]), axis=1)
    normed = [norm(part, weights[f"fusion.norms.{j}.weight"]) for j, part in enumerate(parts)]
    return np.concatenate(normed, axis=1) @ weights["fusion.fuse.weight"].T


def blocks(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """The layers of a head, one or several."""
    if f"{prefix}.0.input_layernorm.weight" not in weights:
        return block(weights, prefix, x)
    for j in range(16):
        if f"{prefix}.{j}.input_layernorm.weight" in weights:
            x = block(weights, f"{prefix}.{j}", x)
    return x


def cascade(weights: Weights, count: int, embeddings: np.ndarray, states: np.ndarray) -> list[np.ndarray]:
    """What the LM head reads at each of `count` depths, [T - k, D] each; heads are used in turn.

    Args:
        embeddings: [T, D].
        states: [T, D] or [T, (n + 1) * D] of the trunk.
    """
    found, hidden = [], fused(weights, states)
    heads = len({name.split(".")[1] for name in weights if name.startswith("heads.")})
    for k in range(1, count + 1):
        own = f"heads.{(k - 1) % heads}"
        rows = len(embeddings) - k
        if rows < 1:
            break
        x = np.stack(
            [
                np.concatenate(
                    [
                        norm(embeddings[i + k], weights[f"{own}.norm_embedding.weight"]),
                        norm(hidden[i], weights[f"{own}.norm_hidden.weight"]),
                    ]
                )
                @ weights[f"{own}.fuse.weight"].T
                for i in range(rows)
            ]
        )
        hidden = norm(blocks(weights, f"{own}.block", x), weights[f"{own}.norm_out.weight"])
        found.append(hidden)
    return found


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def row_loss(
    student: np.ndarray, teacher: np.ndarray, drafted: list[int], label: int | None, knobs: Knobs
) -> float:
    """One head at one position; `label` is the column of the token that followed, or None.

    Args:
        student: [C] logits of the ids that may be drafted.
        teacher: [V] logits of all ids.
    """
    q, p = softmax(teacher / knobs.temperature)[drafted], softmax(student / knobs.temperature)
    kept = max(1, round(knobs.share * len(student)))
    best, rest = np.argsort(-q, kind="stable")[:kept], np.argsort(-q, kind="stable")[kept:]
    classes = [[column] for column in best]
    if knobs.ce == 0 and len(rest):
        classes.append(rest)
    q, p = (np.array([x[one].sum() for one in classes]) for x in (q, p))
    mass = q.sum()
    q, p = q / mass, p / p.sum()
    kl = knobs.temperature**2 * mass * float((q * np.log(q / p)).sum())
    ce = 0.0 if label is None else -float(np.log(softmax(student)[label]))
    return knobs.ce * ce + knobs.kl * kl


def loss(
    weights: Weights,
    count: int,
    sequences: list[tuple[list[int], int]],
    embeddings: list[np.ndarray],
    hidden: list[np.ndarray],
    head: np.ndarray,
    drafted: list[int],
    knobs: Knobs,
    trained_from: int = 1,
) -> float:
    """The whole loss of a batch.

    Args:
        sequences: (tokens, index of the first response token).
        hidden: [T, D] or [T, (n + 1) * D] of the trunk, its last state last.
        head: [V, D] of the LM head; `drafted` are the ids that may be drafted.
        trained_from: the first head that has a loss.
    """
    per_head: dict[int, list[float]] = {k: [] for k in range(trained_from, count + 1)}
    columns = head[drafted]
    for (tokens, start), rows, states in zip(sequences, embeddings, hidden, strict=True):
        for k, z in enumerate(cascade(weights, count, rows, states), start=1):
            for i in range(len(tokens) - k - 1):
                predicted = i + k + 1
                if predicted < start or k < trained_from:
                    continue
                # The main head's row that predicts the same token.
                teacher = head @ states[predicted - 1, -head.shape[1] :]
                token = tokens[predicted]
                label = drafted.index(token) if token in drafted else None
                per_head[k].append(row_loss(columns @ z[i], teacher, drafted, label, knobs))
    shares = {k: knobs.decay ** (k - 1) for k in per_head}
    return sum(
        shares[k] / sum(shares.values()) * float(np.mean(losses)) for k, losses in per_head.items() if losses
    )
