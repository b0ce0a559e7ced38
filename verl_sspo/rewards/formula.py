r"""Formulas of LaTeX: read whole or not at all, and compared by their values.

`parse` reads every sign of a formula or raises `Unreadable`. `equal` evaluates two formulas at fixed points: rational
values exactly, others with so many digits that the smallest value on the way counts. No size is unbounded: a tower of
powers is undefined here, and a formula never takes more than the seconds of `limit`.
"""

from __future__ import annotations

import math
import random
import re
import threading
import time
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

import mpmath

MAX_BITS = 400_000  # of an exact number
MAX_SPREAD = 1000.0  # decimal places between the values on the way of an inexact number
MAX_DEPTH = 40
POINTS = 18
ENOUGH = 4  # points at which both formulas have a value

Node = tuple[Any, ...]  # the operation, then its operands

_mp = mpmath.MPContext()
_lock = threading.Lock()  # mpmath caches its constants for all threads
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


class Unreadable(ValueError):
    """The text is no formula, or one with more than one meaning."""


class Undefined(ArithmeticError):
    """The formula has no value at this point, or one that is too large."""


def limit(seconds: float) -> None:
    """Formulas of this thread raise TimeoutError after so many seconds of its own processor time."""
    _deadline.set(time.thread_time() + seconds)


# --- reading -----------------------------------------------------------------------------------------------------

_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_INVERSE = {f"arc{name}": f"a{name}" for name in _CIRCULAR}
_UNARY = {*_CIRCULAR, *_INVERSE, "sinh", "cosh", "tanh", "log", "ln", "lg", "exp"}
_SEVERAL = {"gcd", "lcm", "max", "min"}
FUNCTIONS = "|".join(sorted(_UNARY | _SEVERAL | {"sqrt"}, key=len, reverse=True))
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon "
    "phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split()
)
_DECORATED = {"hat", "vec", "bar", "dot", "ddot", "tilde", "overline", "widehat", "mathbf", "boldsymbol", "mathcal"}
# What stands in front of a bracket as a function; other letters multiply it.
_APPLIED = set("fghuFGH") | {"\\phi", "\\varphi", "\\psi", "\\Gamma", "\\delta"}
_TOKEN = re.compile(
    r"\s*(\d*\.\d*\\overline ?\{ ?\d+ ?\}|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+"
    r"|\\[a-zA-Z]+|\\[{}|]|\S)",
    re.ASCII,
)
# Differentials look like products of letters, products of vectors like products of numbers.
_AMBIGUOUS = re.compile(
    r"\\frac ?\{[^{}]*d[^{}]*\} ?\{ ?d ?\\?[a-zA-Z]|d\w? ?/ ?d\w|\\(?:vec|mathbf|boldsymbol).*\\(?:cdot|times)"
    r"|\\(?:cdot|times).*\\(?:vec|mathbf|boldsymbol)",
    re.DOTALL,
)
_PI_OVER_180 = ("/", ("const", "pi"), ("num", Fraction(180)))


def parse(text: str) -> Node:
    """Reads a formula.

    Raises:
        Unreadable: Some sign of it cannot be read, or it has several meanings, as 1/2x.
    """
    text = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS}|pi)(?![a-zA-Z])", r"\\\1 ", text)
    if _AMBIGUOUS.search(text):
        raise Unreadable(text)
    parser = _Parser(_TOKEN.findall(text))
    node = parser.sum()
    if parser.next() is not None:
        raise Unreadable(text)
    return node


