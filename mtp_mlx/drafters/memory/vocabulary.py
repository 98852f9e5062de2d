"""What tells tokenizers apart: a fingerprint of which text each token id stands for."""

from __future__ import annotations

import hashlib
from typing import Any


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """16 hex digits, equal for tokenizers whose ids mean the same, such as those of models of one family.

    Args:
        tokenizer: as transformers' or mlx-lm's, with `get_vocab`.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{index} {token}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
