"""What huggingface_hub and the network raise, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mtp_mlx.errors import MTPError


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what huggingface_hub and the network raise into one sentence that begins with `what`.

    Raises:
        MTPError: for any of these; it says what to do: log in, check the name, ask for access, or connect.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise MTPError(f"{what}: that is not a repository's name; give OWNER/NAME") from error
    except errors.LocalTokenNotFoundError as error:
        raise MTPError(f"{what}: you are not logged in; run `hf auth login` first") from error
    except errors.GatedRepoError as error:
        raise MTPError(
            f"{what}: its owners grant access on request; ask for it on the repository's page first"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MTPError(f"{what}: it has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise MTPError(
            f"{what}: there is no such repository, or it is private and you have no access; check the name, and run "
            "`hf auth login` if it is yours"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError) as error:
        unset = "; HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ""
        raise MTPError(
            f"{what}: the hub cannot be reached, and the local cache has no copy{unset}; try again with a network"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise MTPError(
                f"{what}: your login does not allow it ({status}); run `hf auth login` with a token that can write"
            ) from error
        raise MTPError(f"{what}: the hub answered {status or 'with an error'} ({_short(error)})") from error
    except OSError as error:  # the client library's own network errors, a full disk
        raise MTPError(f"{what}: {_short(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        raise MTPError(f"{what}: the hub cannot be reached ({_short(error)})") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
