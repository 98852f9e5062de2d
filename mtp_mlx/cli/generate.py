"""`mtp-mlx generate`: write text to stdout and one line of statistics to stderr.

Nothing but the text (or, with --json, one object) goes to stdout.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.cli.generation_report import Run, histograms, legend, report, statistics_line, styled
from mtp_mlx.cli.options import GenerateSettings
from mtp_mlx.config import from_yaml, options_for, to_dict
from mtp_mlx.distributed import launched_rank, launched_size
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.api import GenerationResponse
    from mtp_mlx.decode.pick import SamplingConfig
    from mtp_mlx.distributed import Peers
    from mtp_mlx.model.attach import AttachedModel

OPEN = ("temp", "top_k", "top_p", "min_p", "repetition_penalty")  # options that --sampling model fills
TEMPLATED = ("system", "thinking", "prefill_response", "chat_template_config")  # need the chat template

EPILOG = """\b
Examples:
  mtp-mlx generate --prompt "Why is the sky blue?"
  mtp-mlx generate -m ./model --adapter ./adapter --prompt-file question.txt --temp 0.7
  mlx.launch -n 2 -- mtp-mlx generate -m ./model --prompt "Why is the sky blue?"
  cat notes.txt | mtp-mlx generate --raw --max-tokens 50 --color --histogram
"""


@click.command(epilog=EPILOG, short_help="Write text, several tokens per forward pass")
@options_for(GenerateSettings)
@click.option(
    "--raw", "--ignore-chat-template", "raw", is_flag=True, help="Use the prompt without the chat template"
)
@click.option("--color", is_flag=True, help="Colour accepted drafts by depth")
@click.option("--histogram", is_flag=True, help="Show bar charts of tokens per step and acceptance")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text")
@click.pass_context
def command(
    context: click.Context, raw: bool, color: bool, histogram: bool, as_json: bool, **options: Any
) -> None:
    """Write the text that follows a prompt, exactly as mlx-lm alone would write it.

    The prompt comes from --prompt, --prompt-file or stdin.
    """
    from mtp_mlx.distributed import join

    settings = from_yaml(GenerateSettings, None, _with_model_of_cache(options))
    prompt = read_prompt(settings, raw)
    peers = join()
    run = generate(settings, prompt, raw, _Printer(peers.leads and not as_json, color=color), peers)
    if not peers.leads:
        context.exit(130 if run.interrupted else 0)
    if as_json:
        click.echo(json.dumps(report(settings, run)))
    if color and not as_json and (deepest := max(run.most_drafts, len(run.stats.accepted))):
        click.echo(legend(deepest), err=True, color=True)
    if histogram:
        click.echo(histograms(run.stats), err=True)
    for reason, count in run.stats.fallbacks.items():
        click.echo(f"note: {reason}" + (f" ({count} times)" if count > 1 else ""), err=True)
    click.echo(statistics_line(settings, run), err=True)
    if run.interrupted:
        context.exit(130)


def _with_model_of_cache(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the model that a prompt cache was made for if none is named, as in mlx-lm."""
    if options.get("model") is not None or options.get("prompt_cache_file") is None:
        return options
    from mtp_mlx.files import user_path
    from mtp_mlx.prompt_cache import describe

    try:
        found = describe(user_path(str(options["prompt_cache_file"]))).model
    except ValueError:  # whoever reads all of it says what is wrong
        return options
    return {**options, "model": found or None}


def read_prompt(settings: Any, raw: bool) -> str:
    """The prompt, from the option, the file or stdin.

    Args:
        settings: with `prompt`, `prompt_file` and `system`, and possibly other options of `TEMPLATED`.
        raw: whether it is used without the chat template.

    Raises:
        MTPError: if there is no prompt, more than one, an empty one, or one that is not UTF-8.
    """
    if settings.prompt is not None and settings.prompt_file is not None:
        raise MTPError("both --prompt and --prompt-file were given: give one of them")
    given = [name for name in TEMPLATED if getattr(settings, name, None) not in (None, "auto")]
    if raw and given:
        option = f"--{given[0].replace('_', '-')}"
        raise MTPError(f"{option} needs the chat template, which --raw leaves out: give only one of them")
    text = _given_text(settings)
    if not raw:
        text = text.rstrip("\n")
    if not (text if raw else text.strip()):
        raise MTPError("the prompt is empty: give some text")
    checked_unicode(text, "the prompt")
    for name in ("system", "prefill_response"):
        if getattr(settings, name, None):
            checked_unicode(getattr(settings, name), f"--{name.replace('_', '-')}")
    return text


def _given_text(settings: Any) -> str:
    """The text of `--prompt`, of `--prompt-file` or of stdin."""
    if settings.prompt_file is not None:
        try:
            text = settings.prompt_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MTPError(f"{settings.prompt_file} is not UTF-8 at byte {error.start}") from error
    elif settings.prompt is not None and settings.prompt != "-":
        text = settings.prompt
    elif launched_size() > 1:
        raise MTPError(
            "the prompt cannot come from stdin under mlx.launch: give --prompt TEXT or --prompt-file FILE"
        )
    elif settings.prompt == "-" or not sys.stdin.isatty():
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise MTPError(f"stdin is not UTF-8 at byte {error.start}") from error
    else:
        raise MTPError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
    return text


