"""A chat template is a program that a base brings: what is wrong with it is one line, and it can't take the machine."""

import resource
import signal
import threading
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE, make_questions, make_tokenizer

from ksat import chat_template
from ksat.chat_template import render
from ksat.encoding import Encoder
from ksat.errors import InputError
from ksat.prompts import DEFAULT_TEMPLATES

MESSAGES = [{"role": "user", "content": "물음"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}INSIDE{% endfor %}{% endfor %}"
BROKEN = {
    "syntax": ("{% for m in messages %}", r"fails \(TemplateSyntaxError: Unexpected end of template"),
    "refuses": ("{{ raise_exception('역할\n없음') }}", r"fails \(TemplateError: 역할"),
    "sandbox": ("{{ messages.append(1) }}", r"fails \(SecurityError: "),
    "class": ("{{ ''.__class__.__mro__ }}", r"fails \((SecurityError|UndefinedError): "),
    "division": ("{{ 1 // 0 }}", r"fails \(ZeroDivisionError: "),
    "type": ("{{ 1 + 'a' }}", r"fails \(TypeError: "),
    "range": ("{{ range(10**9) | list }}", r"fails \(OverflowError: Range too big"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"fails \(RecursionError: "),
    "surrogate": (r"{{ '\ud800' }}", r"fails \(UnicodeEncodeError: "),
    "memory": ("{{ 'a' * 10**10 }}", r"takes more than 1 GiB of memory"),
    "memory by a variable": ("{% set n = messages | length %}{{ 'a' * (n * 10**10) }}", r"takes more than 1 GiB of memory"),
    "memory by format": ("{{ '%10000000000d' % (messages | length) }}", r"(takes more than 1 GiB|fails \()"),
    "memory by doubling": (
        "{% set x = namespace(y='aaaaaaaa') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
        r"takes more than (1 GiB|1 seconds)",
    ),
    "power": ("{% set n = messages | length %}{{ (n + 9) ** (10 ** 9) }}", r"takes more than (1 seconds|1 GiB)"),
    "power of constants": ("{{ 9 ** (9 ** 9) }}", r"takes more than (1 seconds|1 GiB)"),
    "loops": (LOOPS.replace("INSIDE", ""), "takes more than 1 seconds"),
    "loops that write": (LOOPS.replace("INSIDE", "{{ 'x' * 9999 }}"), r"takes more than (1 seconds|1 GiB)"),
    "length": ("{{ 'a' * 10**6 }}", r"writes 1,000,000 characters"),
}  # fmt: skip


def tokenizer_with(template: str) -> Any:
    from copy import deepcopy

    tokenizer = deepcopy(make_tokenizer())
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/base"
    return tokenizer


@pytest.mark.parametrize("case", BROKEN)
def test_broken_templates_are_one_line(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    template, match = BROKEN[case]
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(InputError, match=rf"^base some/base: its chat template {match}"):
        render(tokenizer_with(template), MESSAGES, add_generation_prompt=True)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_sound_template_is_rendered_as_it_is_and_in_any_thread() -> None:
    expected = "<|im_start|>user\n물음<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    assert render(tokenizer, MESSAGES, add_generation_prompt=True) == expected
    found = []
    thread = threading.Thread(target=lambda: found.append(render(tokenizer, MESSAGES, add_generation_prompt=True)))
    thread.start()
    thread.join()
    assert found == [expected]


def test_long_messages_are_no_fault_of_the_template() -> None:
    text = "가" * 300_000
    rendered = render(tokenizer_with(CHAT_TEMPLATE), [{"role": "user", "content": text}], add_generation_prompt=False)
    assert text in rendered


def test_an_encoder_folds_the_system_turn_only_where_it_is_refused() -> None:
    """Refused for its system turn, a template serves; refused for everything, it is named with the first prompt."""
    (question,) = make_questions(1)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    encoder = Encoder(tokenizer_with(refusing), DEFAULT_TEMPLATES["label"], "label", max_tokens=2048)
    assert encoder.render(question).startswith("<|im_start|>user\n지문을 읽고 질문의 답을 고르세요.\n\n지문:")
    encoder = Encoder(
        tokenizer_with("{{ raise_exception('nothing') }}"), DEFAULT_TEMPLATES["label"], "label", max_tokens=2048
    )
    with pytest.raises(InputError, match=r"base some/base: its chat template fails \(TemplateError: nothing\); mend"):
        encoder.encode(question)
