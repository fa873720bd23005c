"""Runs a Jinja template that nobody vouches for, within bounds of size, steps and time.

Jinja's own sandbox keeps a template away from Python's insides; it does not stop three nested
loops over a range, or a string that doubles forty times. Here no value ever grows beyond a
limit, every loop round and call is counted, and a clock is looked at while counting: one step is
at most the work of one operation on a value of that size. Knows nothing about chats.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import CodeType, GeneratorType
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import filters, nodes, sandbox
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jamba_lm.errors import InputError, TokenizerError
from jamba_lm.text.template_budget import BoundExceeded, Budget

SOURCE_LIMIT_CHARACTERS = 2**18

FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "forceescape", "groupby", "indent", "int", "items", "join", "last", "length"),
    *("list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round"),
    *("safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "truncate"),
    *("unique", "upper", "wordcount"),
)
METHODS = frozenset(
    (
        *("capitalize", "casefold", "copy", "count", "endswith", "find", "format", "get", "index"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"),
        *("isnumeric", "isprintable", "isspace", "istitle", "isupper", "items", "join", "keys"),
        *("lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
        *("rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith"),
        *("strip", "swapcase", "title", "upper", "values"),
    )
)
# A field width of five digits or more, or one that is itself a field.
WIDE_FORMAT = re.compile(r":[^{}]*(?:\d{5}|\{)|%[^%a-zA-Z]*(?:\d{5}|\*)")

# What a template that runs can raise, for a mistake in it or in what it was given.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    BoundExceeded,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class RefusedByTemplate(jinja2.TemplateError):
    """The template called raise_exception: it does not want these messages."""


class BoundedNamespace(Namespace):
    """`namespace()` for templates; nothing in it can reach Python's insides."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