def checked_unicode(text: str, what: str) -> str:
    """Return `text`, refusing what was decoded from bytes that are not UTF-8.

    Raises:
        MTPError: if `text` has surrogates, which stand for such bytes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MTPError(f"{what} is not UTF-8 at character {error.start}") from error
    return text


# --- one run ------------------------------------------------------------------------------------------------


class _Printer:
    """Streams text to stdout, coloured or not."""

    def __init__(self, streaming: bool, color: bool) -> None:
        self._streaming, self._color = streaming, color

    def token(self, response: GenerationResponse) -> None:
        """Write the text that this token completes."""
        if not self._streaming or not response.text:
            return
        click.echo(styled(response, self._color), nl=False, color=self._color or None)

    def end(self) -> None:
        """Write a newline after the text."""
        if self._streaming:
            click.echo()


def generate(
    settings: GenerateSettings, prompt: str, raw: bool, printer: _Printer, peers: Peers | None = None
) -> Run:
    """Load the model, decode and print; Ctrl-C ends the text and sets `interrupted`."""
    from mtp_mlx.answer_parts import told_apart
    from mtp_mlx.api import stream_generate
    from mtp_mlx.cli.loading import load_model, speed_name
    from mtp_mlx.cli.progress import cost_progress, prompt_progress
    from mtp_mlx.decode.emission import Emission
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.measure import plain_speed
    from mtp_mlx.models import resolve_model
    from mtp_mlx.planning.calibrate import prepare_costs
    from mtp_mlx.planning.choose import layout_in_use, settled_layout

    sampling = sampling_of(settings)
    emission = Emission(settings.emit, settings.tau, settings.first_token_sampling)
    if not emission.lossless:
        emission.greedy(sampling)  # refuses these settings before the model is loaded
    resolve_model(settings.model, settings.quantize, tell)
    model, tokenizer = load_model(settings, peers=peers)
    sampling = whole_sampling(settings, model, tokenizer)
    cache, before = _prompt_cache(settings, model)
    ids = _prompt_ids(tokenizer, prompt, settings, raw)
    _same_work(model, settings, ids, sampling)
    known = plain_speed.recall(speed_name(settings), quantize=settings.quantize, context=len(ids))
    layout = settled_layout(model, settings.layout, settings.lookup, settings.drafter)
    run = Run(DecodeStats(), sampling, model.most_drafts, known, layout_in_use(model, layout, emission))
    _say_notes(run, settings, model, None if raw else tokenizer, len(ids))
    if layout == "auto" and emission == Emission():
        prepare_costs(model, settings.max_tokens, tell, cost_progress())
    responses = stream_generate(
        model,
        tokenizer,
        ids,
        settings.max_tokens,
        sampling=sampling,
        layout=layout,
        drafts=settings.drafts,
        lookup=settings.lookup,
        emission=emission,
        drafter=settings.drafter,
        rows=settings.rows,
        stop=settings.stop,
        stats=run.stats,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
        max_kv_size=settings.max_kv_size,
        prefill_step_size=settings.prefill_step_size,
        prompt_cache=cache,
        prefix=before,
        prompt_progress_callback=prompt_progress(),
    )
    _consume(responses, run, printer)
    run.parts = told_apart(tokenizer, ids, run.text)
    run.kernels = {} if model.kernels is None else model.kernels.report()
    if model.peers.alone:  # several processes together say nothing about the speed of this machine
        _remember_plain_speed(settings, run)
    return run


def _prompt_cache(settings: GenerateSettings, model: AttachedModel) -> tuple[list[Any] | None, list[int]]:
    """(the cache of `--prompt-cache-file`, its token ids as far as known), or (None, [])."""
    from mtp_mlx import prompt_cache
    from mtp_mlx.decode.cache_check import check_prompt_cache

    if settings.prompt_cache_file is None:
        return None, []
    if settings.max_kv_size is not None:
        raise MTPError(
            "--max-kv-size is for new caches: give it to cache-prompt, and leave it out with --prompt-cache-file"
        )
    if not model.peers.alone:
        raise MTPError("a prompt cache needs a single process: leave `prompt_cache_file` out")
    cache, before = prompt_cache.read(settings.prompt_cache_file)
    check_prompt_cache(model, cache)
    return cache, before


def _prompt_ids(tokenizer: Any, prompt: str, settings: GenerateSettings, raw: bool) -> list[int]:
    """Token ids of the prompt, in the chat template unless `raw`."""
    from mtp_mlx.api import chat_prompt, encode_prompt

    if raw:
        return encode_prompt(tokenizer, prompt)
    return chat_prompt(
        tokenizer,
        prompt,
        settings.system,
        settings.thinking,
        begin=settings.prefill_response,
        options=_template_options(settings.chat_template_config),
        behind=settings.prompt_cache_file is not None,
    )


def _template_options(text: str | None) -> dict[str, Any]:
    """The variables in a JSON object.

    Raises:
        MTPError: if it is none.
    """
    try:
        options = {} if text is None else json.loads(text)
    except ValueError as error:
        raise MTPError(f"--chat-template-config is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise MTPError('--chat-template-config must be a JSON object, such as {"enable_thinking": false}')
    return options


def _say_notes(
    run: Run, settings: GenerateSettings, model: AttachedModel, tokenizer: Any | None, n_prompt: int
) -> None:
    """Says what the user should know before the text; `tokenizer` only if its chat template is used."""
    from mtp_mlx.model.context import beyond_context

    if note := recommendation(settings, model):
        run.stats.notes.append(note)
    if tokenizer is not None:
        _note_template(run, model, tokenizer)
    for said in (*run.stats.notes, beyond_context(model.model, n_prompt)):
        if said is not None and model.peers.leads:
            click.echo(f"note: {said}", err=True)


def _note_template(run: Run, model: AttachedModel, tokenizer: Any) -> None:
    """Note a missing chat template, or a model that is meant to be prompted without one."""
    if not tokenizer.has_chat_template:
        run.stats.fallbacks["this tokenizer has no chat template: the prompt was used as is"] += 1
    if str(getattr(model.info, "mask", {}).get("prompt", "")).startswith("raw"):
        note = "this model was made to be prompted without the chat template: --raw may give better text"
        run.stats.notes.append(note)


def _remember_plain_speed(settings: GenerateSettings, run: Run) -> None:
    """Remember the speed of a complete plain run, for comparison with later runs."""
    from mtp_mlx.cli.loading import speed_name
    from mtp_mlx.measure import plain_speed

    if settings.layout == "plain" and settings.kv_bits is None and run.tok_per_s and not run.interrupted:
        context = run.last.prompt_tokens if run.last else 0
        plain_speed.remember(
            speed_name(settings), run.tok_per_s, len(run.tokens), quantize=settings.quantize, context=context
        )


def sampling_of(settings: GenerateSettings, recommended: SamplingConfig | None = None) -> SamplingConfig:
    """The sampling configuration of these settings.

    Args:
        recommended: by the model; used where `--sampling model` asks for it.
    """
    from mtp_mlx.decode.pick import SamplingConfig

    base = SamplingConfig() if recommended is None or settings.sampling is None else recommended
    given = {"temperature" if name == "temp" else name: getattr(settings, name) for name in OPEN}
    return replace(
        base,
        repetition_context_size=settings.repetition_context_size,
        min_tokens_to_keep=settings.min_tokens_to_keep,
        xtc_probability=settings.xtc_probability,
        xtc_threshold=settings.xtc_threshold,
        logit_bias=tuple(_bias(text) for text in settings.logit_bias),
        seed=settings.seed,
        noise=settings.noise,
        **{name: value for name, value in given.items() if value is not None},
    )


def recommendation(settings: Any, model: AttachedModel) -> str | None:
    """What to say of the sampling that the model recommends, or None.

    Args:
        settings: with the options of `SamplingOptions`, or some of them.
    """
    from mtp_mlx.recommended import in_words

    wanted, found = settings.sampling == "model", model.recommended_sampling
    if found is None:
        return "the model recommends no sampling, so --sampling model changes nothing" if wanted else None
    if wanted:
        return f"sampling as the model recommends: {in_words(found)}"
    if any(getattr(settings, name, None) is not None for name in OPEN):
        return None
    return f"greedy; the model recommends {in_words(found)}, which --sampling model uses"


def whole_sampling(settings: GenerateSettings, model: AttachedModel, tokenizer: Any) -> SamplingConfig:
    """The sampling of these settings for a model."""
    from mtp_mlx.token_ids import spared_by_xtc

    sampling = sampling_of(settings, model.recommended_sampling)
    return replace(sampling, xtc_special_tokens=spared_by_xtc(tokenizer))


def _bias(text: str) -> tuple[int, float]:
    """The id and the bias in a text like "50=-2.5".

    Raises:
        MTPError: if it is not like that.
    """
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise MTPError(
            f"--logit-bias {text!r} must be a token id, =, and a number, such as 50=-2.5"
        ) from error


def _same_work(
    model: AttachedModel, settings: GenerateSettings, prompt: list[int], sampling: SamplingConfig
) -> None:
    """Raise MTPError if processes that share a model were given different commands."""
    adapter = None if model.info is None else model.info.base_fingerprint
    given = {**to_dict(settings), "the prompt's ids": prompt, "the adapter's base": adapter}
    given["the sampling"] = str(sampling)
    given.pop("prompt_file")  # its path may differ between machines
    model.peers.must_agree(given, "start all of them with the same command")


def tell(stage: str) -> None:
    """Report a slow stage on stderr, from the first process only."""
    if launched_rank() == 0:
        click.echo(f"{stage} ...", err=True)


def _consume(responses: Any, run: Run, printer: _Printer) -> None:
    try:
        with closing(responses):
            for response in responses:
                run.last = response
                run.tokens.append(response.token)
                run.text += response.text
                printer.token(response)
    except KeyboardInterrupt:
        run.interrupted = True
    printer.end()
