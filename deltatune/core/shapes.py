"""A tiny language for shapes: `"r d_in"` is two dimensions, each an integer expression over names.

    shape := dim (space dim)*          dim has no spaces
    dim   := sum of products over names, numbers, ( ), + - * / // and int(...), min(a,b), max(a,b)

`"d_in//block block block"`, `"int(fraction*d_in*d_out)"`. Parsed once per declaration; nothing is ever `eval`ed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

_TOKEN = re.compile(r"(\d+\.\d+|\d+)|([A-Za-z_]\w*)|(//|[-+*/(),])")
_CALLS: dict[str, Callable[..., float]] = {"int": int, "min": min, "max": max}

Number = int | float
Evaluate = Callable[[Mapping[str, Number]], Number]


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension: its text and what it evaluates to."""

    text: str
    names: frozenset[str]
    evaluate: Evaluate

    def size(self, dims: Mapping[str, Number]) -> int:
        """The dimension's size. Raises ValueError where a name is missing or the size is not a positive integer."""
        missing = sorted(self.names - dims.keys())
        if missing:
            raise ValueError(f"dimension {self.text!r} names {missing}, which is neither a size nor a hyperparameter")
        used = ", ".join(f"{n} = {dims[n]}" for n in sorted(self.names))
        try:
            value = self.evaluate(dims)
        except ZeroDivisionError:
            raise ValueError(f"dimension {self.text!r} divides by zero where {used}") from None
        if value != int(value) or value < 1:
            raise ValueError(f"dimension {self.text!r} is {value} where {used}; it must be an integer of at least 1")
        return int(value)


class _Parser:
    def __init__(self, text: str, whole: str) -> None:
        self.text, self.whole, self.at = text, whole, 0
        self.names: set[str] = set()
        self.tokens: list[str] = []
        position = 0
        while position < len(text):
            found = _TOKEN.match(text, position)
            if not found:
                raise self.error(f"unexpected {text[position]!r}")
            self.tokens.append(found[0])
            position = found.end()

    def error(self, why: str) -> ValueError:
        return ValueError(f"cannot read dimension {self.text!r} of shape {self.whole!r}: {why}")

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise self.error(f"expected {expected or 'a name or a number'}, found {token or 'the end'}")
        self.at += 1
        return token

    def sum(self) -> Evaluate:
        left = self.product()
        while self.peek() in ("+", "-"):
            left = _binary(self.take(), left, self.product())
        return left

    def product(self) -> Evaluate:
        left = self.atom()
        while self.peek() in ("*", "/", "//"):
            left = _binary(self.take(), left, self.atom())
        return left

    def atom(self) -> Evaluate:
        token = self.take()
        if token == "(":
            inner = self.sum()
            self.take(")")
            return inner
        if token[0].isdigit():
            number: Number = float(token) if "." in token else int(token)
            return lambda dims: number
        if not token.isidentifier():
            raise self.error(f"unexpected {token!r}")
        if self.peek() != "(":
            self.names.add(token)
            return lambda dims: dims[token]
        if token not in _CALLS:
            raise self.error(f"unknown function {token!r}; known: {', '.join(_CALLS)}")
        self.take("(")
        arguments = [self.sum()]
        while self.peek() == ",":
            self.take(",")
            arguments.append(self.sum())
        self.take(")")
        call = _CALLS[token]
        return lambda dims: call(*(a(dims) for a in arguments))


def _binary(operator: str, left: Evaluate, right: Evaluate) -> Evaluate:
    if operator == "+":
        return lambda dims: left(dims) + right(dims)
    if operator == "-":
        return lambda dims: left(dims) - right(dims)
    if operator == "*":
        return lambda dims: left(dims) * right(dims)
    if operator == "//":
        return lambda dims: left(dims) // right(dims)
    return lambda dims: left(dims) / right(dims)


@cache
def parse(shape: str) -> tuple[Dim, ...]:
    """The dimensions of `shape`; ValueError quotes the declaration where it cannot be read. "" is a scalar."""
    dims = []
    for text in shape.split():
        parser = _Parser(text, shape)
        evaluate = parser.sum()
        if parser.peek():
            raise parser.error(f"unexpected {parser.peek()!r}")
        dims.append(Dim(text, frozenset(parser.names), evaluate))
    return tuple(dims)


def sizes(shape: str, dims: Mapping[str, Number]) -> tuple[int, ...]:
    """The tensor shape that `shape` means where `dims` gives the names."""
    return tuple(d.size(dims) for d in parse(shape))
