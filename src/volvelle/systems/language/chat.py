"""Chat templates: the Jinja text that a model's author wrote, rendered as untrusted code.

Templates come with downloaded weights, so they run in jinja2's immutable sandbox (no attribute leads out of it), see
plain JSON data only, and have a budget: steps of loops and calls, and the size of every text they build. What is left
out of Jinja are the filters whose only cost is a number in the template (`center`, `wordwrap`, …).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from volvelle.errors import VolvelleError

_STEPS = 2_000_000  # loop turns and calls, one more for every 256 characters built
_CALL_STEPS = 16  # a macro call takes about as long as that many loop turns
_LARGEST = 1 << 24  # characters in one text, items in one list
_LARGEST_TEMPLATE = 1 << 20
_CHARACTERS_A_STEP = 256
_DROPPED_FILTERS = ("center", "wordwrap", "format", "xmlattr", "urlize", "filesizeformat", "random", "slice", "batch")
_DROPPED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format_map")
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{4,}|\*)|:[^}]*(\{|\d{4,})")


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    r"""Render a conversation, as transformers' `apply_chat_template(tokenize=False)` does.

    Raises VolvelleError for messages that are not a list of dicts with a role, for what the template itself refuses
    (`raise_exception`), for mistakes in it, and when it asks for more than the sandbox or the budget gives.

    >>> render_chat("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", [
    ...     {"role": "user", "content": "hi"}])
    '[user] hi\n'
    """
    chat = _plain(_checked(messages), "messages")
    known = {name: _plain(value, name) for name, value in (variables or {}).items()}
    known |= {"messages": chat, "tools": _plain(list(tools), "tools") if tools else None, "documents": None}
    token = _budget.set(_Budget())
    try:
        compiled = parse_template(template)
        return _join(compiled.generate(**known, add_generation_prompt=add_generation_prompt))
    except (VolvelleError, KeyboardInterrupt):
        raise
    except SecurityError as error:
        raise VolvelleError(f"chat template: refused by the sandbox: {error}") from error
    except TemplateError as error:
        raise VolvelleError(f"chat template: {error.message or error}") from error
    except Exception as error:
        # A template can raise whatever Python raises: a wrong type, a missing key, a range too long, a deep recursion.
        raise VolvelleError(f"chat template: {type(error).__name__}: {error}") from error
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=16)
def parse_template(template: str) -> jinja2.Template:
    """Compile a chat template with the loop and concatenation counters in place."""
    environment = _environment()
    tree = _parse(environment, template)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
    for parent in list(tree.find_all(nodes.Node)):
        _count_concatenations(parent)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def template_texts(template: str) -> list[str]:
    """All literal texts of a template: what it writes by itself, and the strings it compares with."""
    try:
        tree = _parse(_environment(), template)
    except (TemplateError, RecursionError) as error:
        raise VolvelleError(f"chat template: {error}") from error
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    return data + [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = _STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise SecurityError("the template runs too long")

    def build(self, size: int) -> None:
        """Account for a text or list of `size` before it is built."""
        if size > _LARGEST:
            raise SecurityError(f"the template builds a value of {size} characters or items")
        self.spend(1 + size // _CHARACTERS_A_STEP)

    def measure(self, value: Any) -> int:
        """Length of `str(value)`, at least roughly; nested lists are walked and paid for."""
        if isinstance(value, str):
            return len(value)
        self.spend(1)
        if isinstance(value, Mapping):
            return sum(self.measure(k) + self.measure(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return sum(map(self.measure, value))
        return 32


# Rendering may run in several threads; compiled templates are shared, budgets are not.
_budget: ContextVar[_Budget] = ContextVar("budget")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget on calls and on the operators that make values grow."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not (isinstance(obj, str) and attr in _DROPPED_METHODS) and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # jinja2 wraps str.format in a function of its own; the text it belongs to is one step further.
        budget, owner = _budget.get(), getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        budget.spend(_CALL_STEPS + sum(len(a) for a in args if isinstance(a, (list, tuple, dict))))
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and args:
            return _bounded_join(args[0], owner)
        if isinstance(owner, str) and name == "replace":
            _check_replace(owner, *args[:2])
        if isinstance(owner, str) and name == "format" and _WIDE.search(owner):
            raise SecurityError(f"field widths are not allowed: {owner[:80]!r}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operator(_budget.get(), operator, left, right)
        return super().call_binop(context, operator, left, right)


def _check_operator(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if numbers and operator == "**":
        if abs(left) > 1 and right * max(int(abs(left)).bit_length(), 1) > 4096:
            raise SecurityError("the template computes too large a power")
    elif numbers and operator == "*":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 8192:
            raise SecurityError("the template computes too large a product")
    elif operator == "*":
        sized, count = (left, right) if isinstance(left, Sized) else (right, left)
        if isinstance(sized, Sized) and isinstance(count, int):
            budget.build(len(sized) * max(count, 0))
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        budget.build(len(left) + len(right))
    elif operator == "%" and isinstance(left, str):
        if _WIDE.search(left):
            raise SecurityError(f"field widths are not allowed: {left[:80]!r}")
        budget.build(len(left) + budget.measure(right) * max(left.count("%"), 1))


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
        finalize=_finalize,
    )
    for name in _DROPPED_FILTERS:
        del environment.filters[name]
    bounded: dict[str, Callable[..., Any]] = {
        "tojson": _to_json,
        "join": _bounded_join,
        "replace": _bounded_replace,
        "indent": _bounded_indent,
        "string": _bounded_string,
        "pprint": _bounded_string,
        "_counted": _counted,
        "_glued": _glued,
    }
    environment.filters.update(bounded)
    spans = {"range": _range, "dict": _dict, "namespace": _Namespace, "strftime_now": _now, "raise_exception": _raise}
    environment.globals.clear()
    environment.globals.update(spans)
    return environment


def _parse(environment: _Environment, template: str) -> nodes.Template:
    if len(template) > _LARGEST_TEMPLATE:
        raise VolvelleError(f"chat template: {len(template)} characters, at most {_LARGEST_TEMPLATE} are read")
    return environment.parse(template)


def _count_concatenations(parent: nodes.Node) -> None:
    """Put `[a, b] | _glued` where the template says `a ~ b`."""

    def counted(node: Any) -> Any:
        if not isinstance(node, nodes.Concat):
            return node
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_glued", [], [], None, None, lineno=node.lineno)

    for field, value in parent.iter_fields():
        setattr(parent, field, [counted(item) for item in value] if isinstance(value, list) else counted(value))


def _join(pieces: Iterator[str]) -> str:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        _budget.get().build(len(piece))
        if size > _LARGEST:
            raise SecurityError(f"the template writes more than {_LARGEST} characters")
        parts.append(piece)
    return "".join(parts)


# pass_context keeps jinja2 from running these at compile time, where there is no budget.
@jinja2.pass_context
def _counted(_context: Context, value: Any) -> Any:
    budget = _budget.get()
    if hasattr(value, "__len__"):
        budget.spend(len(value))
        return value
    return _count_each(budget, value)


def _count_each(budget: _Budget, values: Any) -> Iterator[Any]:
    for value in values:
        budget.spend(1)
        yield value


@jinja2.pass_context
def _glued(_context: Context, parts: list[Any]) -> str:
    budget = _budget.get()
    budget.build(sum(map(budget.measure, parts)))
    return "".join(map(str, parts))


@jinja2.pass_context
def _finalize(_context: Context, value: Any) -> Any:
    if not isinstance(value, str):
        _budget.get().build(_budget.get().measure(value))
    return value


def _bounded_join(values: Any, glue: str = "", attribute: str | int | None = None) -> str:
    budget = _budget.get()
    if attribute is not None:
        raise SecurityError("join(attribute=...) is not available, put map(attribute=...) before it")
    parts = [str(value) for value in values if budget.build(budget.measure(value)) is None]
    budget.build(sum(map(len, parts)) + len(parts) * len(glue))
    return str(glue).join(parts)


def _check_replace(text: str, old: Any = "", new: Any = "") -> None:
    if isinstance(old, str) and isinstance(new, str):
        _budget.get().build(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _bounded_replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = _bounded_string(text)
    _check_replace(text, old, new)
    return text.replace(old, new, -1 if count is None else count)


def _bounded_indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    step = width if isinstance(width, str) else " " * min(max(width, 0), 256)
    _budget.get().build(len(text) + (text.count("\n") + 1) * len(step))
    lines = text.split("\n")
    kept = [line if not (line or blank) or (i == 0 and not first) else step + line for i, line in enumerate(lines)]
    return "\n".join(kept)


def _bounded_string(value: Any) -> str:
    budget = _budget.get()
    budget.build(budget.measure(value))
    return str(value)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    r"""Jinja's own filter escapes < > & for HTML, which would put \u003c into prompts."""
    budget = _budget.get()
    depth = 1 + min(indent or 0, 16)
    budget.build(budget.measure(value) * depth)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=None if indent is None else min(indent, 16),
        separators=separators,
        sort_keys=sort_keys,
    )


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > 100_000:
        raise SecurityError(f"range of {len(numbers)} numbers, at most 100000 are allowed")
    _budget.get().spend(len(numbers))
    return numbers


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in [*kwargs, *(dict(*args[1:]) if len(args) > 1 else ())]:
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace names must not begin with an underscore: {str(name)[:80]!r}")


def _now(form: str) -> str:
    if re.search(r"\d{3,}", form):
        raise SecurityError("field widths are not allowed in strftime_now")
    return datetime.datetime.now().strftime(form)


def _raise(message: str) -> None:
    raise TemplateError(str(message))


def _checked(messages: Any) -> list[Any]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise VolvelleError(f"chat messages must be a list of dicts, got {type(messages).__name__}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise VolvelleError(f"chat message {index} must be a dict with a role, got {str(message)[:80]}")
    return list(messages)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Rebuild from exact JSON types: objects with methods have no business inside a template."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if depth > 64:
        raise VolvelleError(f"chat {where}: nested more than 64 deep")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise VolvelleError(f"chat {where}: only text, numbers, lists and dicts can be shown, got {type(value).__name__}")
