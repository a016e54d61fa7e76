"""Templates over a record's fields: `prompt="{{ triples }} ->" completion="{{ references }}"`.

Jinja2 in its sandbox: a template can read fields and format them, and nothing else. Nested lists are written for
readers, `s | p | o ; s | p | o`. A template that is exactly one expression whose value is a list of texts means
alternatives: several right answers to one prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from volvelle.errors import UsageError

_ONE_EXPRESSION = re.compile(r"\s*\{\{((?:(?!\}\}|\{\{).)*)\}\}\s*", re.DOTALL)


class TemplateProblem(Exception):
    """A record does not fit the template; the text says why."""


def readable(value: Any) -> Any:
    """Lists as a person would write them: items joined by " ; ", the items of an inner list by " | ".

    >>> readable([["Aarhus", "country", "Denmark"], ["Aarhus", "mayor", "J. Bundsgaard"]])
    'Aarhus | country | Denmark ; Aarhus | mayor | J. Bundsgaard'
    """
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for item in value):
            return " ; ".join(_row(item) for item in value)
        return " ; ".join(_word(item) for item in value)
    return _word(value) if isinstance(value, Mapping | bool) or value is None else value


def _row(item: Any) -> str:
    return " | ".join(map(_word, item)) if isinstance(item, list | tuple) else _word(item)


def _word(item: Any) -> str:
    return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)


class Template:
    """One template, compiled once. `option` is its name in messages (prompt, completion).

    Fields are variables; those whose names are not identifiers are reached as `record["my field"]`.

    >>> Template("{{ name }} is {{ age }}.", option="prompt").text({"name": "Ada", "age": 36})
    'Ada is 36.'
    >>> Template("{{ answers }}", option="completion").alternatives({"answers": ["yes", "indeed"]})
    ('yes', 'indeed')
    """

    def __init__(self, source: str, *, option: str):
        self.source, self.option = source, option
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=readable, keep_trailing_newline=True
        )
        try:
            self._template = environment.from_string(source)
            one = _ONE_EXPRESSION.fullmatch(source)
            self._value = environment.compile_expression(one[1], undefined_to_none=False) if one else None
        except TemplateError as error:
            raise UsageError(
                f"{option}={source}: not a Jinja template ({error})", tip="fields are written {{ name }}"
            ) from None

    def text(self, record: Mapping[str, Any]) -> str:
        """The template filled in. A field that the record lacks raises TemplateProblem, which lists those it has."""
        return self._guard(record, lambda fields: self._template.render(fields))

    def alternatives(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """All texts the template stands for: several when it is one expression that gives a list of texts."""
        if self._value is None:
            return (self.text(record),)
        expression = self._value
        value = self._guard(record, lambda fields: expression(**fields))
        if isinstance(value, Undefined):
            return (self.text(record),)  # raises, naming the field
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            if not value:
                raise TemplateProblem(f"{self.option}= gives an empty list")
            return tuple(value)
        return (str(readable(value)),)

    def _guard(self, record: Mapping[str, Any], fill: Any) -> Any:
        try:
            return fill({"record": record, **record})
        except TemplateError as error:
            has = f"the record has: {', '.join(record) or 'no fields'}"
            raise TemplateProblem(f"{self.option}={self.source}: {error.message}; {has}") from None
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise TemplateProblem(f"{self.option}={self.source}: {error}") from None
