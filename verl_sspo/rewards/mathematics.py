r"""Reward of mathematics: is the final answer of the response the right one?

The answer is what stands in the last `\boxed{}` or `<answer>` tag, or after the last `####`. It is compared part by
part: tuples, intervals, sets, lists and matrices by their shape and then their elements, numbers exactly, words as
words, and what is left, the formulas, by math-verify. The order is deliberate: math-verify alone takes (1, 2) for
{1, 2}, 52 in base 8 for 52, and 1.414214 for the root of two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from verl_sspo.rewards import symbolic

MAX_LENGTH = 2000  # characters of an answer; longer ones count only if they are the same text
MAX_PARTS = 64  # elements of a set or list whose order is free


def score(
    solution_str: str, ground_truth: str, *, format_reward: float = 0.0, math_timeout: float = 5.0
) -> dict[str, float | str]:
    """Scores a response by its final answer.

    Args:
        solution_str: The response.
        ground_truth: The answer; of a whole solution, what stands in its last box or after its last `####`.
        format_reward: Added to the score where the whole response is `<think>...</think><answer>...</answer>`: the
            reward of answer plus format of arXiv:2602.19345 (restated; the weight is the caller's choice). `format`
            then says whether it has this form; without it, whether an answer was found at all.
        math_timeout: Seconds for all the formulas of one answer.
    """
    answer = extract_answer(solution_str)
    gold = extract_answer(str(ground_truth))
    correct, error = False, ""
    if answer is None:
        error = "no answer"
    else:
        try:
            correct = is_equal(str(ground_truth) if gold is None else gold, answer, math_timeout)
            error = "" if correct else "wrong answer"
        except TimeoutError:
            error = "timeout"
    formatted = answer is not None if not format_reward else has_tags(solution_str)
    return {
        "score": float(correct) + format_reward * formatted,
        "acc": float(correct),
        "format": float(formatted),
        "timeout": float(error == "timeout"),
        "error": error,
        "pred": (answer or "")[:MAX_LENGTH],
    }


def has_tags(response: str) -> bool:
    """Whether a response is one `<think>` and one `<answer>` element, in this order, and nothing else."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    # A prompt may end with the opening tag: then the response begins after it.
    whole = response if response.lstrip().startswith("<think>") else "<think>" + response
    if any(whole.count(tag) != 1 for tag in tags):
        return False
    before, *parts = re.split("|".join(tags), whole)
    in_order = sorted(tags, key=whole.index) == list(tags)
    between, answer, after = parts[1], parts[2], parts[3]
    return in_order and bool(answer.strip()) and not any(text.strip() for text in (before, between, after))


# --- finding the answer ------------------------------------------------------------------------------------------


def _braced(text: str, start: int) -> int | None:
    """The index after the brace that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return start + found.end()
    return None


def _last_box(text: str) -> tuple[int, str] | None:
    for found in reversed(list(re.finditer(r"\\f?box(?:ed)?(?![a-zA-Z])(?!\s*\{\s*\})\s*", text))[-50:]):
        start = found.end()
        if text[start : start + 1] != "{":
            if bare := re.match(r"[^\s$]+", text[start:]):  # \boxed 5
                return found.start(), bare[0]
        elif end := _braced(text, start):
            return found.start(), text[start + 1 : end - 1]
    return None


def extract_answer(text: str) -> str | None:
    r"""The final answer of a response, or None: the last `\boxed{}` or `<answer>`, else what follows the last `####`.

    A line after `####` wins over an earlier box if it is a number; otherwise, as `2. Proof`, it is taken for a heading.
    An empty box is no answer.
    """
    found: list[tuple[int, str]] = []
    if box := _last_box(text):
        found.append(box)
    for tag in re.finditer(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL):
        inner = _last_box(tag[1])
        found.append((tag.end(), inner[1] if inner else tag[1]))
    lines = [(line.start(), line[1]) for line in re.finditer(r"####[ \t]*([^\n]*)", text)]
    short = (line for line in lines[-50:] if len(line[1]) <= 200 and not re.match(r"\d+\.\s+[a-zA-Z]", line[1]))
    found += [line for line in short if _number(_clean(line[1])) is not None] if found else lines[-1:]
    return max(found)[1].strip() if found else None


# --- reading it --------------------------------------------------------------------------------------------------

_PLAIN = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ",
    "±": r"\pm ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "£": r"\pounds ", "€": r"\euro ", "\u00a0": " ",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\leq": r"\le", r"\geq": r"\ge", r"\neq": r"\ne",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\varnothing": r"\emptyset", r"\degree": r"^\circ", r"^{\circ}": r"^\circ",
    r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")",
}  # fmt: skip
_PLAIN_RE = re.compile("|".join(re.escape(key) + (r"(?![a-zA-Z])" if key[-1].isalpha() else "") for key in _PLAIN))
# Functions, which people write without the backslash too.
_FUNCTION = "(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|max|min|gcd|lcm|cis"
_TEXT = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathsf|mbox|operatorname)\*?\s*\{([^{}]*)\}"
_ANSWER_IS = r"(?:the )?(?:final )?answer ?(?:is ?:?|:) ?"
_OPENING = re.compile(rf"(?:\\text ?\{{ ?{_ANSWER_IS}\}}|{_ANSWER_IS})(?![a-zA-Z])", re.IGNORECASE)


def _clean(text: str) -> str:
    """One spelling for what LaTeX, Markdown and people spell in several ways."""
    text = re.sub(r"<\|[^|>]*\|>$", "", text.strip()).strip().rstrip(".").rstrip()
    for left, right in (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inner = text[len(left) : -len(right)]
            text = text if left in inner else inner.strip()
    # "The answer is 18" and \text{12 students} are answers in a wrapper.
    if opening := _OPENING.match(text):
        return _clean(text[opening.end() :])
    if (upright := re.fullmatch(_TEXT, text)) and re.search(r"\d", upright[1]):
        return _clean(upright[1])
    text = re.sub(r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", "", text)
    text = _PLAIN_RE.sub(lambda found: _PLAIN[found[0]], text)
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"(?<=\d)(?:\\[!,;: ]|~)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])", " ", text.replace("\\\\", "\0")).replace("\0", "\\\\")
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    # \frac12, \frac1{2}, \frac{1}2, \sqrt2
    text = re.sub(r"\\frac\s*([\da-zA-Z])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".;,").strip()


def _key(text: str) -> str:
    """A cleaned text without what has no meaning at all."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(_TEXT, r"\1", text))


class _Number(NamedTuple):
    value: Fraction
    unit: str


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_SIGNED = rf"[+-]? ?{_DECIMAL}"
_POWER = r"(?:\{ ?(?P<power>[+-]?\d+) ?\}|(?P<digit>\d))"
_VALUE = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>\$|\\pounds|\\euro)? ?(?P<inner>[+-]?) ?(?:"
    rf"(?P<repeating>\d*\.\d*)\\overline ?\{{(?P<period>\d+)\}}"
    rf"|(?P<whole>{_INTEGER})? ?\\frac ?\{{ ?(?P<top>{_SIGNED}) ?\}} ?\{{ ?(?P<bottom>{_SIGNED}) ?\}}"
    rf"|(?P<whole2>\d+) (?P<top2>\d+) ?/ ?(?P<bottom2>\d+)"
    rf"|(?P<top3>{_DECIMAL}) ?/ ?(?P<bottom3>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"(?: ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?{_POWER}|[eE](?P<exponent>[+-]?\d+))?"
    rf")(?P<rest>.*)",
    re.DOTALL | re.ASCII,
)
# Words after a number that belong to it, not a unit.
_NOT_UNITS = re.compile(
    "pi|sqrt|sin|cos|tan|log|ln|exp|mod|hundred|thousand|million|billion|trillion|dozen|half|"
    "thirds?|quarters?|pair|couple|score|factorial|choose|plus|minus|base|i|e"
)
# "Cups of milk" is a unit, "of milk" is not.
_CONNECTIVES = {"and", "or", "to", "by", "of", "over"}
_UNITS = {
    "dollar": "$", "usd": "$", "buck": "$", "percent": "%", "percentage": "%", "^\\circ": "degree", "deg": "degree",
    "inch": "in", "inche": "in", "feet": "ft", "foot": "ft", "yard": "yd", "mile": "mi", "meter": "m", "metre": "m",
    "centimeter": "cm", "millimeter": "mm", "kilometer": "km", "hour": "h", "hr": "h", "minute": "min", "second": "s",
    "sec": "s", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l",
    "\\pounds": "£", "\\euro": "€", "euro": "€", "unit": "", "square unit": "", "cubic unit": "", "sq unit": "",
}  # fmt: skip
# Units that are short enough for a product of variables.
_SHORT_UNITS = {*_UNITS, *_UNITS.values(), "ml", "mg", "mph", "kph", "rpm", "am", "pm", "st", "nd", "rd", "th", "us"}


