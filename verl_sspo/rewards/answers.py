r"""Reads final answers into typed values and compares them by type.

A value is a formula with its unit, a relation, a group (list, set, tuple, interval, union, matrix, vector, ratio) or a
text. Anything that cannot be read completely is a text, which equals only the same text. So a formula that is not
understood never counts as equal to a different one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from verl_sspo.rewards import formula
from verl_sspo.rewards.formula import Node, Unreadable, minus, number
from verl_sspo.rewards.notation import UPRIGHT, clean, key_of, words_of
from verl_sspo.rewards.units import NO_UNIT, Unit, split_unit

MAX_LENGTH = 1000  # characters of an answer; longer answers must be the same text
MAX_PARTS = 64  # elements of a set or list in any order
SECONDS = 1.0  # processor time for one answer


@dataclass(frozen=True)
class Text:
    key: str


@dataclass(frozen=True)
class Formula:
    node: Node
    unit: Unit = NO_UNIT

    @property
    def is_number(self) -> bool:
        return not formula.variables(self.node)


@dataclass(frozen=True)
class Relation:
    parts: tuple[str, ...]
    signs: tuple[str, ...]  # between the parts


@dataclass(frozen=True)
class Group:
    # "list", "set", "union", "all", "vector", "ratio", "(,)", "[,)" ..., "matrix [2, 2]", "cases [2, 2]"
    kind: str
    parts: tuple[Value, ...]


Value = Text | Formula | Relation | Group
EVERYTHING = Text(r"\mathbb{R}")
NOTHING = Text("")  # equals nothing: an equation of numbers that is false or trivial
INFINITE = ("-\\infty", "\\infty")

# --- reading -----------------------------------------------------------------------------------------------------

_SIGNS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~"}
_FLIPPED = {"=": "=", "<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_SIGN = r"\\(?:le|ge|ne|approx)(?![a-zA-Z])|[=<>]"
# In a text with one of these, commas do not separate elements, and a letter may be bound.
_WHOLE = re.compile(
    r"\\(?:in|notin|forall|exists|equiv|pmod|ldots|lim|int|sum|prod|partial)(?![a-zA-Z])"
    r"|\b(?:if|for|where|when|except)\b"
)
_MATRIX = re.compile(
    r"(?P<scale>[^&=]*?)[(\[]? ?\\begin ?\{(?P<kind>[pbBvV]?matrix|smallmatrix|array|cases)\}(?:\{[lcr| ]*\})?"
    r"(?P<body>.*)\\end ?\{(?P=kind)\} ?[)\]]?",
    re.DOTALL,
)
_AND_OR = r",? ?\\text ?\{ ?,? ?(?:and|or) ?\} ?|,? ?(?<![a-zA-Z])(?:and|or) ?(?=[^a-z ]|[a-z]\b)|[,;]"
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")


_BRACKET = r"\\(?:begin|end)\{|\\[{}]|\\.|[{(\[\])}]"


def _depth(bracket: str) -> int:
    """The change of depth at a match of `_BRACKET`."""
    if bracket.startswith("\\begin"):  # one level for its brace, one that \end{...} closes
        return 2
    return (bracket in ("\\{", "{", "(", "[")) - (bracket in ("\\}", "}", ")", "]"))


def _split(text: str, separator: str) -> list[str]:
    """Splits at separators outside all brackets. Returns pieces and separators alternately."""
    parts, depth, start = [], 0, 0
    for found in re.finditer(rf"(?P<cut>{separator})|{_BRACKET}", text, re.DOTALL):
        if found["cut"] is None:
            depth += _depth(found[0])
        elif not depth:
            parts += [text[start : found.start()].strip(), found[0].strip()]
            start = found.end()
    return [*parts, text[start:].strip()]


def _inside(text: str) -> tuple[str, str, str]:
    """Opening bracket, content and closing bracket; if no pair encloses the whole text, ("", text, "")."""
    found = re.fullmatch(r"(\\\{|[{(\[])(.*?)(\\\}|[})\]])", text, re.DOTALL)
    # An interval may open and close with any bracket.
    if found and found[1].strip("\\") + found[3].strip("\\") in ("{}", "()", "[]", "(]", "[)"):
        depths = list(accumulate(map(_depth, re.findall(_BRACKET, found[2])), initial=1))
        if min(depths) == depths[-1] == 1:
            return found[1], found[2].strip(), found[3]
    return "", text, ""


def read(text: str) -> Value:
    """Reads a cleaned text."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text).strip()  # "x in [0, 1]" is the interval
    opening, inner, _ = _inside(text)
    if opening in ("(", "{") and text[-1] != "]" and len(_split(inner, "[,;]")) == 1:
        return read(inner)
    if key_of(text).removeprefix("+") in INFINITE:
        return Text(key_of(text).removeprefix("+"))
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Group("set", ())
    if r"\begin" not in text and _WHOLE.search(text):
        return Text(words_of(text))
    return read_formula(text) or _read_matrix(text) or _read_group(text) or _read_relation(text) or Text(words_of(text))


