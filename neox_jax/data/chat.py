"""Messages to text by a chat template: Jinja in a sandbox, with a tag for what the model is to learn to say.

A template sees `messages`, each with `role` and `content`, `eos_token`, `add_generation_prompt` (false) and
`raise_exception`. What stands between {% generation %} and {% endgeneration %} is learned (transformers' own tag).

The sandbox refuses attributes that lead out of the data (`__class__`), changing what it was given, `range` beyond
100,000, `**`, repeating text by `*`, and a text of more than MAX_CHARACTERS. It does not bound the time of loops within
loops, nor what a filter like `center` makes: a template is as trusted as the configuration that names it. Messages are
never read as templates.
"""

import functools
from pathlib import Path

from neox_jax.errors import InputError

DEFAULT_TEMPLATE = """\
{% for message in messages %}
<|{{ message.role }}|>
{% if message.role == "assistant" %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ message.content }}
{%- endif %}
{% if not loop.last %}{{ "\\n" }}{% endif %}
{% endfor %}
"""
MAX_CHARACTERS = 1 << 24
BORDERS = "\ufdd0\ufdd1"  # around what is learned: Unicode's noncharacters, which stand in no text


class ChatTemplate:
    """A template, ready to render. Raises: InputError for one that cannot be read or marks nothing as learned."""

    def __init__(self, template: str, *, eos_token: str):
        """template: a file, or the text itself, which has a "{"; "" is DEFAULT_TEMPLATE."""
        text = _read_template(template) if template else DEFAULT_TEMPLATE
        environment = _environment()
        import jinja2

        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"data.chat_template, line {error.lineno}: {error.message}; mend the template") from error
        except SyntaxError as error:  # Python's, in what Jinja made of it
            raise InputError(f"data.chat_template: {error.msg}; mend the template") from error
        if "endgeneration" not in text:
            raise InputError(
                "data.chat_template does not say what is to be learned; put what the assistant says between "
                "{% generation %} and {% endgeneration %}"
            )
        self._eos_token = eos_token

    def pieces(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is learned. Raises: ValueError with what the template says."""
        parts, num_characters = [], 0
        values = {"messages": messages, "eos_token": self._eos_token, "add_generation_prompt": False}
        try:
            for part in self._template.generate(values):
                num_characters += len(part)
                if num_characters > MAX_CHARACTERS:
                    raise ValueError(f"more than {MAX_CHARACTERS} characters")
                parts.append(part)
        except Exception as error:  # whatever an expression of the template's raises
            raise ValueError(f"the chat template failed: {' '.join(str(error).split()):.200}") from error
        return _cut("".join(parts))


def _cut(text: str) -> list[tuple[str, bool]]:
    begin, end = BORDERS
    pieces = []
    for i, part in enumerate(text.split(begin)):
        learned, found, rest = part.partition(end)
        pieces += [(learned, True), (rest, False)] if i else [(part, False)]
        if bool(found) != bool(i) or end in rest:
            raise ValueError("the chat template has {% generation %} within another")
    return [piece for piece in pieces if piece[0]]


def _read_template(template: str) -> str:
    if "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.chat_template {template} cannot be read ({error}); name a file of Jinja text"
        ) from error


@functools.cache
def _environment():
    try:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError, TemplateRuntimeError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise InputError("conversations need the jinja2 package: pip install 'neox_jax[data]'") from error

    class Generation(Extension):
        tags = frozenset(("generation",))

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller) -> str:
            return BORDERS[0] + caller() + BORDERS[1]

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            if operator == "**" or not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
                raise SecurityError(
                    f"{operator} of a {type(left).__name__} and a {type(right).__name__} is not allowed"
                )
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str):
        raise TemplateRuntimeError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=(Generation, "jinja2.ext.loopcontrols"))
    environment.globals["raise_exception"] = raise_exception
    del environment.globals["lipsum"], environment.filters["random"]  # every host must get the same text
    return environment
