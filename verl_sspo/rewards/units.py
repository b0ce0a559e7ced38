"""The units and nouns after a number."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

# Each line: the base unit, then for each unit its names, joined by "/", and its size in base units.
_TABLE = """
    m mm/millimeter/millimetre 0.001 cm/centimeter/centimetre 0.01 m/meter/metre 1 km/kilometer/kilometre 1000
    m in/inch/inche 0.0254 ft/foot/feet 0.3048 yd/yard 0.9144 mi/mile 1609.344
    g mg/milligram 0.001 g/gram 1 kg/kilogram 1000 oz/ounce 28.349523125 lb/pound 453.59237
    s s/sec/second 1 min/minute 60 h/hr/hour 3600 day 86400 week 604800
    l ml/milliliter/millilitre 0.001 l/liter/litre 1 pt/pint 0.473176473 qt/quart 0.946352946 gal/gallon 3.785411784
    $ $/dollar/buck/usd 1 cent/¢ 0.01
    £ \\pounds/£ 1
    € \\euro/euro 1
    % %/percent/pct/percentage 1
    degree ^\\circ/degree/deg 1
    m/s mph 0.44704
"""
_KNOWN: dict[str, tuple[str, Fraction]] = {}
for _line in _TABLE.strip().splitlines():
    _kind, *_rest = _line.split()
    for _names, _size in zip(_rest[::2], _rest[1::2], strict=True):
        _KNOWN |= dict.fromkeys(_names.split("/"), (_kind, Fraction(_size)))

_UPRIGHT = r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}"
_START = re.compile(rf"{_UPRIGHT}|%|\^ ?\\circ|\^ ?\{{? ?(?=th|st|nd|rd|\\text|\\mathrm)|(?<![\\a-zA-Z])[a-zA-Z]")
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
# Words after a number that change it or are not nouns.
_NO_NOUN = re.compile(
    r"(?:ten|hundred|thousand|[mbtr]\w*illion|lakh|crore|dozen|score|half|halve|third|quarter|\w*(?:four|fif|six|seven|eigh"
    r"|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)th|minu|plu|le|les|pi|sin|co|not|no|and|or|if|more|fewer"
    r"|than|mod|base|factorial|choose|negative|positive|point|radian|other|over|by)s*"
)
_PLURALS = {"people", "children", "men", "women", "mice", "geese", "fish", "sheep", "teeth"}


@dataclass(frozen=True)
class Unit:
    """What is counted or measured ("" for nothing), and its size in base units."""

    name: str
    size: Fraction = Fraction(1)

    def ratio(self, other: Unit) -> Fraction | None:
        """How many of the other unit make one of this; None if they measure different things."""
        return self.size / other.size if self.name == other.name else None


NO_UNIT = Unit("")


def split_unit(text: str) -> list[tuple[str, Unit]]:
    """The ways to read a cleaned text as a formula and a unit; the last is the whole text without a unit."""
    currency = re.match(r"([+-]?) ?(\$|\\pounds|\\euro) ?(?=[\d.+-])", text)
    if currency:
        text = currency[1] + text[currency.end() :]
    found = []
    for start in _START.finditer(text):
        before = text[: start.start()]
        if before.strip() and (unit := _unit(text[start.start() :], before)):
            found.append((before.rstrip(), unit))
    found = [*found[:4], (text, NO_UNIT)]
    if not currency:
        return found
    # "$5 dollars" and "$5 per hour" are five dollars; "$5 cm" has no meaning.
    money = Unit(_KNOWN[currency[2]][0])
    return [(body, money) for body, unit in found if unit in (NO_UNIT, money) or unit.name.startswith(f"{money.name}/")]


def _unit(text: str, before: str) -> Unit | None:
    """The unit that a text names, or None."""
    if re.fullmatch(r"\^? ?\{? ?(?:\\\w+ ?\{)? ?(?:st|nd|rd|th) ?\}*", text):  # 2nd
        return NO_UNIT if re.search(r"\d$", before) else None
    is_upright = bool(re.match(_UPRIGHT, text))
    after_number = not re.search("[a-zA-Z]", before.replace("\\frac", ""))
    words = re.sub(_UPRIGHT, r" \1 ", text)
    powers = [int(digit) for digit in re.findall(r"(?<=[a-zA-Z ])\^ ?\{? ?([23])", words)]
    words = re.sub(r"(?<=[a-zA-Z ])\^ ?(?:\{ ?[23] ?\}|[23])", "", words).strip(" .")
    words = re.sub(r" (?:old|long|tall|wide|high|deep|away|apart)$", "", words.replace("per cent", "percent"))
    if re.fullmatch(r"\^ ?\\circ ?[CFK]", words):
        return Unit(f"degree {words[-1]}")
    words = words.replace("^ \\circ", "^\\circ").replace(".", "")
    if not re.fullmatch(r"%|\^\\circ|[a-zA-Z][a-zA-Z /'-]*", words):
        return None
    powers += [_POWERS[part] for part in words.split() if part in _POWERS]
    name = " ".join(part for part in words.split() if part not in _POWERS)
    power = math.prod(powers)
    if known := _known(name):
        # Letters that are not upright may be variables, as in 2m, 2 m and 2in.
        bare = not is_upright and name.isalpha() and (len(name) < 2 or not (after_number or before.endswith(" ")))
        return None if bare else Unit(f"{known[0]}^{power}" if power > 1 else known[0], known[1] ** power)
    if name in ("unit", "units"):
        return NO_UNIT
    return _noun(name.lower(), before) if after_number or is_upright else None


def _known(name: str) -> tuple[str, Fraction] | None:
    top, _, bottom = re.sub(r" ?/ ?| per ", "/", name.removeprefix("US ")).partition("/")
    if bottom:
        first, second = _known(top), _known(bottom)
        return (f"{first[0]}/{second[0]}", first[1] / second[1]) if first and second else None
    return next((_KNOWN[each] for each in (top, top.lower(), top.lower().removesuffix("s")) if each in _KNOWN), None)


def _noun(phrase: str, before: str) -> Unit | None:
    """What is counted: a plural, or a singular after 1, also with words like "per day". "3 times 5" counts nothing."""
    head, *more = re.split(r" (?:of|for|to|in|from|per|at|on|with|and)(?: |$)", phrase)
    words = head.replace("-", " ").split()
    if not words or any(_NO_NOUN.fullmatch(word) for word in words) or any(len(each) < 3 for each in (words[0], *more)):
        return None
    one = re.fullmatch(r"[+-]?1(?:\.0+)? ?", before) and not words[-1].endswith("ed")
    plural = (len(words[-1]) > 3 and words[-1].endswith("s")) or words[-1] in _PLURALS
    return Unit(" ".join(words).removesuffix("s")) if plural or one else None
