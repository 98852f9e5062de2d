"""Proves that rows become the ids that decoding would produce, and that errors name file and line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

from mtp_mlx.chat_template import chat_ids
from mtp_mlx.errors import MTPError
from mtp_mlx.train.data import (
    DataReport,
    Example,
    fingerprint,
    load_examples,
    load_splits,
    split_held_out,
)
from mtp_mlx.train.messages import end_of_turn_id
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
HEAD = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(tmp_path, row, **options):
    (example,), _ = load_examples(write(tmp_path / "d.jsonl", row), TOKENIZER, 512, **options)
    return example


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "response": "The sky."},
        {"prompt": "Hi", "completion": "The sky."},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The sky."}]},
    ],
)
def test_every_chat_format_gives_template_then_response_then_end_of_turn(tmp_path, row):
    example = only(tmp_path, row)
    assert TOKENIZER.decode(example.tokens) == HEAD + "The sky.<|im_end|>"
    assert example.loss_start == len(ids(HEAD))
    assert example.tokens == [*ids(HEAD), *ids("The sky."), END]
    assert only(tmp_path, {**row, "finished": False}).tokens == example.tokens[:-1]
    assert only(tmp_path, {**row, "finished": True}) == example


def test_the_last_of_several_turns_is_the_response(tmp_path):
    turns = ["user", "Hi", "assistant", "The sun.", "user", "More", "assistant", "The sky."]
    messages = [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2])]
    messages.insert(0, {"role": "system", "content": "Rest"})
    example = only(tmp_path, {"messages": messages})
    text = TOKENIZER.decode(example.tokens)
    assert text.startswith("<|im_start|>system\nRest<|im_end|>") and "Be brief" not in text
    assert TOKENIZER.decode(example.tokens[example.loss_start :]) == "The sky.<|im_end|>"


def test_text_counts_every_position_and_ends_with_eos(tmp_path):
    example = only(tmp_path, {"text": "The quick fox"})
    assert example == Example([*ids("The quick fox"), END], 0)
    assert only(tmp_path, {"text": "The quick fox<|im_end|>"}) == example
    assert only(tmp_path, {"text": "The quick fox", "finished": False}).tokens == example.tokens[:-1]


def test_a_row_may_weigh_more(tmp_path):
    row = {"prompt": "Hi", "completion": "the quick brown fox"}
    plain, heavy = only(tmp_path, row), only(tmp_path, {**row, "weight": 2})
    assert plain.weight == 1 and heavy.weight == 2 and heavy.tokens == plain.tokens
    assert fingerprint([plain]) != fingerprint([heavy])
    cut, report = load_examples(
        write(tmp_path / "cut.jsonl", {**row, "weight": 2}), TOKENIZER, len(plain) - 1
    )
    assert cut[0].weight == 2 and report.truncated == 1
    for wrong in (0, -1, "2", True, None, float("inf")):
        with pytest.raises(MTPError, match='line 1: "weight" must be a positive number'):
            only(tmp_path, {**row, "weight": wrong})


def test_response_tokens_are_used_as_they_are(tmp_path):
    letters = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "the"]
    assert letters != ids("the")
    example = only(tmp_path, {"prompt": "Hi", "response": "the", "response_tokens": letters})
    assert example.tokens[example.loss_start :] == [*letters, END]
    silent = only(tmp_path, {"prompt": "Hi", "response": "", "response_tokens": [], "finished": True})
    assert silent.tokens[silent.loss_start :] == [END]


def test_long_answers_of_files_without_finished_count_as_cut(tmp_path):
    row = {"prompt": "Hi", "response": "The sky is blue"}
    length = len(ids(row["response"]))
    assert only(tmp_path, row, cut_at_tokens=length).tokens[-1] != END
    assert only(tmp_path, row, cut_at_tokens=length + 1).tokens[-1] == END
    assert only(tmp_path, {**row, "finished": True}, cut_at_tokens=1).tokens[-1] == END


def test_a_tokenizer_without_template_encodes_the_bare_prompt(tmp_path):
    bare = tiny_tokenizer(chat_template=None)
    path = write(tmp_path / "d.jsonl", {"prompt": "Hi", "completion": " the sky"})
    (example,), _ = load_examples(path, bare, 99)
    assert example == Example([*ids("Hi"), *ids(" the sky"), END], len(ids("Hi")))
    path = write(
        tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}
    )
    with pytest.raises(MTPError, match="line 1"):
        load_examples(path, bare, 99)


def test_end_of_turn_is_what_the_template_writes():
    assert end_of_turn_id(TOKENIZER) == END
    other = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    assert end_of_turn_id(other) == END  # not an eos of this tokenizer
    other.add_eos_token("<|endoftext|>")
    assert end_of_turn_id(other) == other.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_turn_id(tiny_tokenizer(chat_template="{{ raise_exception('no') }}")) == END


@pytest.mark.parametrize(
    "wrap", [list, lambda i: BatchEncoding({"input_ids": i}), lambda i: BatchEncoding({"input_ids": [i]})]
)
def test_a_template_may_return_a_batch_encoding(wrap):
    class Renderer:
        def apply_chat_template(self, messages, add_generation_prompt):
            assert add_generation_prompt
            return wrap([3, 1, 4])

    assert chat_ids(Renderer(), [{"role": "user", "content": "a"}]) == [3, 1, 4]


# --- lengths, folders, held-out rows ------------------------------------------------------------------------


def test_long_rows_are_cut_and_counted(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "Hi", "response": "The sky."},
        {"prompt": "Hi", "response": "The sky is blue " * 9},
        {"prompt": "The sky is blue " * 99, "response": "Hi"},
    )
    prompt = len(ids(HEAD))
    limit = prompt + len(ids("The sky.")) + 1
    examples, report = load_examples(path, TOKENIZER, limit)
    assert [len(example) for example in examples] == [limit, limit]
    assert report == DataReport(3, 1, 1, 2 * limit, 2 * (limit - prompt), [str(path)])
    assert "1 rows truncated" in str(report) and "1 rows dropped" in str(report)
    with pytest.raises(MTPError, match="Raise `max_length`"):
        load_examples(path, TOKENIZER, 2)


def test_a_folder_is_train_and_valid(tmp_path):
    rows = [{"text": f"The fox {number}"} for number in range(8)]
    write(tmp_path / "train.jsonl", *rows)
    alone = load_splits(tmp_path, TOKENIZER, 99, held_out=2, seed=5)
    assert (len(alone.train), len(alone.held_out), alone.report.rows) == (6, 2, 8)
    write(tmp_path / "valid.jsonl", *rows[:3])
    both = load_splits(tmp_path, TOKENIZER, 99, held_out=2, seed=5)
    assert (len(both.train), len(both.held_out), both.report.rows) == (8, 2, 11)
    assert load_splits(tmp_path / "train.jsonl", TOKENIZER, 99, held_out=2, seed=5).train == alone.train


def test_few_rows_hold_out_a_tenth_unless_told(tmp_path):
    def sizes(rows: int, held_out: int | None = None) -> tuple[int, int]:
        path = write(tmp_path / "data.jsonl", *({"text": f"The fox {number}"} for number in range(rows)))
        splits = load_splits(path, TOKENIZER, 99, held_out=held_out, seed=5)
        return len(splits.train), len(splits.held_out)

    assert [sizes(rows) for rows in (5, 20, 400)] == [(5, 0), (18, 2), (368, 32)]
    assert sizes(20, 7) == (13, 7)
    write(tmp_path / "train.jsonl", *({"text": f"The fox {number}"} for number in range(3)))
    write(tmp_path / "valid.jsonl", *({"text": f"The fox {number}"} for number in range(40)))
    assert len(load_splits(tmp_path, TOKENIZER, 99, held_out=None, seed=5).held_out) == 32


@given(st.integers(1, 60), st.data())
def test_held_out_rows_are_a_part_that_depends_on_the_seed_alone(total, data):
    n, seed = data.draw(st.integers(0, total - 1)), data.draw(st.integers(-5, 2**70))
    examples = [Example([number], 0) for number in range(total)]
    train, held_out = split_held_out(examples, n, seed)
    assert len(held_out) == n and (train, held_out) == split_held_out(examples, n, seed)
    assert sorted(train + held_out, key=lambda example: example.tokens) == examples
    with pytest.raises(MTPError, match="`held_out` is"):
        split_held_out(examples, total, seed)


def test_fingerprint_changes_with_every_part():
    base = [Example([1, 2, 3], 1), Example([4], 0)]
    variants = [base, base[::-1], [Example([1, 2, 3], 2), base[1]], [Example([1, 2], 1), Example([3, 4], 0)]]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    assert fingerprint(base) == fingerprint(list(base))


# --- errors -------------------------------------------------------------------------------------------------

GOOD = b'{"text": "The sky"}\n'


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "The s', ["truncated", "Delete this line"]),
        (b'{"text": "The s\n', ["invalid JSON at column"]),
        (b"{'text': 1}\n", ["invalid JSON at column 2"]),
        (b'{"text": "\xff"}\n', ["not UTF-8 at byte 10"]),
        (b'{"text": "\\ud800"}\n', ["half of a surrogate pair"]),
        (b'{"text": ' + b"[" * 100_000 + b"\n", ["cannot be read"]),
        (b'{"text": ' + b"9" * 6_000 + b"}\n", ["cannot be read"]),
        (b"[1]\n", ["a JSON object is needed, this is a list"]),
        (b'{"txt": "a"}\n', ["no known format", "['txt']", '"completion"']),
        (b"{}\n", ["no known format", "no fields"]),
        (b'{"prompt": "a"}\n', ["no known format"]),
        (b'{"text": 3}\n', ['"text" must be a string, but its type is number']),
        (b'{"text": " "}\n', ['"text" is empty']),
        (b'{"prompt": 3, "response": "a"}\n', ['"prompt" must be a string']),
        (b'{"prompt": "a", "completion": null}\n', ['"completion" must be a string, but its type is null']),
        (b'{"prompt": "a", "response": ""}\n', ["response is empty"]),
        (
            b'{"prompt": "a", "response": "b", "response_tokens": "c"}\n',
            ["must be a list, but its type is string"],
        ),
        (b'{"prompt": "a", "response": "b", "response_tokens": [1.5]}\n', ["list of token ids"]),
        (b'{"prompt": "a", "response": "b", "response_tokens": []}\n', ["response is empty"]),
        (b'{"prompt": "a", "response": "b", "finished": "no"}\n', ['"finished" must be a boolean']),
        (b'{"messages": "a"}\n', ['"messages" must be a list']),
        (b'{"messages": []}\n', ["the last of"]),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', ["the last of"]),
        (b'{"messages": ["a", "b"]}\n', ['"messages"[0] must be an object']),
        (
            b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}\n',
            ['[0] has no "content"'],
        ),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, line, parts):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line)
    with pytest.raises(MTPError) as caught:
        load_examples(path, TOKENIZER, 99)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and message.endswith(".")
    assert all(part in message for part in parts), message


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(MTPError, match=r"none\.jsonl: cannot be read"):
        load_examples(tmp_path / "none.jsonl", TOKENIZER, 99)
    with pytest.raises(MTPError, match=r"train\.jsonl: cannot be read"):
        load_examples(tmp_path, TOKENIZER, 99)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(MTPError, match=r"empty\.jsonl: the file is empty"):
        load_examples(tmp_path / "empty.jsonl", TOKENIZER, 99)


def test_a_template_that_refuses_is_named_with_its_line(tmp_path):
    refusing = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(MTPError, match="line 1: the model's chat template rejects.*roles must alternate"):
        load_examples(write(tmp_path / "d.jsonl", {"messages": turns}), refusing, 99)