class GenerationBlock(Extension):
    """`{% generation %}`: marks what the assistant says, for training; here it just prints."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """A sandbox for one run of one template; it carries the run's budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, budget: Budget, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, GenerationBlock],
            cache_size=0,
        )
        self.budget = budget
        self.filters = {name: self._bounded_filter(name) for name in FILTERS}
        self.filters["tojson"] = self._to_json
        self.globals = {
            "cycler": jinja2.utils.Cycler,
            "dict": dict,
            "joiner": jinja2.utils.Joiner,
            "namespace": BoundedNamespace,
            "raise_exception": _raise_exception,
            "range": sandbox.safe_range,
            "strftime_now": lambda form: now().strftime(form),
        }

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a block, a macro or the whole text."""
        parts, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.budget.allow(size)
            parts.append(piece)
        return "".join(parts)

    def counted(self, values: Any) -> Any:
        """Return what a `for` loop runs over, so that each round is counted."""
        if isinstance(values, Sequence | Mapping):
            self.budget.spend(len(values) + 1)
            return values
        self.budget.spend()
        return self._count_each(values) if isinstance(values, Iterable) else values

    def _count_each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.budget.spend()
            yield value

    def made(self, value: Any) -> Any:
        """Return a list, tuple or dict that the template wrote, if it is small enough."""
        return self.budget.measured(value)

    def joined(self, *values: Any) -> str:
        """Return what `~` makes of its operands."""
        self.budget.spend()
        return self.concat([str(self.budget.measured(value)) for value in values])

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something for the template: a macro, a global, or a method that is known."""
        self.budget.spend()
        # Jinja puts its own format in the place of str.format, and keeps the method inside.
        method = getattr(obj, "__wrapped__", obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict | set | int | float):
            name = getattr(method, "__name__", "")
            if name not in METHODS:
                raise SecurityError(f"the method {name!r} is not for templates")
            self._check_growth(name, owner, args)
            if name in ("items", "keys", "values"):
                # As a list, which can be measured.
                return self.budget.measured(list(super().call(context, obj, *args, **kwargs)))
        return self.budget.measured(super().call(context, obj, *args, **kwargs))

    def _check_growth(self, name: str, owner: Any, args: Sequence[Any]) -> None:
        """Refuse a method whose result would be too large, before it runs."""
        if isinstance(owner, str) and name == "format" and WIDE_FORMAT.search(owner):
            raise BoundExceeded("it formats a very wide field")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            self._check_replace(owner, args[0], args[1])
        if isinstance(owner, str) and name == "join" and args and isinstance(args[0], Sequence):
            self.budget.allow(len(owner) * len(args[0]) + self.budget.size(args[0]))

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        self.budget.allow(len(text) + text.count(str(old)) * len(str(new)))

    def _bounded_filter(self, name: str) -> Callable[..., Any]:
        """Return Jinja's filter of this name, with its work counted and its result measured."""
        plain = filters.FILTERS[name]
        # Some filters are handed the environment or the context in front of the value.
        skip = 1 if hasattr(plain, "jinja_pass_arg") else 0

        @functools.wraps(plain)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            head, given = args[:skip], list(args[skip:])
            if name in ("join", "sum", "sort", "unique", "groupby") and given:
                given[0] = list(self.counted(given[0]))
            self.budget.spend(
                1 + (len(given[0]) // 64 if given and isinstance(given[0], Sequence) else 0)
            )
            self._check_filter(name, *given, **kwargs)
            result = plain(*head, *given, **kwargs)
            if isinstance(result, GeneratorType):
                return self._count_each(result)
            return self.budget.measured(result)

        return bounded

    def _check_filter(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse a filter whose result would be too large, before it runs."""
        first = args[0] if args else None
        if name == "replace":
            new = args[1] if len(args) > 1 else kwargs.get("new", "")
            self._check_replace(str(value), kwargs.get("old", first), new)
        elif name == "join":
            between = str(kwargs.get("d", first) or "")
            self.budget.allow(self.budget.size(value) + len(between) * len(value))
        elif name == "indent":
            width = kwargs.get("width", first)
            width = len(width) if isinstance(width, str) else width or 4
            self.budget.allow(len(str(value)) + (str(value).count("\n") + 1) * width)
        elif name == "round":
            if abs(kwargs.get("precision", first) or 0) > 100:
                raise BoundExceeded("it rounds to more than 100 places")
        elif name == "sum" and not all(isinstance(one, int | float | Mapping) for one in value):
            raise TypeError("sum is for numbers")

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Write `value` as JSON, as transformers does: HTML is not escaped."""
        self.budget.spend()
        size, depth = self.budget.size(value), self.budget.depth(value)
        extra = (indent or 0) * depth + len("".join(separators or ()))
        self.budget.allow(size * (1 + extra))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return str(self.budget.measured(text))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do arithmetic, unless the result would be too large."""
        self.budget.spend()
        size = self.budget.size
        if operator == "*":
            sized = [one for one in (left, right) if not isinstance(one, int | float)]
            number = right if sized and sized[0] is left else left
            if sized and isinstance(number, int):
                self.budget.allow(size(sized[0]) * max(number, 0))
            else:
                self.budget.allow(size(left) + size(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self.budget.allow(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise BoundExceeded("it formats a very wide field")
        elif operator == "+":
            self.budget.allow(size(left) + size(right))
        return self.budget.measured(super().call_binop(context, operator, left, right))


class _Bounds(NodeTransformer):
    """Puts the budget where a template can grow or loop without calling anything."""

    # The names are those of Jinja's node classes.

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _call("counted", [cast(nodes.Expr, node.iter)])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return _call("made", [node])

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx != "load" else _call("made", [node])


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """Return the node that calls a method of the environment."""
    line = arguments[0].lineno
    return nodes.Call(
        nodes.EnvironmentAttribute(method, lineno=line), arguments, [], None, None, lineno=line
    )


def _raise_exception(message: object) -> NoReturn:
    raise RefusedByTemplate(str(message))


@dataclass(frozen=True, slots=True)
class BoundedTemplate:
    """A template that is compiled once and may be run by several threads.

    Attributes:
        code: the Python code that Jinja made of it.
    """

    code: CodeType

    @classmethod
    def compile(cls, source: str) -> BoundedTemplate:
        """Compile a template.

        Raises:
            TokenizerError: it is too long, or no template.
        """
        if len(source) > SOURCE_LIMIT_CHARACTERS:
            raise TokenizerError(
                f"the chat template has {len(source):,} characters, more than "
                f"{SOURCE_LIMIT_CHARACTERS:,}: is it the right file?"
            )
        environment = BoundedEnvironment(Budget(), datetime.now)
        try:
            tree = _Bounds().visit(environment.parse(source))
            return cls(environment.compile(tree, filename="<chat template>"))
        except (*TEMPLATE_FAILURES, SyntaxError) as error:
            # The lines of a SyntaxError are those of the Python code, which nobody sees.
            line = (
                getattr(error, "lineno", None) if isinstance(error, jinja2.TemplateError) else None
            )
            where = "" if line is None else f" (line {line})"
            reason = error.msg if isinstance(error, SyntaxError) else _line(error)
            raise TokenizerError(f"the chat template is malformed: {reason}{where}") from error

    def run(self, values: Mapping[str, Any], now: Callable[[], datetime] = datetime.now) -> str:
        """Return the text that the template makes of plain `values` (text, numbers, lists, dicts).

        Args:
            values: the template's variables.
            now: the clock behind strftime_now.

        Raises:
            InputError: the template refuses the values, by raise_exception.
            TokenizerError: the template fails or exceeds its bounds.
        """
        budget = Budget()
        try:
            budget.take_in(dict(values))
            environment = BoundedEnvironment(budget, now)
            template = jinja2.Template.from_code(environment, self.code, environment.globals)
            return environment.concat(template.generate(values))
        except RefusedByTemplate as error:
            raise InputError(f"the chat template refuses these messages: {_line(error)}") from error
        except TEMPLATE_FAILURES as error:
            raise TokenizerError(f"the chat template fails: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return the message of an error on one line that a terminal can show."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)