def read_formula(text: str) -> Formula | None:
    """A number or formula with or without a unit; None for everything else."""
    if re.fullmatch(r"\D{0,3}\d{1,3}( \d{3})+(\.\d+)?", text):
        text = re.sub(r"(?<=\d) ", "", text)
    for body, unit in split_unit(text):
        words = re.sub(rf"\\[a-zA-Z]+|(?<![a-zA-Z])(?:{formula.FUNCTIONS})(?![a-zA-Z])", " ", body)
        if re.search(r"[a-zA-Z]{4,}|cis", words):
            continue
        try:
            node = formula.parse(body)
        except Unreadable:
            continue
        # Degrees inside a formula are numbers: cos 60 degrees.
        if unit.name != "degree" or not re.search("[a-z]", re.sub(r"\\(?:frac|sqrt|pi)", "", body)):
            return Formula(node, unit)
    return None


def _read_matrix(text: str) -> Group | None:
    found = _MATRIX.fullmatch(text)
    if not found or r"\begin" in found["body"]:
        return None
    kind = found["kind"] if found["kind"] in ("vmatrix", "Vmatrix", "cases") else "matrix"
    rows = [[cell.strip(" ,") for cell in row.split("&")] for row in found["body"].split(r"\\") if row.strip()]
    cells = [read(cell) for row in rows for cell in row]
    if scale := found["scale"].strip():
        factor = read_formula(scale)
        entries = [cell.node for cell in cells if isinstance(cell, Formula)]
        if not factor or kind != "matrix" or len(entries) < len(cells):
            return None
        # A quotient, because a product of numbers counts as not evaluated.
        cells = [Formula(("/", entry, ("/", number(1), factor.node))) for entry in entries]
    return Group(f"{kind} {[len(row) for row in rows]}", tuple(cells))