def _number(token: str) -> Fraction:
    lead, _, period = token.replace(",", "").partition(r"\overline")
    if not period:
        mantissa, _, exponent = lead.lower().partition("e")
        if len(exponent) > 4:
            raise Unreadable(token)
        whole, _, places = mantissa.partition(".")
        return Fraction(int(whole + places or "0"), 10 ** len(places)) * Fraction(10) ** int(exponent or 0)
    digits = period.strip("{} ")
    shift = len(lead.partition(".")[2])
    return Fraction(lead.rstrip(".") or "0") + Fraction(int(digits), (10 ** len(digits) - 1) * 10**shift)


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def next(self) -> str | None:
        token = self.peek()
        self.place += 1
        return token

    def take(self, token: str) -> bool:
        found = self.peek() == token
        self.place += found
        return found

    def need(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(token)

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        terms = [self.product()]
        while (sign := self.peek()) in ("+", "-"):
            self.next()
            term = self.product()
            terms.append(term if sign == "+" else ("neg", term))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Node:
        node = self.signed()
        while (token := self.peek()) is not None:
            if token in ("*", "\\cdot", "\\times"):
                self.next()
                node = _times(node, self.signed())
            elif token in ("/", "\\div"):
                self.next()
                node = ("/", node, self.signed())
                if self.starts_atom():  # 1/2x
                    raise Unreadable("a/bc")
            elif token in ("\\bmod", "\\mod"):
                self.next()
                node = ("mod", node, self.signed())
            elif self.starts_atom():
                if token[0] in "0123456789.":  # two numbers side by side
                    raise Unreadable(token)
                node = _times(node, self.power())
            else:
                break
        return node

    def signed(self) -> Node:
        if self.take("-"):
            return ("neg", self.power())
        self.take("+")
        return self.power()

    def starts_atom(self) -> bool:
        token = self.peek()
        if token is None or (token == "|" and self.bars):
            return False
        return (token[0].isascii() and token[0].isalnum()) or token[0] in ".({[|" or self.is_function() or token in _COMMANDS

    def is_function(self) -> bool:
        return (self.peek() or "")[1:] in _UNARY | _SEVERAL and (self.peek() or "")[0] == "\\"

    def power(self) -> Node:
        token = self.peek() or ""
        node = self.atom()
        if token.isascii() and token.isdigit() and self.peek() == "\\frac":  # 1\frac{1}{2}
            part = self.atom()
            if part[0] == "/" and part[1][0] == part[2][0] == "num":
                top, bottom = part[1][1], part[2][1]
                if not (top.denominator == bottom.denominator == 1 and top < bottom):
                    raise Unreadable("neither a mixed number nor a product")
                node = ("num", node[1] + top / bottom)
            elif self.peek() == "^":
                raise Unreadable("^")
            else:
                node = _times(node, part)
        while self.take("!"):
            node = ("!", node)
        if self.take("^"):
            exponent = self.argument(circ=True)
            node = _times(node, _PI_OVER_180) if exponent[0] == "circ" else ("^", node, exponent)
            if self.peek() in ("^", "!"):
                raise Unreadable("^")
        return node

    def argument(self, circ: bool = False) -> Node:
        r"""What \frac, \sqrt and ^ take: a group, or one atom."""
        if self.take("{"):
            if circ and self.take("\\circ"):
                self.need("}")
                return ("circ",)
            node = self.sum()
            self.need("}")
            return node
        if circ and self.take("\\circ"):
            return ("circ",)
        if circ and self.take("-"):
            return ("neg", self.atom())
        return self.atom()

    def raw(self, close: str | None = None) -> str:
        """The text of the next token or group, unread."""
        token = self.next()
        closing = {"{": "}", "(": ")"}.get(token or "")
        if token is None or token in "})^_":
            raise Unreadable("nothing to name")
        if not closing:
            return token
        inner, depth = [], 1
        while depth:
            part = self.next()
            if part is None:
                raise Unreadable(closing)
            depth += (part in "{(") - (part in "})")
            inner.append(part)
        return " ".join(inner[:-1])

    def bracketed(self, close: str) -> list[Node]:
        nodes = [self.sum()]
        while self.take(","):
            nodes.append(self.sum())
        self.need(close)
        return nodes

    def atom(self) -> Node:
        token = self.next()
        if token is None:
            raise Unreadable("ends early")
        if token[0] in "0123456789" or token[0] == "." and len(token) > 1:
            if self.peek() == "_":  # digits in a base
                raise Unreadable("_")
            return ("num", _number(token))
        if token in "({[":
            nodes = self.bracketed({"(": ")", "{": "}", "[": "]"}[token])
            if len(nodes) > 1:
                raise Unreadable(",")
            return nodes[0]
        if token == "|":
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.need("|")
            return ("abs", node)
        if token.isascii() and token.isalpha():
            return self.name(token)
        name = token[1:]
        if name in _UNARY | _SEVERAL:
            return self.function(name)
        if name == "pi":
            return ("const", "pi")
        if name in _GREEK:
            return self.name(token)
        if name in _DECORATED:
            return self.name(f"{token}{{{self.raw()}}}")
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name == "binom":
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            root: Node = ("num", Fraction(2))
            if self.take("["):
                root = self.sum()
                self.need("]")
            return ("^", self.argument(), ("/", ("num", Fraction(1)), root))
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.need("\\r" + name[1:])
            return (name[1:], node)
        if name in ("sum", "prod"):
            self.need("_")
            self.need("{")
            index = self.next() or ""
            self.need("=")
            low = self.sum()
            self.need("}")
            self.need("^")
            if not re.fullmatch("[a-zA-Z]", index):
                raise Unreadable(index)
            high = self.argument()
            return (name, index, low, high, _rename(self.product(), index))
        raise Unreadable(token)

    def name(self, token: str) -> Node:
        plain = True
        while self.peek() in ("'", "_"):
            plain = False
            token += self.next() or ""
            if token[-1] == "_":
                token += "".join(self.raw().split()) + ";"
        if self.peek() == "(" and (token.rstrip("'") in _APPLIED or "'" in token):
            return ("var", f"{token}({self.raw()})")
        return ("const", token) if plain and token in ("e", "i") else ("var", token)

    def function(self, name: str) -> Node:
        base = power = None
        while self.peek() in ("_", "^"):
            if self.next() == "_":
                base = self.argument()
            else:
                power = self.argument(circ=True)
        if name in _SEVERAL:
            self.need("(")
            return (name, *self.bracketed(")"))
        if self.take("("):
            (node, *more) = self.bracketed(")")
            if more:
                raise Unreadable(name)
        elif self.is_function():
            node = self.power()
        else:
            if self.peek() == "|" and not self.bars:
                node = self.atom()
            else:
                node = self.power()
            while self.starts_atom() and not self.is_function():
                if self.peek() in ("(", "[", "|"):  # \ln x(x+1)
                    raise Unreadable(name)
                node = _times(node, self.power())
        if power == ("neg", ("num", Fraction(1))):
            if name not in _CIRCULAR:
                raise Unreadable(name)
            name, power = f"arc{name}", None
        if base is not None and name != "log":
            raise Unreadable(name)
        if name == "exp":
            called: Node = ("^", ("const", "e"), node)
        elif name in ("log", "lg"):
            called = ("/", ("ln", node), ("ln", base or ("num", Fraction(10))))
        else:
            called = (name, node)
        return ("^", called, power) if power else called


_COMMANDS = {f"\\{name}" for name in {*_GREEK, *_DECORATED, "pi", "frac", "binom", "sqrt", "lfloor", "lceil", "sum", "prod"}}


def _times(left: Node, right: Node) -> Node:
    return ("*", *(left[1:] if left[0] == "*" else [left]), right)


def _rename(node: Node, index: str) -> Node:
    """The body of a sum over i, where i is no imaginary unit."""
    if node == ("const", index):
        return ("var", index)
    return tuple(_rename(part, index) if isinstance(part, tuple) else part for part in node)


def _walk(node: Node) -> list[Node]:
    found = [node]
    for part in node[1:]:
        if isinstance(part, tuple):
            found += _walk(part)
    return found


def variables(*nodes: Node) -> set[str]:
    """Names of the free variables."""
    names: set[str] = set()
    for node in nodes:
        if node[0] == "var":
            names.add(node[1])
        elif node[0] in ("sum", "prod"):
            names |= variables(node[2], node[3]) | variables(node[4]) - {node[1]}
        elif node[0] == "at":
            names |= variables(node[1]) - node[2].keys()
        else:
            names |= variables(*(part for part in node[1:] if isinstance(part, tuple)))
    return names


def _is_plain(node: Node) -> bool:
    return node[0] == "num" or node[0] in ("neg", "/") and all(map(_is_plain, node[1:]))


def is_unevaluated(node: Node) -> bool:
    """Whether an operation is left to the reader: 17*23, 1/2+1/3, gcd(12, 18), a sum. Powers and roots are not."""
    for each in _walk(node):
        if each[0] in ("+", "*") and sum(map(_is_plain, each[1:])) > 1:
            return True
        if each[0] in ("sum", "prod", "mod", "evaluated", *_SEVERAL) and not variables(each):
            return True
    return False


# --- evaluating --------------------------------------------------------------------------------------------------


class _Evaluation:
    """The value of formulas at one point: a Fraction, or a number of mpmath."""

    def __init__(self, digits: int) -> None:
        _mp.dps = digits
        self.spread = 0.0  # the largest |log10| of a value on the way, and of the parts of a fraction

    def value(self, node: Node, env: dict[str, Fraction]) -> Any:
        if time.thread_time() > _deadline.get():
            raise TimeoutError
        return self.bounded(self.compute(node, env))

    def bounded(self, found: Any) -> Any:
        if isinstance(found, Fraction):
            bits = max(found.numerator.bit_length(), found.denominator.bit_length())
            if bits > MAX_BITS:
                raise Undefined("too large")
            spread = bits * 0.30103
        else:
            if not _mp.isfinite(found):
                raise Undefined("infinite")
            spread = abs(float(_mp.mag(found))) * 0.30103 if found else 0.0
            if spread > 4 * MAX_SPREAD:
                raise Undefined("too large")
        self.spread = max(self.spread, spread)
        return found

    def inexact(self, number: Any) -> Any:
        if isinstance(number, Fraction):
            # Parts of this size are not told apart by what inexact numbers can afford.
            if max(number.numerator.bit_length(), number.denominator.bit_length()) * 0.30103 > 4 * MAX_SPREAD:
                raise Undefined("too large")
            return _mp.mpf(number.numerator) / number.denominator
        return number

    def integer(self, number: Any, most: int) -> int:
        if not isinstance(number, Fraction) or number.denominator != 1 or abs(number) > most:
            raise Undefined("no integer")
        return int(number)

    def compute(self, node: Node, env: dict[str, Fraction]) -> Any:
        kind = node[0]
        if kind == "num":
            return node[1]
        if kind == "var":
            return env[node[1]]
        if kind == "const":
            return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.mpc(0, 1)}[node[1]]
        if kind == "at":
            return self.value(node[1], env | node[2])
        if kind in ("sum", "prod"):
            low, high = (self.integer(self.value(part, env), 10_000) for part in node[2:4])
            total: Any = Fraction(kind == "prod")
            for index in range(low, high + 1):
                term = self.value(node[4], env | {node[1]: Fraction(index)})
                total = self.bounded(self.add(total, term) if kind == "sum" else self.multiply(total, term))
            return total
        values = [self.value(part, env) for part in node[1:]]
        first = values[0]
        if kind == "neg":
            return -first
        if kind in ("+", "*"):
            for second in values[1:]:
                first = self.bounded(self.add(first, second) if kind == "+" else self.multiply(first, second))
            return first
        if kind == "/":
            if not values[1]:
                raise Undefined("division by 0")
            exact = isinstance(first, Fraction) and isinstance(values[1], Fraction)
            return first / values[1] if exact else self.inexact(first) / self.inexact(values[1])
        if kind == "^":
            return self.power(*values)
        if kind == "!":
            if (number := self.integer(first, 5000)) < 0:
                raise Undefined("factorial")
            return Fraction(math.factorial(number))
        if kind == "binom":
            top, bottom = (self.integer(number, 10_000) for number in values)
            if top < 0:
                raise Undefined("binomial")
            return Fraction(math.comb(top, bottom) if bottom >= 0 else 0)
        if kind in ("gcd", "lcm"):
            return Fraction(getattr(math, kind)(*(self.integer(number, 10**100) for number in values)))
        if kind == "mod":
            left, right = (self.integer(number, 10**100) for number in values)
            if right <= 0:
                raise Undefined("modulus")
            return Fraction(left % right)
        if kind in ("max", "min", "floor", "ceil"):
            if any(isinstance(number, _mp.mpc) for number in values):
                raise Undefined("complex numbers have no order")
            if kind in ("floor", "ceil"):
                return Fraction(int(getattr(_mp if not isinstance(first, Fraction) else math, kind)(first)))
            return (max if kind == "max" else min)(map(self.inexact, values))
        if kind == "scaled":
            return self.multiply(*values)
        if kind == "abs":
            return abs(first)
        if kind == "evaluated":
            return first
        return self.call(kind, self.inexact(first))

    def add(self, left: Any, right: Any) -> Any:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left + right
        return self.inexact(left) + self.inexact(right)

    def multiply(self, left: Any, right: Any) -> Any:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left * right
        return self.inexact(left) * self.inexact(right)

    def power(self, base: Any, exponent: Any) -> Any:
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction) and exponent.denominator == 1:
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if not base and exponent <= 0 or bits * abs(exponent) > MAX_BITS and abs(base) != 1:
                    raise Undefined("power")
                if abs(exponent) > 10**9:
                    raise Undefined("power")
                return base ** int(exponent)
            real = isinstance(base, Fraction) or not isinstance(base, _mp.mpc)
            if real and base < 0 and exponent.denominator % 2:  # the real root of odd order
                root = self.power(-base, exponent)
                return -root if exponent.numerator % 2 else root
        if not base:
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Undefined("power of 0")
        base, exponent = self.inexact(base), self.inexact(exponent)
        if abs(exponent) * (abs(_mp.log(abs(base))) + 4) > 10 * MAX_SPREAD:
            raise Undefined("too large")
        return base**exponent

    def call(self, kind: str, x: Any) -> Any:
        if kind == "ln":
            if not x:
                raise Undefined("ln 0")
            return _mp.log(x)
        if kind in ("sinh", "cosh", "tanh"):  # through exp, whose smallness is seen
            up = self.bounded(self.power(+_mp.e, x))
            return {"sinh": (up - 1 / up) / 2, "cosh": (up + 1 / up) / 2, "tanh": 1 - 2 / (up * up + 1)}[kind]
        if abs(x) > 10**9:
            raise Undefined("too large")
        try:
            return getattr(_mp, _INVERSE.get(kind, kind))(x)
        except (AttributeError, ZeroDivisionError) as error:
            raise Undefined(kind) from error


