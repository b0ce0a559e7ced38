r"""Final answers: read into a value with a type, and compared by type.

A value is a number or formula with its unit, a relation, a group (list, set, tuple or interval, union, matrix, vector,
cases, ratio), or a text. What cannot be read whole is a text, which equals only the same text: a formula that is not
understood is never taken for another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from verl_sspo.rewards import formula
from verl_sspo.rewards.formula import Node, Unreadable
from verl_sspo.rewards.units import Unit, split_unit

MAX_LENGTH = 1000  # characters of an answer; longer ones count only if they are the same text
MAX_PARTS = 64  # elements of a set or list whose order is free
SECONDS = 2.0  # processor time for one answer


@dataclass(frozen=True)
class Text:
    key: str  # what has to be the same


@dataclass(frozen=True)
class Formula:
    node: Node
    unit: Unit | None = None


@dataclass(frozen=True)
class Relation:
    parts: tuple[str, ...]
    signs: tuple[str, ...]  # between the parts


@dataclass(frozen=True)
class Group:
    kind: str  # "list", "set", "union", "(,)", "[,)" and so on, "matrix 2", "vector", "cases", "ratio"
    parts: tuple[Value, ...]


Value = Text | Formula | Relation | Group

# --- one spelling ------------------------------------------------------------------------------------------------

_PLAIN = {
    **dict.fromkeys("−–—‑", "-"), "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
    "θ": r"\theta ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∅": r"\emptyset ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "∕": "/",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "√": r"\sqrt ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "′": "'", "£": r"\pounds ", "€": r"\euro ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\leqslant": r"\le",
    r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lt": "<", r"\gt": ">", "<=": r"\le ", ">=": r"\ge ",
    "!=": r"\ne ", "**": "^", r"\lbrace": r"\{", r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\to": r"\to",
    r"\degree": r"^\circ", r"^{\circ}": r"^\circ", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(",
    r"\rparen": ")", r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\prime": "'", r"^{\prime}": "'", r"\dbinom": r"\binom",
    r"\tbinom": r"\binom", r"\mid": "|", r"\colon": ":", r"\dots": r"\ldots", "...": r"\ldots ", r"\cdots": r"\ldots", "…": r"\ldots ",
}  # fmt: skip
_PLAIN_RE = re.compile(
    "|".join(re.escape(key) + r"(?![a-zA-Z])" * key[-1].isalpha() for key in sorted(_PLAIN, key=len, reverse=True))
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_TEXT = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathsf|mbox|operatorname)\*?\s*\{([^{}]*)\}"
_UPRIGHT = _TEXT.replace("|mathbf", "")
_ANSWER_IS = r"(?:the )?(?:final )?answer ?(?:is ?:?|:) ?"
_OPENING = re.compile(rf"(?:\\text ?\{{ ?{_ANSWER_IS}\}}|{_ANSWER_IS})(?![a-zA-Z])", re.IGNORECASE)
_BASES = "two three four five six seven eight nine ten eleven twelve".split()


def clean(text: str) -> str:
    """One spelling for what LaTeX, Markdown and people spell in several ways."""
    text = re.sub(r"<\|[^|>]*\|>$", "", text.translate(_FULL_WIDTH).strip())
    text = re.sub(r"(?:\\\\|[\s.;,])+$", "", text)
    for left, right in (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inner = text[len(left) : -len(right)]
            text = text if left in inner else inner.strip()
    # "The answer is 18" and \text{12 students} are answers in a wrapper.
    if opening := _OPENING.match(text):
        return clean(text[opening.end() :])
    if (upright := re.fullmatch(_UPRIGHT, text)) and re.search(r"\d", upright[1]):
        return clean(upright[1])
    text = re.sub(r"\\(?:displaystyle|textstyle|limits|left|right|bf|rm|[bB]igg?[lr]?)(?![a-zA-Z])\.?", "", text)
    text = re.sub(r"\\textcolor ?\{\w+\}|\\color ?\{\w+\}", "", text)
    text = _PLAIN_RE.sub(lambda found: _PLAIN[found[0]], text)
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " ", text.replace("\\\\", "\0")).replace("\0", "\\\\")
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    # \frac12, \frac1{2}, \frac{1}2, \sqrt2
    text = re.sub(r"\\frac\s*([\da-zA-Z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}", text)
    text = re.sub(rf"\\(?:text|mathrm|operatorname)\s*\{{ ?({formula.FUNCTIONS}) ?\}}", r"\\\1 ", text)
    text = re.sub(r"\\math(?:rm|bf)\s*\{([ei])\}", lambda m: m[1] if "rm" in m[0] else m[0], text)
    text = re.sub(r"(\d+)\^\\circ ?(\d+)'", lambda m: rf"{m[1]}\frac{{{m[2]}}}{{60}}^\circ", text)
    text = re.sub(r"(?<![\d/])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}", text)  # 1 1/2
    # 9 \text{ chickens and } 10 \text{ rabbits}
    text = re.sub(r"(?<=\d)( ?\\text ?\{ ?(?!and\b|or\b)[a-z][^{}]*) (?:and|or) ?\}(?= ?\d)", r"\1}, ", text)
    text = re.sub(r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times ", text)
    text = re.sub(r"\( ?(?:\\text ?\{ ?mod ?\}|\\mod|mod)([^()]*)\)", r"\\pmod{\1}", text)
    text = re.sub(r"\\pmod ?\{ ?(\w+) ?\}", r"\\pmod \1", text)
    text = re.sub(r"_ ?\{ ?\\text ?\{ ?(\w+) ?\} ?\}", lambda m: f"_{_base(m[1])}", text)
    # "for all x" says nothing that the formula does not.
    text = re.sub(r",? ?(?:\\text ?\{ ?,? ?for all (?:real )?\}|for all) ?[a-z]$", "", text)
    text = re.sub(r"\s+", " ", text).strip().rstrip(".;,").strip()
    return re.sub(r"^= ?", "", text)


def _base(word: str) -> str:
    return f"{{{_BASES.index(word) + 2}}}" if word in _BASES else f"{{{word}}}"


def key_of(text: str) -> str:
    """A cleaned text without what has no meaning at all."""
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(_UPRIGHT, r"\1", text))
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", re.sub(r"^0+(?=\d)", "", plain))


# --- reading -----------------------------------------------------------------------------------------------------

_SIGNS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~"}
_FLIPPED = {"=": "=", "<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}
_SIGN_RE = r"\\(?:le|ge|ne|approx)(?![a-zA-Z])|[=<>]"
# With these a comma separates no elements, and a letter may be bound.
_WHOLE = re.compile(
    r"\\(?:in|notin|forall|exists|equiv|pmod|ldots|subset\w*|lim|int|partial)(?![a-zA-Z])|\b(?:if|for|where|when|except)\b"
)
_BOUND = re.compile(r"(?<![\\a-zA-Z])([a-z]) ?\\in(?![a-zA-Z])|\\\{ ?([a-z]) ?[|:]")
_MATRIX = re.compile(
    r"(?P<scale>[^&,]*?)(?P<open>[(\[]?) ?\\begin ?\{(?P<kind>[pbBvV]?matrix|smallmatrix|array|cases)\}(?:\{[lcr| ]*\})?"
    r"(?P<body>.*)\\end ?\{(?P=kind)\} ?[)\]]?",
    re.DOTALL,
)
_AND_OR = r",? ?\\text ?\{ ?,? ?(?:and|or) ?\} ?|,? ?(?<![a-zA-Z])(?:and|or) ?(?=[^a-z ]|[a-z]\b)|[,;]"
_CHOICE = re.compile(r"(?:option |choice )?(\()?([A-J])(\)|[.:](?= |$))?(?: ?(\S.*))?", re.IGNORECASE | re.DOTALL)
INFINITY = r"\infty"
_MONEY = {"$": "$", r"\pounds": "£", r"\euro": "€"}


def _split(text: str, separator: str) -> list[str]:
    """Splits where the separator stands outside of all brackets; the pieces and the separators in turn."""
    parts, depth, start, skip = [], 0, 0, 0
    for found in re.finditer(rf"(?P<cut>{separator})|\\begin\{{|\\end\{{|\\[{{}}]|\\.|[{{(\[\])}}]", text, re.DOTALL):
        word = found[0]
        if found.start() < skip:
            continue
        if found["cut"] is not None and not depth:
            parts += [text[start : found.start()].strip(), word.strip()]
            start = skip = found.end()
        elif word in ("\\{", "{", "(", "["):
            depth += 1
        elif word == "\\begin{":  # its brace, and what \end{...} closes
            depth += 2
        elif word in ("\\}", "}", ")", "]"):
            depth -= 1
    return [*parts, text[start:].strip()]


def _encloses(text: str) -> bool:
    """Whether the bracket at the beginning is closed by the one at the end. Half-open intervals close any with any."""
    depth = 0
    for found in re.finditer(r"\\[{}]|\\.|[{(\[\])}]", text, re.DOTALL):
        if found[0] in (r"\{", "{", "(", "["):
            depth += 1
        elif found[0] in (r"\}", "}", ")", "]"):
            depth -= 1
            if not depth:
                return found.end() == len(text)
    return False


def read(text: str) -> Value:
    """Reads a cleaned text."""
    text = re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text).strip()  # "x in [0, 1]" is the interval
    while text[:1] + text[-1:] in ("()", "{}") and _encloses(text) and len(_split(text[1:-1], "[,;]")) == 1:
        text = text[1:-1].strip()
    if re.fullmatch(rf"[+-]? ?\{INFINITY}", text):
        return Text(key_of(text).removeprefix("+"))
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return Group("set", ())
    if r"\begin" in text:
        return _read_matrix(text)
    if _WHOLE.search(text):
        return Text(_bound(text))
    if (number := _read_formula(text)) is not None:
        return number
    return _read_group(text) or _read_relation(text) or Text(_words(text))


def _bound(text: str) -> str:
    """The key of a text with a bound letter, whatever the letter is."""
    if (found := _BOUND.search(text)) and (letter := found[1] or found[2]):
        text = re.sub(rf"(?<![\\a-zA-Z]){letter}(?![a-zA-Z])|(?<=\d){letter}(?![a-zA-Z])", "□", text)
        text = re.sub(r"(\\\{ ?□) ?:", r"\1|", text)
    return _words(text)


def _read_group(text: str) -> Value | None:
    if angle := re.fullmatch(r"\\langle(.*)\\rangle", text):
        return Group("vector", tuple(read(part) for part in _split(angle[1], ",")[::2]))
    separated = _split(text, _AND_OR)
    if len(separated) > 1:
        words = {re.sub(r"\\text|[^a-z]", "", word) for word in separated[1::2]} - {""}
        parts = [each for part in separated[::2] for each in _listed(clean(part))]
        if all(isinstance(part, Relation) and set(part.signs) != {"="} for part in parts):
            return Group("union" if words == {"or"} else "all", tuple(parts))
        return Group("list", tuple(_without_name(parts)))
    if len(union := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return Group("union", tuple(read(part) for part in union[::2]))
    opening = r"\{" if text.startswith(r"\{") else text[:1]
    closing = r"\}" if text.endswith(r"\}") else text[-1:]
    inner = text[len(opening) : len(text) - len(closing)]
    if opening == r"\{" and closing == r"\}" and _encloses(text):
        if re.search(r"\||:", inner):  # { x : x > 0 } is no list of elements
            return Text(_bound(text))
        return Group("set", tuple(each for part in _split(inner, "[,;]")[::2] for each in _listed(clean(part))))
    if opening == "[" and closing == "]" and ";" in inner and "," in inner:  # [1,2;3,4]
        rows = [_split(row, ",")[::2] for row in _split(inner, ";")[::2]]
        return _matrix("matrix", rows)
    if opening in ("(", "[") and closing in (")", "]") and _encloses(text):
        parts = _split(inner, "[,;]")[::2]
        if len(parts) > 1:
            if _number_of(text, r"\\(?:pm|mp)(?![a-zA-Z])") == 1:
                return Group("list", tuple(_listed(text)))
            return Group(f"{opening},{closing}", tuple(read(part) for part in parts))
    colons = _split(text, ":")
    if len(colons) > 1 and not re.search(r"(?<!\d)\d{1,2} ?: ?\d\d(?!\d)", text):
        parts = [read(part) for part in colons[::2]]
        if all(isinstance(part, Formula) and not part.unit for part in parts):
            return Group("ratio", tuple(parts))
    if _number_of(text, r"\\(?:pm|mp)(?![a-zA-Z])") == 1:
        return Group("list", tuple(_without_name(_listed(text))))
    return None


def _number_of(text: str, pattern: str) -> int:
    return len(re.findall(pattern, text))


def _listed(text: str) -> list[Value]:
    """A value, or both values of what has one plus-minus."""
    either = r"\\(?:pm|mp)(?![a-zA-Z])"
    if _number_of(text, either) == 1:
        return [read(re.sub(r"\( ?\+", "(", re.sub(either, sign, text)).removeprefix("+")) for sign in "+-"]
    return [read(text)]


def _without_name(parts: Sequence[Value]) -> Sequence[Value]:
    """`x = 1, x = 2` and `x = 1, 2` are `1, 2`."""
    names = {named[0] for part in parts if (named := _named(part))}
    if len(names) != 1:
        return parts
    return [named[1] if (named := _named(part)) else part for part in parts]


def _read_matrix(text: str) -> Value:
    found = _MATRIX.fullmatch(text)
    if not found or r"\begin" in found["body"]:
        return _read_relation(text) or Text(_words(text))
    if found["scale"].rstrip().endswith("="):
        return _read_relation(text) or Text(_words(text))
    rows = [[cell.strip(" ,") for cell in row.split("&")] for row in found["body"].split(r"\\") if row.strip()]
    if scale := found["scale"].strip():
        try:
            nodes = [("scaled", formula.parse(scale), formula.parse(cell)) for row in rows for cell in row]
        except Unreadable:
            return Text(_words(text))
        if found["kind"] in ("vmatrix", "Vmatrix", "cases"):
            return Text(_words(text))
        return Group(f"matrix {[len(row) for row in rows]}", tuple(map(Formula, nodes)))
    if found["kind"] == "vmatrix" and len(rows) < 5 and all(len(row) == len(rows) for row in rows):
        try:
            return Formula(_determinant([[formula.parse(cell) for cell in row] for row in rows]))
        except Unreadable:
            pass
    return _matrix(found["kind"] if found["kind"] in ("vmatrix", "Vmatrix", "cases") else "matrix", rows)


def _matrix(kind: str, rows: list[list[str]]) -> Group:
    return Group(f"{kind} {[len(row) for row in rows]}", tuple(read(cell) for row in rows for cell in row))


def _determinant(rows: list[list[Node]]) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    minors = [_determinant([row[:column] + row[column + 1 :] for row in rows[1:]]) for column in range(len(rows))]
    terms = [("*", cell, minor) for cell, minor in zip(rows[0], minors, strict=True)]
    return ("evaluated", ("+", *(("neg", term) if column % 2 else term for column, term in enumerate(terms))))


def _read_formula(text: str) -> Formula | None:
    """A number or formula with or without a unit; None for everything else."""
    if re.fullmatch(r"\D{0,3}\d{1,3}( \d{3})+(\.\d+)?", text):
        text = re.sub(r"(?<=\d) ", "", text)
    currency = re.match(r"([+-]?) ?(\$|\\pounds|\\euro) ?(?=[\d.+-])", text)
    body = text[: currency.start(2)] + text[currency.end() :] if currency else text
    for part, unit in split_unit(body):
        try:
            node = formula.parse(_letters(part))
        except Unreadable:
            continue
        if unit.name == "degree" and re.search("[a-z]", re.sub(r"\\(?:frac|sqrt|pi)", "", part)):  # cos 60 degrees
            continue
        if currency:
            if unit.name and "/" not in unit.name and unit.name != _MONEY[currency[2]]:
                return None
            unit = Unit(_MONEY[currency[2]])
        return Formula(node, unit if unit.name else None)
    return None


def is_number(text: str) -> bool:
    """Whether a cleaned text is a number, with or without a unit."""
    found = _read_formula(text)
    return found is not None and not formula.variables(found.node)


def _letters(text: str) -> str:
    """The text of a formula; words are none."""
    if re.search(r"[a-zA-Z]{4,}|cis", re.sub(rf"\\[a-zA-Z]+|(?<![a-zA-Z])(?:{formula.FUNCTIONS})(?![a-zA-Z])", " ", text)):
        raise Unreadable(text)
    return text


def _read_relation(text: str) -> Value | None:
    pieces = _split(text, _SIGN_RE)
    if len(pieces) < 3:
        return None
    parts, signs = pieces[::2], [_SIGNS[sign] for sign in pieces[1::2]]
    if not all(parts):
        return None
    if "~" in signs:  # "sqrt 5, about 2.236" is the root of five if that is about its value
        place = signs.index("~")
        about = parts[place:]
        nodes = [each.node for part in about if isinstance(each := read(part), Formula)]
        if set(signs[place:]) != {"~"} or len(nodes) != len(about):
            return None
        if formula.variables(*nodes) or not all(_is_close(nodes[0], node) for node in nodes[1:]):
            return None
        parts, signs = parts[: place + 1], signs[:place]
        if not signs:
            return read(parts[0])
    if set(signs) == {"="}:
        values = [read(part) for part in parts]
        numbers = [each for each in values if isinstance(each, Formula) and not formula.variables(each.node)]
        # "2 + 3 = 5" is 5 only if it is true; "x = 2 + 3 = 5" is "x = 5".
        tail = values if len(numbers) == len(values) else values[1:]
        if len(tail) > 1:
            if not all(compare(first, second) for first, second in pairwise(tail)):
                return Relation(tuple(parts), tuple(signs))
            if tail is values:
                return values[-1] if len({key_of(part) for part in parts}) > 1 else None  # 3 = 3
            parts, signs = [parts[0], parts[-1]], ["="]
    return Relation(tuple(parts), tuple(signs))


def _is_close(exact: Node, rounded: Node) -> bool:
    difference = ("abs", formula.minus(exact, rounded))
    return formula.sign(formula.minus(("*", ("num", Fraction(1, 100)), ("abs", exact)), difference)) > 0


# What makes a text more than words: a digit or an operator; a hyphen between letters is none.
_MARK = re.compile(r"[\d\\^_=<>+*/]|(?<![a-zA-Z])-|-(?![a-zA-Z])")


def _words(text: str) -> str:
    """Words in one spelling. Beside a digit or an operator every sign, bracket and variable counts."""
    plain = re.sub(_UPRIGHT, r" \1 ", text)
    if not _MARK.search(plain):
        words = re.findall(r"\w+|[^\w\s(){}\[\].,'\"-]", plain)
        short = len(words) == 1 and len(words[0]) < 3
        return " ".join(words) if short else " ".join(words).lower()
    text = re.sub(_UPRIGHT, lambda upright: f" {upright[1].lower()} ", text)
    # PM, pm and p.m., but not R and r
    text = re.sub(r"(?<![\\a-zA-Z])(?:[a-zA-Z]\.?){2,}", lambda word: word[0].lower().replace(".", ""), text)
    return key_of(re.sub(r"\.(?!\d)", "", text))


# --- comparing ---------------------------------------------------------------------------------------------------


def is_equal(gold: str, answer: str) -> bool:
    """Whether an answer means the same as the right one.

    Raises:
        TimeoutError: It took longer than `SECONDS` of processor time.
    """
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return bool(gold.strip()) and gold.strip() == answer.strip()
    formula.limit(SECONDS)
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    left, right = read(gold), read(answer)
    if isinstance(right, Relation) and _is_false(right):
        return False
    keys = key_of(gold), key_of(answer)
    if keys[0] == keys[1] or all(re.fullmatch("[A-Z]?[a-z]+", key) for key in keys) and keys[0].lower() == keys[1].lower():
        return len(keys[0]) > 1 or keys[0] == keys[1]
    return _equal_choices(gold, answer) or compare(left, right)


def _is_false(relation: Relation) -> bool:
    """Whether an equation says of numbers that they are equal, and they are not."""
    values = [read(part) for part in relation.parts]
    numbers = all(isinstance(each, Formula) and not formula.variables(each.node) for each in values)
    return numbers and set(relation.signs) == {"="}


def _equal_choices(gold: str, answer: str) -> bool:
    """Options of a multiple choice: the letter, the letter with its text, or the text where the gold answer has it."""
    plain, said = (" ".join(re.sub(_TEXT, r"\1 ", text).split()) for text in (gold, answer))
    if re.fullmatch("[A-J]{2,6}", plain) and sorted(set(plain)) == list(plain):
        letters = re.split(r" ?(?:,|and|\s) ?", said)
        return sorted(letters) == list(plain)
    option, chosen = _option(plain), _option(said)
    if not option:
        return False
    if chosen:
        both = option[1] and chosen[1]
        return option[0] == chosen[0] and (not both or compare(read(clean(option[1])), read(clean(chosen[1]))))
    return bool(option[1]) and compare(read(clean(option[1])), read(answer))


def _option(text: str) -> tuple[str, str] | None:
    found = _CHOICE.fullmatch(text)
    if not found or not found[2].isupper() or (found[1] and found[3] != ")"):
        return None
    rest = found[4] or ""
    if rest and (not found[3] or not re.match(r"[\w$\\]", rest) or _CHOICE.fullmatch(rest)):
        return None
    return found[2], rest


def compare(gold: Value, answer: Value) -> bool:
    """Whether two values are the same answer."""
    regions = _regions(gold), _regions(answer)
    if regions[0] and regions[1] and not (isinstance(gold, Relation) and isinstance(answer, Relation) and gold == answer):
        names = {name for name, *_ in (*regions[0], *regions[1])} - {""}
        return len(names) < 2 and _same_elements(regions[0], regions[1], _equal_regions)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _equal_relations(gold, answer)
    for first, second in ((gold, answer), (answer, gold)):
        if isinstance(first, Relation):
            named = _named(first)
            if not named or isinstance(second, Relation):
                return False
            return compare(named[1], second) if first is gold else compare(second, named[1])
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _equal_groups(gold, answer)
    if isinstance(gold, Formula) and isinstance(answer, Formula):
        return _equal_formulas(gold, answer)
    return isinstance(gold, Text) and isinstance(answer, Text) and gold.key == answer.key != ""


def _equal_formulas(gold: Formula, answer: Formula) -> bool:
    if "mod" in str(answer.node) or formula.is_unevaluated(answer.node) and not formula.is_unevaluated(gold.node):
        return False
    equal = formula.equal
    if gold.unit and answer.unit:
        scaled = gold.unit.ratio(answer.unit)
        return scaled is not None and equal(("*", ("num", scaled), gold.node), answer.node)
    name = (gold.unit or answer.unit or Unit("")).name
    if name == "%":
        percent, number = (gold.node, answer.node) if gold.unit else (answer.node, gold.node)
        if equal(("/", percent, ("num", Fraction(100))), number):
            return True
        # 25 answers 25%, and 100% answers 100; below one and at one, a number without the sign is a fraction.
        more = formula.sign(formula.minus(("abs", number), ("num", Fraction(1))))
        return (more > 0 or bool(gold.unit) and more == 0) and equal(percent, number)
    if name == "degree":
        degrees, number = (gold.node, answer.node) if gold.unit else (answer.node, gold.node)
        if "pi" in str(number) and equal(("*", degrees, formula._PI_OVER_180), number):
            return True
    return equal(gold.node, answer.node)


def _equal_groups(gold: Group, answer: Group) -> bool:
    free = {"set", "list"}
    if {gold.kind, answer.kind} <= free or gold.kind == answer.kind in ("union", "all"):
        named = [[_named(part) for part in group.parts] for group in (gold, answer)]
        if all(all(names) for names in named):  # x = 1, y = 2
            return _same_elements(gold.parts, answer.parts, compare)
        if any(len({each[0] for each in names if each}) > 1 for names in named):
            return False
        return _same_elements(gold.parts, answer.parts, compare)
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.kind == answer.kind == "ratio":
        nodes = [[part.node for part in group.parts if isinstance(part, Formula)] for group in (gold, answer)]
        return all(
            formula.equal(("*", nodes[0][0], second), ("*", nodes[1][0], first))
            for first, second in zip(*nodes, strict=True)
        )
    column = f"matrix {[1] * len(gold.parts)}"
    vectors = {gold.kind, answer.kind}
    same = gold.kind == answer.kind or ("vector" in vectors and vectors <= {"vector", column, "(,)"})
    return same and all(map(compare, gold.parts, answer.parts))


def _same_elements(gold: Sequence, answer: Sequence, same: Callable) -> bool:
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


_LETTER = r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|rho|sigma))(?:_(?:\w|\{ ?\w+ ?\}))?"
_NAME = re.compile(
    rf"{_LETTER}'*|[a-zA-Z]'*\( ?[\w, ]+ ?\)|[A-Z]{{2}}|\( ?{_LETTER}(?: ?, ?{_LETTER})+ ?\)"
    rf"|(?:\\(?:vec|mathbf|angle|overline)[{{ ]?\w+\}}?|{_UPRIGHT})(?:_\w)?"
)


def _named(value: Value) -> tuple[str, Value] | None:
    """Name and value of "x = 5", "f(x) = 2x", "(x, y) = (1, 2)"; None where the left side is not just a name."""
    if not isinstance(value, Relation) or value.signs != ("=",):
        return None
    for name, other in (value.parts, value.parts[::-1]):
        if _NAME.fullmatch(name) and name not in ("e", "i"):
            known = read(other)
            if isinstance(known, Formula) and key_of(name) in {each.rstrip(";") for each in formula.variables(known.node)}:
                return None
            return key_of(name), known
    return None


def _equal_relations(gold: Relation, answer: Relation) -> bool:
    if len(gold.signs) != len(answer.signs):
        return False
    for parts, signs in (
        (answer.parts, answer.signs),
        (answer.parts[::-1], tuple(_FLIPPED[sign] for sign in answer.signs[::-1])),
    ):
        if gold.signs == signs and any(key_of(a) == key_of(b) for a, b in zip(gold.parts, parts, strict=True)):
            return all(key_of(a) == key_of(b) or compare(read(a), read(b)) for a, b in zip(gold.parts, parts, strict=True))
    if len(gold.signs) > 1:
        return False
    try:
        first, second = (formula.minus(*map(formula.parse, each.parts)) for each in (gold, answer))
    except Unreadable:
        return False
    ratio = formula.ratio_sign(first, second)
    if ratio:
        return answer.signs[0] == (gold.signs[0] if ratio > 0 else _FLIPPED[gold.signs[0]])
    if gold.signs != ("=",) or answer.signs != ("=",):
        return False
    for name in sorted(formula.variables(first) & formula.variables(second)):
        solved = formula.solve(first, name), formula.solve(second, name)
        if solved[0] and solved[1]:
            return len(formula.variables(first, second)) > 1 and formula.equal(solved[0][0], solved[1][0])
    return False


# --- intervals ---------------------------------------------------------------------------------------------------

Bound = tuple[Node | str, bool]  # a formula, or an infinity; whether it belongs to the interval
Region = tuple[str, Bound, Bound]  # the variable, where there is one


def _regions(value: Value) -> list[Region]:
    """The intervals of an inequality, a union or an interval that is no point; empty for everything else."""
    if value == Text(r"\mathbb{R}"):
        return [("", ("-\\infty", False), (INFINITY, False))]
    if isinstance(value, Relation):
        return _solutions(value)
    if not isinstance(value, Group):
        return []
    if value.kind == "union":
        parts = [_interval(part) or _regions(part) for part in value.parts]
        return [region for part in parts for region in part] if all(parts) else []
    infinite = any(isinstance(part, Text) and part.key.endswith(INFINITY) for part in value.parts)
    return _interval(value) if infinite or value.kind in ("[,)", "(,]", "[,]") else []


def _interval(value: Value) -> list[Region]:
    if not isinstance(value, Group) or len(value.parts) != 2 or value.kind[0] not in "([":
        return []
    ends = [each.node if isinstance(each, Formula) else each.key if isinstance(each, Text) else None for each in value.parts]
    if None in ends:
        return []
    return [("", (ends[0], value.kind[0] == "["), (ends[1], value.kind[-1] == "]"))]  # type: ignore[list-item]


def _solutions(relation: Relation) -> list[Region]:
    """The intervals of inequalities that are linear in one variable."""
    if "=" in relation.signs or "~" in relation.signs:
        return []
    low: Bound = ("-\\infty", False)
    high: Bound = (INFINITY, False)
    name = ""
    for sign, (left, right) in zip(relation.signs, pairwise(relation.parts), strict=True):
        try:
            node = formula.minus(formula.parse(left), formula.parse(right))
        except Unreadable:
            return []
        names = formula.variables(node)
        solved = formula.solve(node, next(iter(names))) if len(names) == 1 else None
        slope = formula.sign(solved[1]) if solved else 0
        if not solved or not slope or name not in ("", *names):
            return []
        name = next(iter(names))
        sign = sign if slope > 0 else _FLIPPED[sign]
        if sign == "!=":
            return [(name, low, (solved[0], False)), (name, (solved[0], False), high)] if len(relation.signs) == 1 else []
        if sign[0] == "<":
            if high[0] != INFINITY:
                return []
            high = (solved[0], sign == "<=")
        else:
            if low[0] != "-\\infty":
                return []
            low = (solved[0], sign == ">=")
    return [(name, low, high)]


def _equal_regions(gold: Region, answer: Region) -> bool:
    def same(left: Bound, right: Bound) -> bool:
        if isinstance(left[0], str) or isinstance(right[0], str):
            return left == right
        return left[1] == right[1] and formula.equal(left[0], right[0])

    return same(gold[1], answer[1]) and same(gold[2], answer[2])
