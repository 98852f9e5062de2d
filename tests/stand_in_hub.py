"""A stand-in for the model hub: repositories in a folder, and what was asked for. Nothing goes over the network."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import errors


class StandIn:
    """huggingface_hub's client, as far as it is used to fetch.

    Attributes:
        remote: folder of the repositories, owner/name.
        cache: where fetched files go.
        fetched: names of the files that were fetched, in order.
        fails: raised by whatever needs a network, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.remote, self.cache = folder / "remote", folder / "fetched"
        self.fetched: list[str] = []
        self.fails: Exception | None = None

    def _repository(self, name: str) -> Path:
        if self.fails is not None:
            raise self.fails
        if not (self.remote / name).is_dir():
            raise failure(errors.RepositoryNotFoundError, 404)
        return self.remote / name

    def model_info(self, repo_id: str, *, files_metadata: bool) -> Any:
        assert files_metadata  # or there are no sizes
        folder = self._repository(repo_id)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=str(path.relative_to(folder)), size=path.stat().st_size)
            for path in files
        ]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(
        self,
        repo_id: str,
        *,
        allow_patterns: list[str],
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> str:
        here = self.cache / repo_id
        if local_files_only:
            if not here.is_dir():
                raise errors.LocalEntryNotFoundError("not fetched yet")
            return str(here)
        folder = self._repository(repo_id)
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                if not (here / name).exists():
                    self.fetched.append(name)
                    shutil.copyfile(path, here / name)
        return str(here)

    def parse_safetensors_file_metadata(self, repo_id: str, filename: str, *, revision: str) -> Any:
        content = (self._repository(repo_id) / filename).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return SimpleNamespace(tensors={name: None for name in header if name != "__metadata__"})


def failure(kind: Any, status: int) -> Exception:
    """An error of huggingface_hub with the response it came from."""
    made: Exception = kind.__new__(kind)
    Exception.__init__(made, f"{status} Client Error")
    made.response = SimpleNamespace(status_code=status, headers={})  # type: ignore[attr-defined]
    return made