def _read_group(text: str) -> Value | None:
    if angle := re.fullmatch(r"\\langle(.*)\\rangle", text):
        return Group("vector", tuple(map(read, _split(angle[1], ",")[::2])))
    separated = _split(text, _AND_OR)
    if len(separated) > 1:
        parts = _elements(separated)
        if all(isinstance(part, Relation) and "=" not in part.signs for part in parts):
            words = {re.sub(r"\\text|[^a-z]", "", word) for word in separated[1::2]} - {""}
            return Group("union" if words == {"or"} else "all", parts)
        return Group("list", _without_name(parts))
    if len(union := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return Group("union", tuple(map(read, union[::2])))
    opening, inner, closing = _inside(text)
    if opening == r"\{":  # { x : x > 0 } is not a list of elements
        return None if re.search(r"[|:]", inner) else Group("set", _elements(_split(inner, "[,;]")))
    if len(_PLUS_MINUS.findall(text)) == 1:
        return Group("list", _without_name(_either(text)))
    if opening in ("(", "["):
        parts = tuple(map(read, _split(inner, "[,;]")[::2]))
        return Group(f"{opening},{closing}", parts) if len(parts) > 1 else None
    colons = _split(text, ":")
    if len(colons) > 1 and not re.search(r"(?<!\d)\d{1,2} ?: ?\d\d(?!\d)", text):
        parts = tuple(map(read, colons[::2]))
        if all(isinstance(part, Formula) and not part.unit.name for part in parts):
            return Group("ratio", parts)
    return None


def _elements(separated: list[str]) -> tuple[Value, ...]:
    """The elements of a set or list, each cleaned like a whole answer: `$1$, $2\\pm1$` has three."""
    return tuple(element for part in separated[::2] for element in _either(clean(part)))


def _either(text: str) -> tuple[Value, ...]:
    """The value, or both values if the text has one plus-minus sign."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return (read(text),)
    return tuple(read(re.sub(r"^ ?\+|(?<=[(=,]) ?\+", "", _PLUS_MINUS.sub(sign, text))) for sign in "+-")


def _without_name(parts: tuple[Value, ...]) -> tuple[Value, ...]:
    """`x = 1, x = 2` and `x = 1, 2` are `1, 2`."""
    named = [_named(part) for part in parts]
    if len({each[0] for each in named if each}) != 1:
        return parts
    return tuple(each[1] if each else part for each, part in zip(named, parts, strict=True))


def _read_relation(text: str) -> Value | None:
    pieces = _split(text, _SIGN)
    parts, signs = pieces[::2], [_SIGNS[sign] for sign in pieces[1::2]]
    if not signs or not all(parts):
        return None
    if "~" in signs:  # "sqrt 5, about 2.236" is sqrt 5 if the rounded value fits
        first = signs.index("~")
        numbers = [each.node for each in map(read, parts[first:]) if isinstance(each, Formula) and each.is_number]
        if len(numbers) < len(parts) - first or not all(_is_close(numbers[0], each) for each in numbers[1:]):
            return None
        parts, signs = parts[: first + 1], signs[:first]
    values = [read(part) for part in parts]
    if set(signs) <= {"="} and all(isinstance(each, Formula) and each.is_number for each in values):
        # "2 + 3 = 5" is 5; "3 = 3" and "6 = 5" are not answers.
        distinct = len(values) == 1 or len({key_of(part) for part in parts}) > 1
        true = all(compare(first, second) for first, second in pairwise(values))
        return values[-1] if distinct and true else NOTHING
    if len(signs) > 1 and set(signs) == {"="} and all(compare(one, other) for one, other in pairwise(values[1:])):
        parts, signs = [parts[0], parts[-1]], ["="]  # "x = 2 + 3 = 5" is "x = 5"
    return Relation(tuple(parts), tuple(signs))


def _is_close(exact: Node, rounded: Node) -> bool:
    allowed = ("/", ("abs", exact), number(100))
    return formula.sign(minus(allowed, ("abs", minus(exact, rounded)))) > 0


_LETTER = r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma))(?:_(?:\w|\{ ?\w+ ?\}))?"
_NAME = re.compile(
    rf"(?![ei]$){_LETTER}'*|[a-zA-Z]'*\( ?[\w, ]+ ?\)|[A-Z]{{2}}|\( ?{_LETTER}(?: ?, ?{_LETTER})+ ?\)"
    rf"|\\(?:vec|mathbf|angle|overline)[{{ ]?\w+\}}?|{UPRIGHT}"
)


def _named(value: Value) -> tuple[str, Value] | None:
    """Name and value of "x = 5", "f(x) = 2x", "(x, y) = (1, 2)"; None where neither side is just a name."""
    if not isinstance(value, Relation) or value.signs != ("=",):
        return None
    for name, other in (value.parts, value.parts[::-1]):
        if _NAME.fullmatch(name):
            known = read(other)
            says_nothing = isinstance(known, Formula) and key_of(name) in formula.variables(known.node)
            return None if says_nothing else (key_of(name), known)
    return None


# --- comparing ---------------------------------------------------------------------------------------------------


def is_equal(gold: str, answer: str) -> bool:
    """Whether an answer means the same as the gold answer.

    Raises:
        TimeoutError: It took longer than `SECONDS` of processor time.
    """
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return bool(gold.strip()) and gold.strip() == answer.strip()
    formula.limit(SECONDS)
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    try:
        right, given = read(gold), read(answer)
        if given == NOTHING:
            return False
        words = key_of(gold), key_of(answer)
        same_word = words[0].lower() == words[1].lower() and all(re.fullmatch("[A-Z]?[a-z]+", each) for each in words)
        if words[0] == words[1] or (same_word and len(words[0]) > 1):
            return True
        return _equal_choices(gold, answer) or compare(right, given)
    except RecursionError:  # hundreds of nested brackets
        return False


_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?(\()?([A-J])(\)|[.:](?= |$))?(?: ?(\S.*))?", re.DOTALL)


def _equal_choices(gold: str, answer: str) -> bool:
    """Multiple choice: the letter, the letter with its text, or the text alone if the gold answer has it."""
    plain, said = (" ".join(re.sub(UPRIGHT, r"\1 ", text).split()) for text in (gold, answer))
    if re.fullmatch("[A-J]{2,6}", plain) and sorted(set(plain)) == list(plain):  # several letters
        return sorted(re.split(" ?, ?| and | ", said)) == list(plain)
    right, given = _choice(plain), _choice(said)
    if not right:
        return False
    if not given:
        return bool(right[1]) and compare(read(clean(right[1])), read(answer))
    differ = right[1] and given[1] and not compare(read(clean(right[1])), read(clean(given[1])))
    return right[0] == given[0] and not differ


def _choice(text: str) -> tuple[str, str] | None:
    """Letter and text of an option."""
    found = _CHOICE.fullmatch(text)
    if not found or (found[1] and found[3] != ")"):
        return None
    rest = found[4] or ""
    if rest and (not found[3] or not re.match(r"(?!(?:and|or|not)\b)[\w$\\]", rest) or _CHOICE.fullmatch(rest)):
        return None
    return found[2], rest


def compare(gold: Value, answer: Value) -> bool:
    """Whether two values are the same answer."""
    if gold == answer:
        return gold != NOTHING
    regions = _regions(gold), _regions(answer)
    if regions[0] and regions[1]:
        names = {region.name for region in (*regions[0], *regions[1])} - {""}
        return len(names) < 2 and _same_elements(*regions, _equal_regions)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _equal_relations(gold, answer)
    # "x = 5" and "5" are the same answer.
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        named = _named(gold) or _named(answer)
        return named is not None and compare(*((named[1], answer) if isinstance(gold, Relation) else (gold, named[1])))
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _equal_groups(gold, answer)
    return isinstance(gold, Formula) and isinstance(answer, Formula) and _equal_formulas(gold, answer)


def _equal_formulas(gold: Formula, answer: Formula) -> bool:
    left, right = gold.node, answer.node
    if formula.is_unevaluated(right) and not formula.is_unevaluated(left):
        return False
    if gold.unit.name and answer.unit.name:
        ratio = gold.unit.ratio(answer.unit)
        return ratio is not None and formula.equal(("*", number(ratio), left), right)
    with_unit, plain = (left, right) if gold.unit.name else (right, left)
    unit = gold.unit.name or answer.unit.name
    if unit == "%":
        # 25% equals 1/4, and also 25. Below 1, a number without % is a fraction. 1 equals 100%; gold 1% also accepts 1.
        size = formula.sign(minus(("abs", plain), number(1)))
        same = (size > 0 or (bool(gold.unit.name) and size == 0)) and formula.equal(with_unit, plain)
        return same or formula.equal(("/", with_unit, number(100)), plain)
    if unit == "degree" and "'pi'" in str(plain) and formula.equal(("*", with_unit, formula.DEGREE), plain):
        return True
    return formula.equal(left, right)


def _equal_groups(gold: Group, answer: Group) -> bool:
    kinds = {gold.kind, answer.kind}
    if kinds <= {"set", "list"} or kinds == {"union"} or kinds == {"all"}:
        # `x = 1, y = 2` says which value is which; `1, 2` does not.
        named = [{each[0] for each in map(_named, group.parts) if each} for group in (gold, answer)]
        return named[0] == named[1] and _same_elements(gold.parts, answer.parts, compare)
    if len(gold.parts) != len(answer.parts):
        return False
    if kinds == {"ratio"}:
        nodes = [[part.node for part in group.parts if isinstance(part, Formula)] for group in (gold, answer)]
        pairs = zip(*nodes, strict=True)
        return all(formula.equal(("*", nodes[0][0], two), ("*", nodes[1][0], one)) for one, two in pairs)
    column = f"matrix {[1] * len(gold.parts)}"
    same = len(kinds) == 1 or ("vector" in kinds and kinds <= {"vector", column, "(,)"})
    return same and all(map(compare, gold.parts, answer.parts))


def _same_elements(gold: Sequence[Any], answer: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_PARTS:
        return False
    left = list(answer)
    for element in gold:
        left.sort(key=lambda other: other != element)  # most elements need no algebra
        match = next((place for place, other in enumerate(left) if same(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _equal_relations(gold: Relation, answer: Relation) -> bool:
    if len(gold.signs) != len(answer.signs):
        return False
    flipped = Relation(answer.parts[::-1], tuple(_FLIPPED[sign] for sign in answer.signs[::-1]))
    for other in (answer, flipped):
        pairs = list(zip(gold.parts, other.parts, strict=True))
        if gold.signs == other.signs and any(key_of(one) == key_of(two) for one, two in pairs):
            return all(key_of(one) == key_of(two) or compare(read(one), read(two)) for one, two in pairs)
    if len(gold.signs) > 1:
        return False
    try:
        left, right = (minus(*map(formula.parse, each.parts)) for each in (gold, answer))
    except Unreadable:
        return False
    if ratio := formula.ratio_sign(left, right):
        return gold.signs == (answer.signs if ratio > 0 else flipped.signs)
    shared = formula.variables(left) & formula.variables(right)
    if gold.signs != ("=",) or answer.signs != ("=",) or len(shared) < 2:
        return False
    solved = [(formula.solve(left, name), formula.solve(right, name)) for name in sorted(shared)]
    return any(one and two and formula.equal(one[0], two[0]) for one, two in solved)


# --- intervals ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """An interval: its two ends, each a formula or one of `INFINITE`, and whether they belong to it."""

    low: Node | str = INFINITE[0]
    high: Node | str = INFINITE[1]
    has_low: bool = False
    has_high: bool = False
    name: str = ""  # of the variable, if there is one


def _regions(value: Value) -> list[Region]:
    """The intervals of an inequality, union or interval; empty for all else. A finite (a, b) counts as a point."""
    if value == EVERYTHING:
        return [Region()]
    if isinstance(value, Relation):
        return _solutions(value)
    if not isinstance(value, Group):
        return []
    if value.kind == "union":
        parts = [_interval(part) or _regions(part) for part in value.parts]
        return [region for part in parts for region in part] if all(parts) else []
    infinite = any(isinstance(part, Text) and part.key in INFINITE for part in value.parts)
    return _interval(value) if infinite or value.kind in ("[,)", "(,]", "[,]") else []


def _interval(value: Value) -> list[Region]:
    if not isinstance(value, Group) or len(value.parts) != 2 or value.kind[0] not in "([":
        return []
    low, high = (part.node if isinstance(part, Formula) else getattr(part, "key", None) for part in value.parts)
    return [Region(low, high, value.kind[0] == "[", value.kind[-1] == "]")] if low and high else []


def _solutions(relation: Relation) -> list[Region]:
    """The intervals of inequalities that are linear in one variable."""
    low: tuple[Any, bool] = (INFINITE[0], False)
    high: tuple[Any, bool] = (INFINITE[1], False)
    names: set[str] = set()
    for sign, pair in zip(relation.signs, pairwise(relation.parts), strict=True):
        try:
            node = minus(*map(formula.parse, pair))
        except Unreadable:
            return []
        names |= formula.variables(node)
        solved = formula.solve(node, min(names)) if len(names) == 1 and sign not in "=~" else None
        slope = formula.sign(solved[1]) if solved else 0
        if not solved or not slope:
            return []
        sign = sign if slope > 0 else _FLIPPED[sign]
        if sign == "!=" and len(relation.signs) == 1:
            return [Region(high=solved[0], name=min(names)), Region(low=solved[0], name=min(names))]
        if sign[0] == "<" and high[0] == INFINITE[1]:
            high = solved[0], sign == "<="
        elif sign[0] == ">" and low[0] == INFINITE[0]:
            low = solved[0], sign == ">="
        else:
            return []
    return [Region(low[0], high[0], low[1], high[1], min(names))]


def _equal_regions(gold: Region, answer: Region) -> bool:
    def same(one: Node | str, other: Node | str) -> bool:
        return one == other or (isinstance(one, tuple) and isinstance(other, tuple) and formula.equal(one, other))

    closed = (gold.has_low, gold.has_high) == (answer.has_low, answer.has_high)
    return closed and same(gold.low, answer.low) and same(gold.high, answer.high)
