"""The language of shapes: a parser of its own, held against Python's `eval` on random expressions."""

import random
import re

import pytest

from deltatune.core import shapes

DIMS = {"r": 3, "d_in": 32, "d_out": 48, "block": 4, "fraction": 0.25, "n2": 7}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", ()),
        ("r d_in", (3, 32)),
        ("d_in//block block block", (8, 4, 4)),
        ("int(fraction*d_in*d_out)", (384,)),
        ("min(d_in,d_out) max(r,1,2)", (32, 3)),
        ("2*(d_in+d_out)-1", (159,)),
        ("d_in-r-r", (26,)),
        ("d_in//block//2", (4,)),
        ("d_in*fraction", (8,)),
        ("7", (7,)),
    ],
)
def test_sizes(text: str, want: tuple[int, ...]) -> None:
    assert shapes.sizes(text, DIMS) == want


@pytest.mark.parametrize(
    "text",
    ["r+", "(r", "r)", "r d_in)", "r**2", "r..2", "2r", "max()", "max(r", "sum(r)", "__import__('os')", "r[0]",
     "r.real", "r,d_in", "-", "*r", "r;r", "lambda", "r%2", "int(r", "r//"],
)  # fmt: skip
def test_what_cannot_be_read_is_quoted(text: str) -> None:
    if text == "lambda":  # a name like any other to the parser, and no dimension
        with pytest.raises(ValueError, match="lambda"):
            shapes.sizes(text, DIMS)
        return
    with pytest.raises(ValueError, match="cannot read dimension") as error:
        shapes.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "dims", "words"),
    [
        ("r d_kv", DIMS, ["d_kv"]),
        ("r", {"r": 0}, ["r = 0", "at least 1"]),
        ("r-4", DIMS, ["-1", "r = 3"]),
        ("d_in/r", DIMS, ["10.66", "integer"]),
        ("d_in//r", {"d_in": 8, "r": 0}, ["r = 0"]),
    ],
)
def test_a_size_that_is_none_says_why(text: str, dims: dict[str, float], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        shapes.sizes(text, dims)
    assert all(word in str(error.value) for word in words), error.value


def expression(rng: random.Random, depth: int) -> str:
    kind = rng.choice(["name", "number", *(["binary", "binary", "call", "bracket"] if depth else [])])
    if kind == "name":
        return rng.choice(list(DIMS))
    if kind == "number":
        return rng.choice(["1", "2", "12", "0.5", "3.25"])
    inner = [expression(rng, depth - 1) for _ in range(3)]
    if kind == "binary":
        return f"{inner[0]}{rng.choice(['+', '-', '*', '/', '//'])}{inner[1]}"
    if kind == "call":
        return rng.choice([f"int({inner[0]})", f"min({inner[0]},{inner[1]})", f"max({','.join(inner)})"])
    return f"({inner[0]})"


def test_random_expressions_mean_what_python_means() -> None:
    rng = random.Random(20)
    tried = 0
    for _ in range(3000):
        text = expression(rng, 4)
        (dim,) = shapes.parse(text)
        try:
            want = eval(text, {"__builtins__": {}, "int": int, "min": min, "max": max}, dict(DIMS))
        except ZeroDivisionError:
            continue
        assert dim.evaluate(DIMS) == want, text
        assert dim.names == {name for name in DIMS if name in _words(text)}, text
        tried += 1
    assert tried > 2000


def test_random_text_is_read_or_refused() -> None:
    """Never another exception, never a hang."""
    rng = random.Random(21)
    for _ in range(3000):
        text = "".join(rng.choice("r d_in()+-*/,.019%[]'=\\\té") for _ in range(rng.randrange(12)))
        try:
            shapes.sizes(text, DIMS)
        except ValueError:
            continue


def _words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", text))