def _unit(text: str) -> str | None:
    """The unit that follows a number, in one spelling; None if this is not a unit."""
    words = re.sub(_TEXT, r" \1 ", text)
    exponents = "".join(re.findall(r"(?<=[a-zA-Z ])\^ ?\{? ?([23])", words))
    words = re.sub(r"(?<=[a-zA-Z ])\^ ?(?:\{ ?[23] ?\}|[23])", "", words).strip(" .")
    if words in ("", "%", "$", "^\\circ"):
        return _UNITS.get(words, words)
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z /.'-]*", words):
        degrees = re.fullmatch(r"\^\\circ ?(C|F|K)?", words)
        return ("degree " + (degrees[1] or "")).strip() if degrees else None
    parts = words.lower().replace(".", "").split()
    if any(map(_NOT_UNITS.fullmatch, parts)) or {parts[0], parts[-1]} & _CONNECTIVES:
        return None
    # Upright words are units. Letters that are not may be variables, as in 2x, 2xy and 2x/y.
    bare = re.sub(_TEXT, " ", text)
    letters = re.findall(r"[a-z/'-]+", bare.lower().replace(".", ""))
    runs = re.findall("[a-z]+", letters[0]) if letters else []
    least = 3 if bare.startswith(" ") else 4
    known = all(len(run) >= least or {run, run.removesuffix("s")} & _SHORT_UNITS for run in runs)
    if not known or any(len(each) < 2 for each in letters):
        return None
    powers = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
    exponents += "".join(powers.get(part, "") for part in parts)
    name = " ".join(part for part in parts if part not in powers)
    name = name[:-1] if name.endswith("s") and len(name) > 2 else name
    name = _UNITS.get(name, name)
    return f"{name}^{exponents}" if name and exponents else name


