"""Proves that thinking is switched by the template's own variable, and that a prompt which opens it is noticed."""

from __future__ import annotations

from typing import Any

import pytest

from mtp_mlx.answer_parts import opens_thinking
from mtp_mlx.chat_template import chat_ids, template_variables, thinking_options
from mtp_mlx.errors import MTPError
from tests.serve.scripted import TAGS, TEMPLATE
from tests.tiny import CHAT_TEMPLATE, hf_tokenizer

SAYS = [{"role": "user", "content": "Hi"}]
# As DeepSeek V3.1 and Granite write it: the variable has another name, and is set if it is missing.
OTHER_NAME = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ messages[0]['content'] }}{% if thinking %}<think>{% else %}</think>{% endif %}"
)
NO_SWITCH = "{{ messages[0]['content'] }}{% if messages[0].thinking %}{% endif %}<think>\n"


def tokenizer(template: str, tags: bool = True) -> Any:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    found = hf_tokenizer(300, chat_template=template)
    if tags:
        found.add_tokens(TAGS)
    return TokenizerWrapper(found)


@pytest.mark.parametrize(("template", "name"), [(TEMPLATE, "enable_thinking"), (OTHER_NAME, "thinking")])
def test_the_template_s_own_switch(template: str, name: str) -> None:
    own = tokenizer(template)
    on, off = thinking_options(own, "on"), thinking_options(own, "off")
    assert (on, off) == ({name: True}, {name: False}) and thinking_options(own, "auto") == {}
    assert opens_thinking(own, chat_ids(own, SAYS, options=on))
    assert not opens_thinking(own, chat_ids(own, SAYS, options=off))


def test_without_a_switch() -> None:
    always = tokenizer(NO_SWITCH)
    assert thinking_options(always, "on") == {} and opens_thinking(always, chat_ids(always, SAYS))
    with pytest.raises(MTPError, match="no switch for thinking"):
        thinking_options(always, "off")
    for thinking in ("on", "off"):
        with pytest.raises(MTPError, match=f"no thinking to turn {thinking}"):
            thinking_options(tokenizer(CHAT_TEMPLATE, tags=False), thinking)


def test_a_tag_in_the_user_s_words_opens_nothing() -> None:
    own = tokenizer(TEMPLATE)
    says = [{"role": "user", "content": "what does <think>"}]
    assert not opens_thinking(own, chat_ids(own, says, options={"enable_thinking": False}))


def test_variables() -> None:
    loop = "{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}{{ effort }}{% endfor %}{{ tools }}"
    assert template_variables(tokenizer(loop)) == {"effort"}
    assert template_variables(tokenizer("{% generation %}{{ enable_thinking }}{% endgeneration %}")) == {
        "enable_thinking"
    }


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict"])
def test_what_is_no_variable(name: str) -> None:
    with pytest.raises(MTPError, match=f"'{name}' is no variable of a chat template"):
        chat_ids(tokenizer(TEMPLATE), SAYS, options={name: False})


def test_templates_that_are_functions() -> None:
    from mlx_lm.chat_templates.deepseek_v32 import apply_chat_template
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    inner = hf_tokenizer(300)
    inner.add_tokens(TAGS)
    own = TokenizerWrapper(inner, chat_template=apply_chat_template)
    assert thinking_options(own, "off") == {"enable_thinking": False}
    assert opens_thinking(own, chat_ids(own, SAYS, options=thinking_options(own, "on")))
    assert not opens_thinking(own, chat_ids(own, SAYS, options=thinking_options(own, "off")))