def _pair(left: Node, right: Node, env: dict[str, Fraction]) -> tuple[Any, Any, float]:
    """Both values, and how far apart equal ones may be."""
    with _lock:
        digits = 60
        for _ in range(2):
            evaluation = _Evaluation(digits)
            try:
                first, second = evaluation.value(left, env), evaluation.value(right, env)
                if isinstance(first, Fraction) and isinstance(second, Fraction):
                    return first, second, 0
                if evaluation.spread > MAX_SPREAD:
                    raise Undefined("too large")
                first, second = evaluation.inexact(first), evaluation.inexact(second)
            except (OverflowError, ValueError, ZeroDivisionError, RecursionError) as error:
                raise Undefined("mpmath") from error
            # What cancels may be as small as the product of a few values on the way.
            tolerance = _mp.mpf(10) ** -int(20 + 3 * evaluation.spread)
            if digits >= 40 + 4 * evaluation.spread:
                break
            digits = int(60 + 4 * evaluation.spread)
        return first, second, tolerance


def _points(count: int) -> list[list[Fraction]]:
    """Positive, signed and whole numbers. Odd denominators: every real base has its real root."""
    draw = random.Random(20260101)
    points = []
    for number in range(POINTS):
        if number % 3 == 0:
            point = [Fraction(draw.randint(1, 40), draw.choice((3, 7, 11))) for _ in range(count)]
        elif number % 3 == 1:
            point = [Fraction(draw.choice((-1, 1)) * draw.randint(1, 300), draw.choice((3, 7, 9))) for _ in range(count)]
        else:
            point = [Fraction(draw.randint(1, 12)) for _ in range(count)]
        points.append(point)
    return points


