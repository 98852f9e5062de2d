"""The tiny models of the tests: loadable, repeatable, and not degenerate."""

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm.generate import generate_step

from tests.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer


def greedy(model, prompt, n):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=n)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_varies_and_the_saved_folder_gives_the_same(architecture, tmp_path):
    model = tiny_model(architecture, seed=3)
    prompt = [5, 17, 80, 121]
    text = greedy(model, prompt, 24)
    assert len(set(text)) >= 6, text
    assert text != greedy(tiny_model(architecture, seed=4), prompt, 24)
    loaded, tokenizer = load(str(save_tiny(tmp_path, architecture, seed=3)))
    assert greedy(loaded, prompt, 24) == text
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_have_spread_and_entropy(architecture):
    logits = tiny_model(architecture)(mx.arange(40, 60)[None])[0]
    probabilities = mx.softmax(logits, axis=-1)
    entropy = -mx.sum(probabilities * mx.log(probabilities + 1e-20), axis=-1).mean().item()
    assert 0.5 < entropy < 4.8, entropy
    assert mx.std(logits, axis=-1).min().item() > 0.5


def test_tokenizer_round_trip_and_template():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == 157
    text = "The word\n\tand #2 {x}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == rendered
    every_byte = tiny_tokenizer(320)
    assert every_byte.decode(every_byte.encode("naïve 猫")) == "naïve 猫"
