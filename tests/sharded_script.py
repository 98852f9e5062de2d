"""What each process of `tests/test_distributed_generate.py` does: generates with every request of a JSON file.

A request is {"adapter": folder or null, "memory": file, "emit": ..., and arguments of `stream_generate`}. Each
process prints a JSON object: its rank, a list of token ids per request, and the parts of the model that it has.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mtp_mlx import load, stream_generate
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.distributed import Peers, join


def answers(model: str, requests: list[dict[str, Any]], peers: Peers) -> dict[str, Any]:
    """Token ids of every request, how many drafts were accepted in it, and the bytes of weights here."""
    tokens, accepted, size = [], [], 0
    for request in requests:
        wanted = dict(request)
        attached, tokenizer = load(
            model, wanted.pop("adapter"), peers=peers, memory=wanted.pop("memory", None)
        )
        wanted["sampling"] = SamplingConfig(**wanted.pop("sampling", {}))
        wanted["emission"] = Emission(wanted.pop("emit", "verified"))
        found = list(stream_generate(attached, tokenizer, "The sky is", 14, **wanted))
        tokens.append([response.token for response in found])
        accepted.append(sum(response.from_draft for response in found))
        trunk = attached.model
        attached.detach()
        size = sum(value.nbytes for name, value in tree_flatten(trunk.parameters()) if ".layers." in name)
    return {"rank": peers.rank, "tokens": tokens, "accepted": accepted, "bytes": size}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    sys.stdout.write(json.dumps(answers(sys.argv[1], given, join())) + "\n")
