"""Damaged inputs for `test_damaged_inputs.py`: every verb that reads one must refuse it in one sentence.

An entry names what is damaged, how, and what the message must say. To add one, add a line to `DAMAGES`: the verbs
that read what is damaged (`READERS`) are tried with it, or those named in the entry. New kinds of input get a reader
there and, if need be, a verb in the test. Damaged GGUF files are in `damage_gguf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.cli.damage_edits import (
    Edit,
    another,
    another_model,
    answer,
    cache_of,
    chat,
    config,
    cut,
    drafts_beyond,
    folder_with,
    holds,
    in_shards,
    lacks,
    more_tokens,
    no_layers,
    nothing,
    only_torch,
    other_states,
    template,
    tensors,
    tokenizer_config,
    write_rows,
    write_rows_text,
)

What = Literal["model", "template", "rows", "adapter", "gguf", "cache", "options"]

GENERATING = ("generate", "chat", "serve", "bench", "eval", "tune")
LOADING = (*GENERATING, "chat app")
READERS: dict[What, tuple[str, ...]] = {
    "model": (*GENERATING, "train", "distill", "info", "draft model", "notes", "chat app"),
    "template": (*GENERATING, "train", "distill", "notes"),
    "rows": ("train", "distill"),
    "adapter": (*GENERATING, "plan", "info", "push", "train from", "chat app"),
    "gguf": ("convert", "convert to 4 bits", "convert plan"),
    "cache": ("prompt cache",),
    "options": ("generate", "serve"),
}


@dataclass(frozen=True)
class Damage:
    """A damaged input.

    Attributes:
        name: in words.
        what: what is damaged.
        edit: damages it: gets the model's folder, the file of rows, or the place of an adapter folder, GGUF file or
            prompt cache.
        says: what the message must contain.
        verbs: that read it, if not those of `READERS`.
        options: added to the command line.
        given: name of the GGUF file that is given.
    """

    name: str
    what: What
    edit: Edit
    says: str
    verbs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    given: str = "model.gguf"

    @property
    def readers(self) -> tuple[str, ...]:
        """The verbs that are tried with it."""
        return self.verbs or READERS[self.what]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 3, "group_size": 32}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
PICTURE = [{"type": "image_url", "image_url": {"url": "x"}}]

DAMAGES = [
    # config.json
    Damage("unknown model type", "model", config(model_type="frob"), "no model type 'frob'"),
    Damage("model type of a module", "model", config(model_type="cache"), "no model type 'cache'"),
    Damage("no model type", "model", config(model_type=...), "has no model_type"),
    Damage("model type a number", "model", config(model_type=5), "model_type 5, which is no text"),
    Damage("config cut off", "model", holds("config.json", "{"), "config.json is not JSON"),
    Damage("config in Latin-1", "model", holds("config.json", b'{"a": "\xe9"}'), "config.json is not JSON"),
    Damage("config a list", "model", holds("config.json", "[]"), "config.json holds a list"),
    Damage(
        "layers a text", "model", config(num_hidden_layers="two"), '"num_hidden_layers" is "two", a whole'
    ),
    Damage("layers missing", "model", config(num_hidden_layers=...), 'has no "num_hidden_layers"'),
    Damage("heads 0", "model", config(num_attention_heads=0), '"num_attention_heads" is 0'),
    Damage("heads 5", "model", config(num_attention_heads=5), "q_proj.weight is (64, 48), (80, 48) expected"),
    Damage("theta a text", "model", config(rope_theta="x"), '"rope_theta" is "x", a number'),
    Damage("scaling a list", "model", config(rope_scaling=[1]), '"rope_scaling" is [1], an object or null'),
    Damage("scaling unknown", "model", config(rope_scaling={"type": "frob"}), "Unsupported RoPE type frob"),
    Damage("vocabulary below 0", "model", config(vocab_size=-1), '"vocab_size" is -1'),
    Damage("eos a text", "model", config(eos_token_id="x"), "eos_token_id"),
    Damage("generation a list", "model", holds("generation_config.json", "[]"), "holds a list"),
    Damage(
        "ends a text", "model", holds("generation_config.json", '{"eos_token_id": "a"}'), "is 'a', a token"
    ),
    Damage("quantisation without groups", "model", config(quantization={"bits": 4}), 'has no "group_size"'),
    Damage("code of its own", "model", config(model_file="own.py"), "runs code of its own (own.py)"),
    # weights
    Damage("no weights", "model", lacks("model.safetensors"), "it has no weights"),
    Damage("weights of PyTorch", "model", only_torch, "convert it first with `mtp-mlx convert"),
    Damage("weights cut off", "model", cut("model.safetensors"), "model.safetensors is cut off or damaged"),
    Damage(
        "weights empty", "model", holds("model.safetensors", ""), "model.safetensors is cut off or damaged"
    ),
    Damage("weights a pointer", "model", holds("model.safetensors", POINTER), "run `git lfs pull`"),
    Damage("tokenizer a pointer", "model", holds("tokenizer.json", POINTER), "run `git lfs pull`"),
    Damage("a shard missing", "model", in_shards, "model-00002-of-00002.safetensors of model"),
    Damage("a tensor too many", "model", tensors(lambda w: w.update(x=w[WEIGHT])), "has no place for x"),
    Damage("a tensor missing", "model", tensors(lambda w: w.pop(WEIGHT)), f"its weights lack {WEIGHT}"),
    Damage(
        "a tensor cut", "model", tensors(lambda w: w.update({WEIGHT: w[WEIGHT][1:]})), "is (63, 48), (64, 48)"
    ),
    Damage("AWQ", "model", config(quantization_config=AWQ), "quantised by AWQ in a form that mlx-lm"),
    Damage("GPTQ", "model", config(quantization_config=GPTQ), "quantised by GPTQ in a form that mlx-lm"),
    # the tokenizer
    Damage(
        "no tokenizer", "model", lacks("tokenizer.json", "tokenizer_config.json"), "it has no tokenizer: copy"
    ),
    Damage("tokenizer cut off", "model", cut("tokenizer.json"), "tokenizer.json is not JSON"),
    Damage("tokenizer's config a list", "model", holds("tokenizer_config.json", "[]"), "holds a list"),
    Damage(
        "unknown tool parser",
        "model",
        tokenizer_config(tool_parser_type="frob"),
        '"tool_parser_type" is "frob"',
    ),
    # chat templates
    Damage("template cut off", "template", template("{% for x %}"), "chat template does not parse (line 1"),
    Damage(
        "template with an unknown filter", "template", template("{{ a | frob }}"), "does not parse (line 1"
    ),
    Damage(
        "template that raises",
        "template",
        template("{{ raise_exception('no') }}"),
        "rejects these messages: no",
    ),
    Damage(
        "template that divides by 0", "template", template("{{ 1 / 0 }}"), "rejects these messages: division"
    ),
    Damage("token without a row", "template", more_tokens, "has the token '<extra>', whose id is 157"),
    # rows
    Damage(
        "ids beyond the vocabulary",
        "rows",
        write_rows({"prompt": "a", "response": "b", "response_tokens": [5, 6, 999999, 7]}),
        "line 1: the row has the token id 999999, which is outside the vocabulary",
        verbs=("train",),
    ),
    Damage("rows missing", "rows", Path.unlink, "cannot be read"),
    Damage("rows empty", "rows", write_rows(), "the file is empty"),
    Damage("rows cut off", "rows", write_rows_text('{"prompt": "a", "resp'), "line 1: truncated"),
    Damage("rows of numbers", "rows", write_rows(5), "line 1: a JSON object is needed, this is a number"),
    Damage("content missing", "rows", chat(), '[0] has no "content"'),
    Damage("content null", "rows", chat(content=None), '[0] has no "content"'),
    Damage(
        "content a number", "rows", chat(content=5), '[0]: "content" must be a string, but its type is number'
    ),
    Damage("content a picture", "rows", chat(content=PICTURE), "a part of type 'image_url'"),
    Damage(
        "calls a text", "rows", chat(content="a", tool_calls="x"), '"tool_calls" must be a list of objects'
    ),
    Damage(
        "calls that the template leaves out", "rows", chat(content="a", tool_calls=[CALL]), "tool call 'look'"
    ),
    Damage(
        "an answer of null",
        "rows",
        answer({"role": "assistant", "content": None}),
        '[1] has no "content"',
        verbs=("train",),
    ),
    Damage(
        "an answer of calls that the template leaves out",
        "rows",
        answer({"role": "assistant", "tool_calls": [CALL]}),
        "writes nothing of the tool call 'look'",
        verbs=("train",),
    ),
    # adapters
    Damage("no such adapter", "adapter", nothing, "there is no such folder", verbs=(*LOADING, "plan")),
    Damage(
        "LoRA of mlx-lm", "adapter", folder_with(adapter_config={"fine_tune_type": "lora"}), "mlx_lm.fuse"
    ),
    Damage("PEFT", "adapter", folder_with(adapter_config={"peft_type": "LORA"}), "is a PEFT adapter"),
    Damage(
        "empty adapter folder",
        "adapter",
        folder_with(),
        "it has no mtp_config.json",
        verbs=(*LOADING, "plan"),
    ),
    Damage("a model as adapter", "adapter", another_model, "is a model folder", verbs=(*GENERATING, "plan")),
    Damage("drafts beyond", "adapter", drafts_beyond, "damaged: its draft vocabulary has", verbs=LOADING),
    Damage("adapter's config a list", "adapter", folder_with(mtp_config=[]), "mtp_config.json is damaged"),
    # quantised keys and values
    Damage(
        "heads of 16 in groups of 64",
        "options",
        nothing,
        "keys and values of 16 numbers cannot be quantised in groups of 64: leave --kv-bits out",
        options=("--kv-bits", "4"),
    ),
    Damage(
        "heads of 96 in groups of 64",
        "options",
        another("qwen3", head_dim=96),
        "numbers cannot be quantised in groups of 64: use --kv-group-size 32",
        options=("--kv-bits", "4"),
    ),
    Damage(
        "heads of 64 in groups of 128",
        "options",
        another("llama", head_dim=64),
        "numbers cannot be quantised in groups of 128: use --kv-group-size 64",
        options=("--kv-bits", "8", "--kv-group-size", "128", "--quantized-kv-start", "0"),
    ),
    Damage(
        "windows that cannot be quantised",
        "options",
        another("gemma3_text"),
        "this model has sliding-window layers",
        options=("--kv-bits", "8"),
    ),
    # prompt caches
    Damage("a cache without layers", "cache", no_layers, "`prompt_cache` has 0 layers and this model 2"),
    Damage("a cache of more layers", "cache", cache_of("qwen3", num_hidden_layers=3), "has 3 layers and"),
    Damage(
        "a cache of other heads",
        "cache",
        cache_of("qwen3", head_dim=32),
        "holds 2 heads of 32 and 32 numbers, this model 2 heads of 16 and 16 numbers: make one",
    ),
    Damage(
        "a cache of more heads",
        "cache",
        cache_of("qwen3", num_key_value_heads=4),
        "holds 4 heads of 16 and 16 numbers, this model 2 heads of 16",
    ),
    Damage(
        "a cache of recurrent layers",
        "cache",
        cache_of("olmo_hybrid"),
        "of `prompt_cache` is of another kind of model",
    ),
    Damage(
        "a cache of other recurrent layers",
        "cache",
        other_states,
        "holds a state of 1 x 3 x 96, 1 x 4 x 12 x 12 numbers, this model a state of",
    ),
]
