"""The loop of `mtp-mlx chat`: reads lines, writes answers, and runs commands that begin with a slash.

Answers go to stdout, everything else to stderr. After an error, reported in one sentence, the conversation continues.
Ctrl-C stops an answer; at the prompt it clears the line.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.cli.generation_report import TINTS, Run, legend, statistics_line, styled
from mtp_mlx.cli.progress import prompt_progress
from mtp_mlx.conversation import Conversation, Turn
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path, write_text
from mtp_mlx.measure import plain_speed
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.context import beyond_context
from mtp_mlx.planning.choose import LAYOUT_NAMES, layout_in_use, plan_drafting, settled_layout

if TYPE_CHECKING:
    from mtp_mlx.cli.options import GenerateSettings

HELP = """\
  /stats        show statistics of the last answer and of all answers
  /color        turn the colouring of accepted drafts on or off
  /layout NAME  switch to auto, linear, quadratic, tree or plain; without a name, show the layout
  /save FILE    save the conversation as a line of JSON that `mtp-mlx train` reads
  /reset        forget the conversation
  /help         show this list
  /quit         leave (also Ctrl-D)
  //text        send a message that begins with a slash
Ctrl-C stops an answer; what was written so far stays in the conversation."""


@dataclass
class Chat:
    """The state of a chat; /layout and /color change `settings` and `color`.

    Attributes:
        options: arguments of `stream_generate` that are not in `settings`: sampling and emission.
    """

    model: AttachedModel
    conversation: Conversation
    settings: GenerateSettings
    options: dict[str, Any]
    color: bool = False


class Repl:
    """Reads and answers lines until there are no more.

    Args:
        chat: the conversation and its settings.
        read: returns the next line without its newline, or None at the end of input. May raise KeyboardInterrupt, and
            MTPError for a line that cannot be read.
    """

    def __init__(self, chat: Chat, read: Callable[[], str | None]) -> None:
        self._chat, self._read = chat, read
        self._saved: set[Path] = set()
        self._noted: set[str] = set()
        self._beyond_context = False  # whether that has been said
        self._commands: dict[str, Callable[[str], bool]] = {
            "stats": self._stats,
            "color": self._color,
            "layout": self._layout,
            "save": self._save,
            "reset": self._reset,
            "help": self._help,
            "quit": lambda _: False,
        }

    def run(self) -> None:
        """Run until /quit or the end of input."""
        try:
            self._run()
        finally:
            texts = self._chat.model.text_source
            if texts is not None and (learnt := texts.close()):
                _say(f"{learnt} tokens of answers were added to the memory.")

    def _run(self) -> None:
        going = True
        while going:
            try:
                line = self._read()
                going = line is not None and self._line(line)
            except KeyboardInterrupt:
                _say("\nTo leave, type /quit or press Ctrl-D.")
            except MTPError as error:
                _say(f"Error: {error}")

    def _line(self, line: str) -> bool:
        """Handle one line; False to leave."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._command(*text[1:].partition(" ")[::2])
        self._answer(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _command(self, name: str, argument: str) -> bool:
        if name in self._commands:
            return self._commands[name](argument.strip())
        near = difflib.get_close_matches(name, self._commands, n=1)
        names = ", ".join(f"/{known}" for known in self._commands)
        raise MTPError(
            f"no command /{name}: " + (f"did you mean /{near[0]}?" if near else f"choose one of {names}")
        )

    # --- answers ------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        chat, settings = self._chat, self._chat.settings
        known = len(chat.conversation.turns)
        responses = chat.conversation.ask(
            text,
            settings.max_tokens,
            layout=settings.layout,
            drafts=settings.drafts,
            lookup=settings.lookup,
            drafter=settings.drafter,
            rows=settings.rows if settings.layout == "tree" else None,
            prefill_step_size=settings.prefill_step_size,
            on_prompt=self._note_context,
            prompt_progress_callback=prompt_progress(),
            **chat.options,
        )
        stopped = False
        try:
            with closing(responses):
                for response in responses:
                    click.echo(styled(response, chat.color), nl=False, color=chat.color or None)
        except KeyboardInterrupt:
            stopped = True
        answers = chat.conversation.turns[known:]
        if answers or stopped:
            click.echo()
        if stopped:
            _say("Stopped." if answers else "Stopped before the first token: the message is not kept.")
        for turn in answers:
            self._notes(turn)

    def _notes(self, turn: Turn) -> None:
        if turn.last is not None and turn.last.finish_reason == "length":
            _say(f"Cut off after {len(turn.tokens)} tokens: raise --max-tokens for longer answers.")
        for reason in turn.stats.fallbacks:
            if reason not in self._noted:
                _say(f"note: {reason}")
            self._noted.add(reason)

    def _note_context(self, tokens: int) -> None:
        """Say, once and before it is read, that a prompt of so many tokens is longer than the model's context."""
        note = beyond_context(self._chat.model.model, tokens)
        if note and not self._beyond_context:
            _say(f"note: {note}")
            self._beyond_context = True

    # --- commands -----------------------------------------------------------------------------------------

    def _stats(self, _: str) -> bool:
        turns = self._chat.conversation.turns
        if not turns:
            raise MTPError("there is no answer yet, so there are no statistics")
        last = turns[-1]
        _say(f"{self._statistics(last)} · {last.prompt_tokens - last.prefilled} prompt tok reused")
        whole = DecodeStats()
        for turn in turns:
            whole.add(turn.stats)
        tokens, prompts = sum(len(turn.tokens) for turn in turns), sum(turn.prompt_tokens for turn in turns)
        restarts = self._chat.conversation.restarts
        _say(
            f"{len(turns)} answers, {tokens} tok, {whole.tokens_per_step:.2f} tok/step, "
            f"{sum(turn.prefilled for turn in turns)} of {prompts} prompt tok prefilled"
            + (f", cache rebuilt {restarts} times" if restarts else "")
        )
        return True

    def _statistics(self, turn: Turn) -> str:
        model, settings = self._chat.model, self._chat.settings
        layout = settled_layout(model, settings.layout, settings.lookup, settings.drafter)
        layout = layout_in_use(model, layout, self._chat.options["emission"])
        known = plain_speed.recall(settings.model, quantize=settings.quantize, context=turn.prompt_tokens)
        run = Run(turn.stats, self._chat.options["sampling"], model.most_drafts, known, layout)
        run.tokens, run.last, run.interrupted = turn.tokens, turn.last, turn.stopped
        return statistics_line(settings, run)

    def _color(self, _: str) -> bool:
        self._chat.color = not self._chat.color
        _say(f"colour is {'on' if self._chat.color else 'off'}")
        if self._chat.color:
            click.echo(legend(self._chat.model.most_drafts or len(TINTS)), err=True, color=True)
        return True

    def _layout(self, name: str) -> bool:
        if not name:
            _say(f"layout {self._chat.settings.layout}")
            return True
        known = {str(layout): layout for layout in LAYOUT_NAMES}
        if name not in known:
            raise MTPError(f"unknown layout '{name}': choose one of {', '.join(known)}")
        settings = replace(self._chat.settings, layout=known[name])
        plan_drafting(
            self._chat.model,
            settings.layout,
            settings.drafts,
            DecodeStats(),
            settings.lookup,
            settings.drafter,
            self._chat.options["emission"],
        )
        self._chat.settings = settings
        _say(f"layout {name}")
        return True

    def _save(self, name: str) -> bool:
        if not name:
            raise MTPError("name a file: /save FILE")
        messages = self._chat.conversation.messages
        if not self._chat.conversation.turns:
            raise MTPError("the conversation is empty: there is nothing to save")
        path = user_path(name)
        if path.exists() and path.resolve() not in self._saved:
            raise MTPError(f"{path} already exists: choose another name, or remove it first")
        write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        self._saved.add(path.resolve())
        _say(f"{len(messages)} messages -> {path}")
        return True

    def _reset(self, _: str) -> bool:
        self._chat.conversation.reset()
        _say("Conversation forgotten.")
        return True

    def _help(self, _: str) -> bool:
        _say(HELP)
        return True


def _say(text: str) -> None:
    click.echo(text, err=True)