def equal(left: Node, right: Node) -> bool:
    """Whether two formulas have the same value wherever both have one, for real variables.

    Raises:
        TimeoutError: The time of `limit` is over.
    """
    if left == right:
        return True
    names = sorted(variables(left, right))
    imaginary = ("const", "i") in _walk(left) + _walk(right)
    compared = 0
    for point in _points(len(names)) if names else [[]]:
        try:
            first, second, tolerance = _pair(left, right, dict(zip(names, point, strict=True)))
        except Undefined:
            continue
        if not imaginary:
            outside = [not isinstance(x, Fraction) and abs(_mp.im(x)) > tolerance for x in (first, second)]
            if all(outside):
                continue
            if any(outside):
                return False
        if abs(first - second) > tolerance:
            return False
        compared += 1
    return compared >= (ENOUGH if names else 1)


def is_zero(node: Node) -> bool:
    return equal(node, ("num", Fraction(0)))


def minus(left: Node, right: Node) -> Node:
    return ("+", left, ("neg", right))


def ratio_sign(left: Node, right: Node) -> int:
    """The sign of c where left = c right with a constant c other than 0 and neither side is constant; else 0."""
    names = sorted(variables(left, right))
    for point in _points(len(names)) if names else []:
        here = dict(zip(names, point, strict=True))
        try:
            first, second, tolerance = _pair(left, right, here)
        except Undefined:
            continue
        if abs(first) <= tolerance or abs(second) <= tolerance:
            continue
        there, here_too = ("at", left, here), ("at", right, here)
        if equal(left, there) or not equal(("*", left, here_too), ("*", right, there)):
            return 0
        return 1 if _mp.re(first / second) > 0 else -1
    return 0


def solve(node: Node, name: str) -> tuple[Node, Node] | None:
    """The zero of a formula that is linear in a variable, and its slope there; None if it is not linear."""
    at = [("at", node, {name: Fraction(value)}) for value in (0, 1)]
    slope = minus(at[1], at[0])
    if is_zero(slope) or not equal(node, ("+", at[0], ("*", ("var", name), slope))):
        return None
    return ("neg", ("/", at[0], slope)), slope


def sign(node: Node) -> int:
    """The sign of a formula without variables; 0 if it has none."""
    try:
        first, _, tolerance = _pair(node, ("num", Fraction(0)), {})
    except Undefined:
        return 0
    if isinstance(first, Fraction):
        return (first > 0) - (first < 0)
    return 0 if abs(_mp.im(first)) > tolerance or abs(first) <= tolerance else 1 if _mp.re(first) > 0 else -1
