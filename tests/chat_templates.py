"""Chat templates of families whose tokenizer no package carries, as their makers publish the turns, in our own words.

Each is put on a carrier: another family's real tokenizer, to which the markup is added as special tokens. So the turns
are the family's, the ids are the carrier's.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """Turns of a family.

    Attributes:
        carrier: package whose tokenizer it is put on.
        markup: its special tokens.
        template: Jinja.
    """

    carrier: str
    markup: tuple[str, ...]
    template: str


_EXAONE_MARKUP = ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")
PUBLISHED = {
    # EXAONE 3.0 and 3.5: a system turn always, an empty one if need be; a user turn ends in a newline alone.
    "exaone3": Published(
        "qwen2_5",
        _EXAONE_MARKUP,
        "{% if messages[0].role != 'system' %}[|system|][|endofturn|]\n{% endif %}"
        "{% for message in messages %}[|{{ message.role }}|]{{ message.content }}"
        "{% if message.role != 'user' %}[|endofturn|]{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]{% endif %}",
    ),
    # EXAONE 4.0 without thinking, as its documentation in transformers shows it.
    "exaone4": Published(
        "qwen2_5",
        _EXAONE_MARKUP,
        "{% for message in messages %}[|{{ message.role }}|]\n"
        "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}[|endofturn|]\n{% endfor %}"
        "{% if add_generation_prompt %}[|assistant|]\n{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    ),
    # EEVE's model card: the first line is its system turn, which ours takes the place of.
    "eeve": Published(
        "llama3_1",
        (),
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' %}Human: {% elif message.role == 'assistant' %}Assistant:\n{% endif %}"
        "{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:\n{{ '' }}{% endif %}",
    ),
    # Gemma 2 IT: a system turn is refused; the assistant is called model.
    "gemma2_it": Published(
        "gemma2",
        ("<start_of_turn>", "<end_of_turn>"),
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
}
