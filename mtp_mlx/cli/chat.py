"""`mtp-mlx chat`: a conversation in the terminal or over a pipe, one message per line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import click

from mtp_mlx.cli.generate import checked_unicode, recommendation, sampling_of, tell, whole_sampling
from mtp_mlx.cli.options import (
    DraftingOptions,
    EmissionOptions,
    GenerateSettings,
    LearningOptions,
    LoadingOptions,
    ModelOptions,
    PrecisionOptions,
    SamplingOptions,
    ThinkingOptions,
    XtcOptions,
)
from mtp_mlx.config import from_yaml, options_for, setting
from mtp_mlx.errors import MTPError

EPILOG = """\b
Examples:
  mtp-mlx chat
  mtp-mlx chat -m ./model --adapter ./adapter --system "Answer in one sentence." --color
  printf 'Why is the sky blue?\\nAnd at night?\\n/stats\\n' | mtp-mlx chat --max-tokens 60
"""
HISTORY_NAME = "chat_history"
HISTORY_LINES = 1000
PROMPT = "> "


@dataclass(frozen=True)
class ChatSettings(
    PrecisionOptions,
    EmissionOptions,
    LearningOptions,
    LoadingOptions,
    DraftingOptions,
    XtcOptions,
    SamplingOptions,
    ThinkingOptions,
    ModelOptions,
):
    """Options of `mtp-mlx chat`; they mean what they mean in `mtp-mlx generate`."""

    system: str | None = setting(None, help="System message", old_option="--system-prompt")
    max_tokens: int = setting(
        512, help="Maximum number of tokens per answer (mlx-lm's -m); -1 = no limit", minimum=-1, flag="-n"
    )
    prefill_step_size: int = setting(2048, help="Tokens of the prompt in a pass", minimum=1)


@click.command(epilog=EPILOG, short_help="Chat with a model in the terminal")
@options_for(ChatSettings)
@click.option("--color", is_flag=True, help="Colour accepted drafts by depth")
def command(color: bool, **options: Any) -> None:
    """Chat with a model: every line is a message, and /help lists the commands.

    The KV cache is kept, so each turn processes only new text. Ctrl-C stops an answer; /quit or Ctrl-D leaves.
    Answers go to stdout, everything else to stderr. In a terminal, the arrow keys recall earlier lines, which are
    kept in the cache folder.
    """
    given = asdict(from_yaml(ChatSettings, None, options))
    learns = given.pop("memory_learn")
    settings = GenerateSettings(**given)
    if settings.system:
        checked_unicode(settings.system, "--system")
    with lines() as read:
        prepare(settings, color, read, learns).run()


def prepare(
    settings: GenerateSettings, color: bool, read: Callable[[], str | None], learns: bool = False
) -> Any:
    """Load the model, refuse options that do not fit it, and return the `Repl` to run."""
    from mtp_mlx.chat_template import check_template
    from mtp_mlx.cli.chat_repl import Chat, Repl
    from mtp_mlx.cli.loading import load_model
    from mtp_mlx.cli.progress import cost_progress
    from mtp_mlx.conversation import Conversation
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.models import resolve_model
    from mtp_mlx.planning.calibrate import prepare_costs
    from mtp_mlx.planning.choose import plan_drafting, settled_layout

    sampling, emission = sampling_of(settings), Emission(settings.emit, settings.tau)
    if not emission.lossless:
        emission.greedy(sampling)
        tell("drafts are not verified: answers are lossy (lossless: false)")
    resolve_model(settings.model, settings.quantize, tell)
    model, tokenizer = load_model(settings, memory_learn=learns)
    sampling = whole_sampling(settings, model, tokenizer)
    if not emission.lossless:
        emission.greedy(sampling)
    if note := recommendation(settings, model):
        click.echo(f"note: {note}", err=True)
    layout = settled_layout(model, settings.layout, settings.lookup, settings.drafter)
    if layout == "auto" and emission == Emission():
        prepare_costs(model, None, tell, cost_progress())
    plan_drafting(
        model, settings.layout, settings.drafts, DecodeStats(), settings.lookup, settings.drafter, emission
    )
    check_template(tokenizer, model.vocab_size)
    if not tokenizer.has_chat_template:
        tell("this tokenizer has no chat template: messages are joined line by line")
    if learns:
        tell(f"answers are added to {settings.memory}, which then holds pieces of them")
    conversation = Conversation(model, tokenizer, settings.system, settings.thinking)
    chat = Chat(model, conversation, settings, {"sampling": sampling, "emission": emission}, color)
    if sys.stdin.isatty():
        tell(f"{settings.model}; /help for commands, /quit to leave")
    return Repl(chat, read)


@contextmanager
def lines() -> Iterator[Callable[[], str | None]]:
    """The function that reads the next line: from a terminal with editing and history, or from a pipe."""
    if not sys.stdin.isatty():
        yield _piped
        return
    with _history():
        yield _typed


def _piped() -> str | None:
    line = (
        sys.stdin.buffer.readline()
    )  # bytes: a decoding error of the text stream would lose the following lines too
    try:
        return line.decode("utf-8").rstrip("\r\n") if line else None
    except UnicodeDecodeError as error:
        raise MTPError(f"the line is not UTF-8 at byte {error.start} and was ignored") from error


def _typed() -> str | None:
    try:
        return checked_unicode(input(PROMPT), "the line")
    except EOFError:
        click.echo()
        return None
    except UnicodeDecodeError as error:
        raise MTPError(f"the line is not UTF-8 at byte {error.start} and was ignored") from error


@contextmanager
def _history() -> Iterator[None]:
    """Line history for the arrow keys, also from earlier sessions, in a file that only the user can read."""
    try:
        import readline
    except ImportError:  # a Python built without it: plain input
        yield
        return
    from mtp_mlx.files import cache_dir, keep_if_possible, kept_file

    earlier = kept_file(HISTORY_NAME)
    if earlier is not None:
        with suppress(OSError):  # missing or unreadable: history is only a convenience
            readline.read_history_file(earlier)

    def keep() -> None:
        path = cache_dir() / HISTORY_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.write_history_file(path)

    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        keep_if_possible(keep, "the lines that were typed")