_TRAILING = re.compile(rf"(.*\S) ?((?:{_TEXT} ?)+(?:\^ ?(?:\{{ ?[23] ?\}}|[23]))?|\^\\circ ?[CFK]?|%)", re.DOTALL)


def _split_unit(text: str) -> tuple[str, str]:
    """A formula and the upright unit behind it, or the whole and ""."""
    found = _TRAILING.fullmatch(text)
    unit = _unit(found[2]) if found else None
    return (found[1], unit or "unit") if found and unit is not None and not _is_words(found[1]) else (text, "")


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _number(text: str) -> _Number | None:
    """Reads a cleaned text that is a number, with or without a unit; None if it is anything else."""
    if len(text) > 200:
        return None
    if re.fullmatch(r"\D{0,3}\d{1,3}( \d{3})+(\.\d+)?", text):
        text = re.sub(r"(?<=\d) ", "", text)
    found = _VALUE.fullmatch(re.sub(r"^\{(.*)\}$", r"\1", text))
    if not found or (found["sign"] and found["inner"]):
        return None
    unit = _unit(found["rest"])
    if unit is None:
        return None
    # "$5 dollars" and "$5 per hour" are five dollars, "$5 cm" is nothing.
    if unit and found["currency"] and "per" not in unit and unit != _UNITS.get(found["currency"], "$"):
        return None
    if found["period"]:
        lead, digits = found["repeating"], found["period"]
        value = _fraction(lead if lead not in (".",) else "0")
        places = len(lead.partition(".")[2])
        value += Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
    elif top := found["top"] or found["top2"] or found["top3"]:
        bottom = _fraction(found["bottom"] or found["bottom2"] or found["bottom3"])
        if not bottom:
            return None
        value = _fraction(top) / bottom
        if whole := found["whole"] or found["whole2"]:
            if "-" in top or bottom < 0:
                return None
            value += _fraction(whole)
    else:
        power = int(found["power"] or found["digit"] or found["exponent"] or 0)
        if abs(power) > 400:
            return None
        value = _fraction(found["decimal"]) * Fraction(10) ** power
    currency = found["currency"]
    return _Number(
        -value if "-" in (found["sign"], found["inner"]) else value,
        _UNITS.get(currency, currency) if currency else unit,
    )


class _Parts(NamedTuple):
    """An answer made of answers."""

    kind: str  # "set" and "list" have no order; "(,)", "[,)" and so on are tuples and intervals; "union"; "matrix"
    parts: list[str]


