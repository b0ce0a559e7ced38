r"""LaTeX formulas: read completely or not at all, and compared by value.

`parse` reads every sign of a formula or raises `Unreadable`. `equal` evaluates two formulas at fixed points: rational
values exactly, all others with enough digits for the smallest intermediate value. Size and time are bounded: a tower
of powers is undefined here, and no comparison takes longer than `limit` allows.
"""

from __future__ import annotations

import math
import operator
import random
import re
import threading
import time
from contextvars import ContextVar
from fractions import Fraction
from functools import reduce
from typing import Any

import mpmath

MAX_BITS = 100_000  # of numerator and denominator of an exact number
MAX_PLACES = 1000.0  # largest |log10| of the intermediate values of an inexact number
ENOUGH = 4  # points at which both formulas have a value

Node = tuple[Any, ...]  # an operation and its operands; ("num", Fraction), ("var", name) or ("const", name)

_mp = mpmath.MPContext()
_lock = threading.Lock()  # mpmath shares the precision and its caches between threads
_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


class Unreadable(ValueError):
    """The text is not a formula, or it has several meanings."""


class Undefined(ArithmeticError):
    """The formula has no value at this point, or one that is too large."""


def limit(seconds: float) -> None:
    """Lets this thread's formulas raise TimeoutError after that many more seconds of its processor time."""
    _deadline.set(time.thread_time() + seconds)


def number(value: int | Fraction) -> Node:
    return ("num", Fraction(value))


def minus(left: Node, right: Node) -> Node:
    return ("+", left, ("neg", right))


# --- reading -----------------------------------------------------------------------------------------------------

_CIRCULAR = ("sin", "cos", "tan", "cot", "sec", "csc")
_UNARY = {*_CIRCULAR, *(f"arc{name}" for name in _CIRCULAR), "sinh", "cosh", "tanh", "log", "ln", "exp"}
_SEVERAL = {"gcd", "lcm", "max", "min"}
#: Regular expression of function names, which people also write without the backslash.
FUNCTIONS = "|".join(sorted({*_UNARY, *_SEVERAL, "sqrt"}, key=len, reverse=True))
_LETTER = (
    r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau"
    r"|upsilon|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell)(?![a-zA-Z]))"
)
_DECORATED = r"\\(?:hat|vec|bar|d?dot|tilde|overline|mathbf|boldsymbol|mathcal)(?: ?\{[^{}]*\}| [a-zA-Z])"
# f(x) is the value of a function; other letters multiply a bracket.
_APPLIED = r"(?:[fghuFGH]|\\(?:var)?phi|\\psi|\\Gamma|\\delta)'*\([^()]*\)|[a-zA-Z]'+\([^()]*\)"
_TOKEN = re.compile(
    rf"(?P<num>\d*\.\d+\\overline ?\{{ ?\d+ ?\}}|\d*\.\\overline ?\{{ ?\d+ ?\}}"
    rf"|(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\d.])|\.\d+)"
    rf"|(?P<name>{_APPLIED}|(?:{_DECORATED}|{_LETTER})(?:_(?:\{{[^{{}}]*\}}|\w))?'*)"
    r"|(?P<command>\\[a-zA-Z]+)|(?P<sign>\S)",
    re.ASCII,
)
# Differentials look like products of letters, the derivative x^{(3)} like a power, and products of vectors like
# products of numbers.
_AMBIGUOUS = re.compile(
    r"\\frac ?\{[^{}]*d[^{}]*\} ?\{ ?d ?\\?[a-zA-Z]|d\w? ?/ ?d\w|\^ ?\{ ?\( ?\w+ ?\) ?\}"
    r"|\\(?:vec|mathbf).*\\(?:cdot|times)|\\(?:cdot|times).*\\(?:vec|mathbf)",
    re.DOTALL,
)
DEGREE: Node = ("/", ("const", "pi"), number(180))
_ATOMS = {"\\frac", "\\binom", "\\sqrt", "\\pi", "\\lfloor", "\\lceil"}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def parse(text: str) -> Node:
    """Reads a formula.

    Raises:
        Unreadable: Part of it cannot be read, or it has several meanings, like 1/2x.
    """
    text = re.sub(rf"(?<![\\a-zA-Z])({FUNCTIONS}|pi)(?![a-zA-Z])", r"\\\1 ", text)
    if _AMBIGUOUS.search(text):
        raise Unreadable(text)
    parser = _Parser([(str(found.lastgroup), found[0]) for found in _TOKEN.finditer(text)])
    node = parser.sum()
    if parser.kind:
        raise Unreadable(text)
    return node