def _split(text: str, separator: str) -> list[str]:
    """Splits where the separator stands outside of all brackets. Separators are regular expressions."""
    parts, depth, start, skip = [], 0, 0, 0
    for found in re.finditer(rf"(?P<cut>{separator})|\\begin\{{|\\end\{{|\\[{{}}]|\\.|[{{(\[\])}}]", text, re.DOTALL):
        word = found[0]
        if found.start() < skip:
            continue
        if found["cut"] is not None and not depth:
            parts.append(text[start : found.start()].strip())
            start = skip = found.end()
        elif word in ("\\{", "{", "(", "["):
            depth += 1
        elif word == "\\begin{":  # its brace, and what \end{...} closes
            depth += 2
        elif word in ("\\}", "}", ")", "]"):
            depth -= 1
    return [*parts, text[start:].strip()]


_MATRIX = re.compile(r"\\begin ?\{([pbBvV]?matrix|array|cases)\}(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL)


def _parts(text: str) -> _Parts | None:
    """Takes a cleaned text apart; None if it is in one piece."""
    if matrix := _MATRIX.fullmatch(text):
        if r"\begin" in matrix[2]:
            return None
        rows = [row for row in matrix[2].split(r"\\") if row.strip()]
        cells = [[cell.strip(" ,") for cell in row.split("&")] for row in rows]
        style = matrix[1] if matrix[1] in ("vmatrix", "Vmatrix", "cases") else "matrix"
        return _Parts(f"{style} {[len(row) for row in cells]}", [cell for row in cells for cell in row])
    if text in (r"\emptyset", r"\{\}", r"\{ \}"):
        return _Parts("set", [])
    if len(union := _split(text, r"\\cup(?![a-zA-Z])")) > 1:
        return _Parts("union", union)
    if text.startswith(r"\{") and text.endswith(r"\}") and _encloses(text):
        built = re.search(r"\\mid|\||:", text)  # { x : x > 0 } is no list of elements
        return None if built else _Parts("set", _elements(text[2:-2], ","))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _encloses(text):
        inner = _split(text[1:-1], ",")
        if len(inner) > 1 and len(_signs(text)) == 1:
            return _Parts(f"{text[0]},{text[-1]}", inner)
    if _number(text) is None:
        conjunction = r",? ?\\text ?\{ ?(?:and|or) ?\} ?|,? (?:and|or) |,"
        if len(listed := _elements(text, conjunction)) > 1:
            return _Parts("list", listed)
    return None


def _elements(text: str, separator: str) -> list[str]:
    """The elements of a set or list, each as clean as a whole answer: `$1$, $2\\pm1$` has three."""
    return [element for part in _split(text, separator) for element in _signs(_clean(part))]


def _signs(text: str) -> list[str]:
    """Both values of what has one plus-minus."""
    either = r"\\(?:pm|mp)(?![a-zA-Z])"
    return [re.sub(either, sign, text) for sign in "+-"] if len(re.findall(either, text)) == 1 else [text]


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


# --- comparing ---------------------------------------------------------------------------------------------------


def is_equal(gold: str, answer: str, timeout: float = 5.0) -> bool:
    """Whether two answers mean the same.

    Args:
        gold: The right answer.
        answer: The answer to judge.
        timeout: Seconds for all the formulas in it.

    Raises:
        TimeoutError: It took longer.
    """
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    return _equal(_clean(gold), _clean(answer), symbolic.Budget(timeout))


def _equal(gold: str, answer: str, budget: symbolic.Budget) -> bool:
    # "x in [0, 1]" is the interval.
    gold, answer = (_strip_parentheses(re.sub(r"^[a-zA-Z] ?\\in(?![a-zA-Z])", "", text)) for text in (gold, answer))
    if not gold or not answer:
        return False
    if _key(gold) == _key(answer):
        return True
    name, other_name = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if name and other_name:
        same_name = re.sub(r"[{} ]", "", name["name"]) == re.sub(r"[{} ]", "", other_name["name"])
        return same_name and _equal(name["value"], other_name["value"], budget)
    # "x = 5" answers what "5" answers. A whole equation does not answer what its right side does.
    if name and "=" not in answer:
        return _equal(name["value"], answer, budget)
    if other_name and "=" not in gold:
        return _equal(gold, other_name["value"], budget)
    left, right = _parts(gold), _parts(answer)
    if left or right:
        if not left or not right:
            return False

        def same(first: str, second: str) -> bool:
            return _equal(first, second, budget)

        if left.kind == right.kind and left.kind not in ("set", "list", "union"):
            return len(left.parts) == len(right.parts) and all(map(same, left.parts, right.parts))
        # `x = 1, y = 2` has an order, which `1, 2` does not say.
        if min(names := [len(_variables(each.parts)) for each in (left, right)]) == 0 and max(names) > 1:
            return False
        unordered = {left.kind, right.kind} in ({"set"}, {"list"}, {"set", "list"}, {"union"})
        return unordered and _same_elements(_without_variable(left.parts), _without_variable(right.parts), same)
    return _equal_atoms(gold, answer, budget)


def _strip_parentheses(text: str) -> str:
    while text.startswith("(") and text.endswith(")") and _encloses(text) and len(_split(text[1:-1], ",")) == 1:
        text = text[1:-1].strip()
    return text


def _same_elements(gold: Sequence[str], answer: Sequence[str], same: Callable[[str, str], bool]) -> bool:
    if len(gold) != len(answer) or len(gold) > MAX_PARTS:
        return False
    left = list(answer)
    for element in gold:
        # What is the same text first: most elements need no algebra.
        left.sort(key=lambda other: _key(other) != _key(element))
        match = next((place for place, other in enumerate(left) if same(element, other)), None)
        if match is None:
            return False
        del left[match]
    return True


_VARIABLE = r"(?:[a-zA-Z](?:_\{?\w\}?)?|\\[a-zA-Z]+)"
_NAME = rf"{_VARIABLE}|[a-zA-Z]\([a-zA-Z]\)|\( ?{_VARIABLE}(?: ?, ?{_VARIABLE})+ ?\)|{_TEXT}"
_ASSIGNMENT = re.compile(rf"(?P<name>{_NAME}) ?=(?!=) ?(?P<value>[^=<>]+|\\begin ?\{{cases\}}.*)")


def _variables(parts: list[str]) -> set[str]:
    return {found["name"] for found in map(_ASSIGNMENT.fullmatch, parts) if found}


def _without_variable(parts: list[str]) -> list[str]:
    """`x = 1, x = 2` and `x = 1, 2` are `1, 2`."""
    if len(_variables(parts)) != 1:
        return parts
    return [found["value"] if (found := _ASSIGNMENT.fullmatch(part)) else part for part in parts]


def _equal_atoms(gold: str, answer: str, budget: symbolic.Budget) -> bool:
    if ("=" in gold) != ("=" in answer):
        chain = (gold if "=" in gold else answer).split("=")
        if not _outside_commands(chain[0]) and not re.search(r"[<>]|\\", chain[0]):
            # "2 + 3 = 5" is 5 only if it is true.
            return all(_equal(*((part, answer) if "=" in gold else (gold, part)), budget) for part in chain)
    first, second = _number(gold), _number(answer)
    if first and second:
        return _equal_numbers(first, second)
    digits, others = _in_base(gold), _in_base(answer)
    if digits or others:
        return digits == others
    if any(re.search(r"\d ?:", text) for text in (gold, answer)):
        return _words(gold) == _words(answer)  # ratios and times
    for degrees, other in ((first, answer), (second, gold)):
        if degrees and degrees.unit == "degree" and r"\pi" in other:
            radians = rf"\frac{{{degrees.value.numerator}\pi}}{{{180 * degrees.value.denominator}}}"
            return symbolic.equal(radians, _exact(other), budget)
    (body, unit), (other_body, other_unit) = _split_unit(gold), _split_unit(answer)
    if unit or other_unit:
        return (not unit or not other_unit or unit == other_unit) and _equal(body, other_body, budget)
    if _is_words(gold) or _is_words(answer):
        return _words(gold) == _words(answer) != ""
    if any(re.search(r"\.\.\.|\\[lc]?dots", text) for text in (gold, answer)):
        return False  # patterns, which math-verify reads up to the first strange sign
    first_formula, second_formula = _without_capitals(_exact(gold), _exact(answer))
    return symbolic.equal(first_formula, second_formula, budget)


def _equal_numbers(gold: _Number, answer: _Number) -> bool:
    if gold.value == answer.value:
        # A unit may be left out, not exchanged. Below one, a number without the percent sign is a share.
        share = "%" in (gold.unit, answer.unit) and 0 < abs(gold.value) < 1
        return gold.unit == answer.unit or (not share and not (gold.unit and answer.unit))
    # 50% is 0.5 wherever one of them has the sign and the other has no unit.
    if gold.unit == "%" and not answer.unit:
        return gold.value / 100 == answer.value
    return answer.unit == "%" and not gold.unit and answer.value / 100 == gold.value


def _in_base(text: str) -> tuple[str, str] | None:
    """Digits and base of a number written with its base."""
    found = re.fullmatch(r"([0-9A-Fa-f.]*\d[0-9A-Fa-f.]*) ?_ ?(?:\{ ?(\w+) ?\}|(\d))", re.sub(_TEXT, r"\1", text))
    named = dict(two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9", ten="10")
    if not found:
        return None
    base = (found[2] or found[3]).lower()
    return found[1].lstrip("0").upper(), named.get(base, base)


# What makes a text more than words: a digit or an operator; a hyphen between letters is none.
_SIGN = re.compile(r"[\d\\^_=<>+*/]|(?<![a-zA-Z])-|-(?![a-zA-Z])")


def _is_words(text: str) -> bool:
    """Whether an answer is words, or an upright letter to choose, and no mathematics."""
    plain = re.sub(_TEXT, r" \1 ", text)
    if plain != text and re.search("[a-zA-Z]", plain) and not re.search(r"[\\^_{}=<>+*/]", plain):
        return True
    # Not upright, up to four letters beside a digit or an operator are a product, as are abc and GMm alone. Three
    # points of an angle are none.
    bare = re.sub(r"\\(?=(?:tri)?angle ?[A-Z]{2})", "", text)
    bare = re.sub(rf"{_TEXT}|\\(?:begin|end) ?\{{\w+\*?\}}|\\[a-zA-Z]+", "+", bare)
    short = "" if _SIGN.search(bare) else "|[A-Z][a-z]{2,3}|[A-Z]{3,4}|[a-z]{4}"
    word = rf"[a-zA-Z]{{5,}}|[a-zA-Z]{{3,4}}(?= [a-zA-Z\d])|(?<=[a-zA-Z\d] )[a-zA-Z]{{3,4}}{short}"
    upright = re.findall("[a-zA-Z]{3,}", " ".join(re.findall(_TEXT, text)))
    words = [*upright, *re.findall(rf"(?<![a-zA-Z])(?:{word})(?![a-zA-Z])", bare)]
    return any(not re.fullmatch(_FUNCTION, each) for each in words)


def _words(text: str) -> str:
    """Words in one spelling. Beside a digit or an operator every sign, bracket and variable counts."""
    plain = re.sub(_TEXT, r" \1 ", text)
    if not _SIGN.search(plain):
        return " ".join(re.findall(r"\w+|[^\w\s(){}\[\].,'\"-]", plain.lower()))
    text = re.sub(_TEXT, lambda upright: f" {_words(upright[1])} ", text)
    # PM, pm and p.m., but not R and r
    text = re.sub(r"(?<![\\a-zA-Z])(?:[a-zA-Z]\.?){2,}", lambda word: word[0].lower().replace(".", ""), text)
    return _key(re.sub(r"(?<!\\)\{(\w)\}", r"\1", re.sub(r"\.(?!\d)", "", text)))


def _exact(text: str) -> str:
    """Decimals as fractions, upright letters as letters: what math-verify should not round or guess."""
    text = re.sub(
        r"(?<![\d.])(\d*)\.(\d+)(?![\d.])", lambda d: rf"\frac{{{int(d[1] + d[2])}}}{{{10 ** len(d[2])}}}", text
    )
    text = re.sub(r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", re.sub(_TEXT, r"\1", text))
    return re.sub(rf"(?<![\\a-zA-Z])({_FUNCTION})(?![a-zA-Z])", r"\\\1 ", text)


def _without_capitals(*texts: str) -> list[str]:
    """math-verify takes R for r. Where both appear, R becomes a letter that does not."""
    letters = set("".join(_outside_commands(" ".join(texts))))
    both = sorted(letter for letter in letters if letter.isupper() and letter.lower() in letters)
    unused = (letter for letter in "abcjkmnpqrstuvwxyz" if not {letter, letter.upper()} & letters)
    names = dict(zip(both, unused, strict=False))
    return [re.sub(r"\\[a-zA-Z]+|[A-Z]", lambda found: names.get(found[0], found[0]), text) for text in texts]


def _outside_commands(text: str) -> list[str]:
    return re.findall(r"[a-zA-Z]+", re.sub(r"\\[a-zA-Z]+", " ", text))