def _literal(token: str) -> Node:
    lead, _, period = token.replace(",", "").partition(r"\overline")
    if not period:
        if len(lead.lower().partition("e")[2]) > 4:
            raise Unreadable(token)
        return number(Fraction(lead))
    digits = period.strip("{} ")
    places = len(lead.partition(".")[2])
    return number(Fraction(lead.rstrip(".") or "0") + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = [*tokens, ("", "")]
        self.place = 0
        self.bars = 0  # open | signs

    @property
    def kind(self) -> str:
        return self.tokens[self.place][0]

    @property
    def token(self) -> str:
        return self.tokens[self.place][1]

    def next(self) -> str:
        self.place += self.kind != ""
        return self.tokens[self.place - 1][1]

    def take(self, *tokens: str) -> str:
        return self.next() if self.token in tokens and self.kind else ""

    def need(self, token: str) -> None:
        if not self.take(token):
            raise Unreadable(f"no {token}")

    def sum(self) -> Node:
        terms = [self.product()]
        while sign := self.take("+", "-"):
            term = self.product()
            terms.append(term if sign == "+" else ("neg", term))
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.take("*", "\\cdot", "\\times"):
                node = _times(node, self.signed())
            elif self.take("/", "\\div"):
                node = ("/", node, self.signed())
                if self.starts_atom():  # 1/2x
                    raise Unreadable("a/bc")
            elif self.kind == "num":
                raise Unreadable("two numbers side by side")
            elif self.starts_atom():
                node = _times(node, self.power())
            else:
                return node

    def signed(self) -> Node:
        if self.take("-"):
            return ("neg", self.power())
        self.take("+")
        return self.power()

    def is_function(self) -> bool:
        return self.kind == "command" and self.token[1:] in _UNARY | _SEVERAL

    def starts_atom(self) -> bool:
        opens = self.token in _CLOSING or (self.token == "|" and not self.bars)
        return self.kind in ("num", "name") or self.token in _ATOMS or self.is_function() or opens

    def power(self) -> Node:
        whole = self.token.isdecimal()
        node = self.atom()
        if whole and self.token == "\\frac":
            node = self.mixed(node)
        while self.take("!"):
            node = ("!", node)
        if self.take("^"):
            exponent = self.exponent()
            node = ("^", node, exponent) if exponent else _times(node, DEGREE)
            if self.token in ("^", "!"):
                raise Unreadable("a^b^c")
        return node

    def mixed(self, whole: Node) -> Node:
        r"""1\frac{1}{2} is 1.5, 2\frac{x}{3} a product, and 2\frac{3}{2} neither."""
        part = self.atom()
        if part[1][0] != "num" or part[2][0] != "num":
            return _times(whole, part)
        value = part[1][1] / part[2][1] if part[2][1] else Fraction(1)
        if part[1][1].denominator != 1 or part[2][1].denominator != 1 or value >= 1:
            raise Unreadable("neither a mixed number nor a product")
        return number(whole[1] + value)

    def exponent(self) -> Node | None:
        """The exponent after ^; None for the degree sign."""
        if self.take("\\circ"):
            return None
        if self.take("-"):
            return ("neg", self.atom())
        return self.atom()

    def atom(self) -> Node:
        kind, token = self.kind, self.next()
        if kind == "num":
            if self.token == "_":  # digits in a base
                raise Unreadable("_")
            return _literal(token)
        if kind == "name":
            return ("const", token) if token in ("e", "i") else ("var", re.sub(r"[{} ]", "", token))
        if token in _CLOSING:
            return self.until(_CLOSING[token])
        if token == "|":
            self.bars += 1
            node = self.until("|")
            self.bars -= 1
            return ("abs", node)
        if token == "\\pi":
            return ("const", "pi")
        if token in ("\\frac", "\\binom"):
            return ("/" if token == "\\frac" else "binom", self.atom(), self.atom())
        if token == "\\sqrt":
            root = self.until("]") if self.take("[") else number(2)
            return ("^", self.atom(), ("/", number(1), root))
        if token in ("\\lfloor", "\\lceil"):
            return (token[2:], self.until("\\r" + token[2:]))
        name = token[1:]
        if kind == "command" and name in _UNARY:
            return self.function(name)
        if kind == "command" and name in _SEVERAL:
            self.need("(")
            nodes = [self.sum()]
            while self.take(","):
                nodes.append(self.sum())
            self.need(")")
            return (name, *nodes)
        raise Unreadable(token)

    def until(self, closing: str) -> Node:
        node = self.sum()
        self.need(closing)
        return node

    def function(self, name: str) -> Node:
        base = self.atom() if self.take("_") else None
        power = self.exponent() if self.take("^") else None
        bracketed = self.token in ("(", "[", "{", "|")
        node = self.atom() if bracketed else self.power()
        while not bracketed and self.starts_atom() and not self.is_function():
            if self.kind == "sign" or self.kind == "num":  # \ln x(x+1)
                raise Unreadable(name)
            node = _times(node, self.power())
        inverse = power == ("neg", number(1))
        if (inverse and name not in _CIRCULAR) or (base and name != "log"):
            raise Unreadable(name)
        called: Node = (f"arc{name}" if inverse else name, node)
        if name == "exp":
            called = ("^", ("const", "e"), node)
        elif name == "log":
            called = ("/", ("ln", node), ("ln", base or number(10)))
        return ("^", called, power) if power and not inverse else called


def _times(left: Node, right: Node) -> Node:
    return ("*", *(left[1:] if left[0] == "*" else [left]), right)


def _walk(node: Node) -> list[Node]:
    return [node, *(each for part in node[1:] if isinstance(part, tuple) for each in _walk(part))]


def variables(*nodes: Node) -> set[str]:
    """Names of the variables."""
    return {each[1] for node in nodes for each in _walk(node) if each[0] == "var"}


def _at(node: Node, point: dict[str, Fraction]) -> Node:
    """The formula with numbers for some of its variables."""
    if node[0] == "var" and node[1] in point:
        return number(point[node[1]])
    return tuple(_at(part, point) if isinstance(part, tuple) else part for part in node)


def is_unevaluated(node: Node) -> bool:
    """Whether an operation is not carried out: 17*23, 1/2+1/3, gcd(12, 18). Powers, roots and a fraction may remain."""

    def plain(part: Node) -> bool:
        return part[0] == "num" or (part[0] in ("neg", "/") and all(map(plain, part[1:])))

    return any(
        (each[0] in ("+", "*") and sum(map(plain, each[1:])) > 1) or (each[0] in _SEVERAL and not variables(each))
        for each in _walk(node)
    )


# --- evaluating --------------------------------------------------------------------------------------------------


class _Evaluation:
    """The value of formulas at one point: a Fraction, or a number of mpmath."""

    def __init__(self, digits: int) -> None:
        _mp.dps = digits
        self.places = 0.0  # the largest |log10| of an intermediate value, or of a fraction's numerator or denominator

    def value(self, node: Node, point: dict[str, Fraction]) -> Any:
        if time.thread_time() > _deadline.get():
            raise TimeoutError
        kind = node[0]
        if kind in ("num", "var"):
            return self.bounded(node[1] if kind == "num" else point[node[1]])
        if kind == "const":
            return {"pi": +_mp.pi, "e": +_mp.e, "i": _mp.mpc(0, 1)}[node[1]]
        values = [self.value(part, point) for part in node[1:]]
        if kind == "^":
            return self.bounded(self.power(*values))
        if kind in ("!", "binom", "gcd", "lcm"):
            return self.bounded(Fraction(_whole_numbers(kind, values)))
        if not all(isinstance(each, Fraction) for each in values) or kind in _UNARY:
            values = [self.inexact(each) for each in values]
        if kind in ("+", "*"):
            function = operator.add if kind == "+" else operator.mul
            return reduce(lambda left, right: self.bounded(function(left, right)), values)
        return self.bounded(self.call(kind, *values))

    def bounded(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        elif _mp.isfinite(value):
            bits = abs(int(_mp.mag(value))) if value else 0
        else:
            raise Undefined("infinite")
        if bits > MAX_BITS:
            raise Undefined("too large")
        self.places = max(self.places, bits * 0.30103)
        return value

    def inexact(self, value: Any) -> Any:
        return _mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def power(self, base: Any, exponent: Any) -> Any:
        if not base:
            if isinstance(exponent, Fraction) and exponent > 0:
                return base
            raise Undefined("power of 0")
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction) and exponent.denominator == 1:
                bits = max(base.numerator.bit_length(), base.denominator.bit_length())
                if bits * abs(exponent) > 2 * MAX_BITS:
                    raise Undefined("too large")
                return base ** int(exponent)
            if not isinstance(base, _mp.mpc) and base < 0 and exponent.denominator % 2:  # an odd root is real
                return self.power(-base, exponent) * (-1) ** exponent.numerator
        base, exponent = self.inexact(base), self.inexact(exponent)
        if abs(exponent) * (abs(_mp.log(abs(base))) + 4) > 4 * MAX_PLACES:
            raise Undefined("too large")
        return base**exponent

    def call(self, kind: str, x: Any, *more: Any) -> Any:
        if kind == "/":
            if not more[0]:
                raise Undefined("division by 0")
            return x / more[0]
        if kind in ("neg", "abs"):
            return -x if kind == "neg" else abs(x)
        if kind in ("floor", "ceil", "max", "min"):
            if any(isinstance(each, _mp.mpc) for each in (x, *more)):
                raise Undefined("complex numbers have no order")
            if kind in ("max", "min"):
                return (max if kind == "max" else min)(x, *more)
            return Fraction(int(getattr(_mp, kind)(self.inexact(x))))
        if kind in ("sinh", "cosh", "tanh"):  # computed with exp, so that small values are noticed
            up = self.bounded(self.power(+_mp.e, x))
            return {"sinh": (up - 1 / up) / 2, "cosh": (up + 1 / up) / 2, "tanh": 1 - 2 / self.bounded(up * up + 1)}[
                kind
            ]
        if abs(x) > 10**9 and kind != "ln":
            raise Undefined("too large")
        if not x and kind == "ln":
            raise Undefined("ln 0")
        return getattr(_mp, kind.replace("arc", "a"))(x)


def _whole_numbers(kind: str, values: list[Any]) -> int:
    if any(not isinstance(each, Fraction) or each.denominator != 1 or not 0 <= each <= 10_000 for each in values):
        raise Undefined("no whole number")
    function = {"!": math.factorial, "binom": math.comb, "gcd": math.gcd, "lcm": math.lcm}[kind]
    return function(*map(int, values))  # type: ignore[operator]


def _values(left: Node, right: Node, point: dict[str, Fraction]) -> tuple[Any, Any, Any]:
    """Both values, and the tolerance within which they are equal."""
    digits = 60
    try:
        while True:
            evaluation = _Evaluation(digits)
            first, second = evaluation.value(left, point), evaluation.value(right, point)
            if isinstance(first, Fraction) and isinstance(second, Fraction):
                return first, second, 0
            if evaluation.places > MAX_PLACES:
                raise Undefined("too large")
            # A difference may be as small as the product of a few intermediate values.
            if digits > 60 or digits >= 40 + 4 * evaluation.places:
                tolerance = _mp.mpf(10) ** -int(20 + 3 * evaluation.places)
                return evaluation.inexact(first), evaluation.inexact(second), tolerance
            digits = int(60 + 4 * evaluation.places)
    except (OverflowError, ValueError, ZeroDivisionError) as error:  # poles of mpmath's functions
        raise Undefined("a pole") from error


def _points(names: set[str]) -> list[dict[str, Fraction]]:
    """Positive, signed and whole numbers. With odd denominators every real base has a real root."""
    draw = random.Random(20260101)
    families = (
        lambda: Fraction(draw.randint(1, 40), draw.choice((3, 7, 11))),
        lambda: Fraction(draw.choice((-1, 1)) * draw.randint(1, 300), draw.choice((3, 7, 9))),
        lambda: Fraction(draw.randint(1, 12)),
    )
    return [{name: family() for name in sorted(names)} for _ in range(10) for family in families] if names else [{}]


def equal(left: Node, right: Node) -> bool:
    """Whether two formulas have the same value wherever both have one, for real variables.

    Raises:
        TimeoutError: The time set by `limit` is over.
    """
    if left == right:
        return True
    names = variables(left, right)
    imaginary = ("const", "i") in _walk(left) + _walk(right)
    compared = 0
    for point in _points(names):
        with _lock:
            try:
                first, second, tolerance = _values(left, right, point)
            except Undefined:
                continue
            if not imaginary:
                outside = [not isinstance(each, Fraction) and abs(_mp.im(each)) > tolerance for each in (first, second)]
                if any(outside):
                    if all(outside):
                        continue
                    return False
            if abs(first - second) > tolerance:
                return False
        compared += 1
    return compared >= (ENOUGH if names else 1)


def sign(node: Node) -> int:
    """The sign of a formula without variables; 0 if its value is 0, not real or undefined."""
    with _lock:
        try:
            value, _, tolerance = _values(node, number(0), {})
        except Undefined:
            return 0
        if not isinstance(value, Fraction) and abs(_mp.im(value)) > tolerance:
            return 0
        return 0 if abs(value) <= tolerance else 1 if _mp.re(value) > 0 else -1


def ratio_sign(left: Node, right: Node) -> int:
    """The sign of c if left = c * right with a constant c other than 0, and the sides are not constant; else 0."""
    for point in _points(names) if (names := variables(left, right)) else []:
        here = _at(left, point), _at(right, point)
        ratio = sign(("/", *here))
        if ratio:
            constant = equal(left, here[0])
            return 0 if constant or not equal(("*", left, here[1]), ("*", right, here[0])) else ratio
    return 0


def solve(node: Node, name: str) -> tuple[Node, Node] | None:
    """Where a formula that is linear in a variable is 0, and its slope there; None if it is not linear."""
    at_0, at_1 = (_at(node, {name: Fraction(value)}) for value in (0, 1))
    slope = minus(at_1, at_0)
    if equal(slope, number(0)) or not equal(node, ("+", at_0, ("*", ("var", name), slope))):
        return None
    return ("neg", ("/", at_0, slope)), slope
