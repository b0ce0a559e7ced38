"""The units and nouns that stand behind a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# What is measured, then each unit with its size; the names of one unit are joined by "/".
_TABLE = """
    m mm/millimeter/millimetre 0.001 cm/centimeter/centimetre 0.01 m/meter/metre 1 km/kilometer/kilometre 1000
    m in/inch/inche 0.0254 ft/foot/feet 0.3048 yd/yard 0.9144 mi/mile 1609.344
    g mg/milligram 0.001 g/gram 1 kg/kilogram 1000 oz/ounce 28.349523125 lb/pound 453.59237 ton/tonne 1000000
    s s/sec/second 1 min/minute 60 h/hr/hour 3600 day 86400 week 604800
    l ml/milliliter/millilitre 0.001 l/liter/litre 1 pt/pint 0.473176473 qt/quart 0.946352946 gal/gallon 3.785411784
    $ $/dollar/buck/usd 1 cent/¢ 0.01
    £ \\pounds/£ 1
    € \\euro/euro 1
    % %/percent/pct/percentage 1
    degree ^\\circ/degree/deg 1
"""
_UNITS: dict[str, tuple[str, Fraction]] = {"mph": ("m/s", Fraction(1609344, 3600000))}
for _line in _TABLE.strip().splitlines():
    _kind, *_rest = _line.split()
    for _names, _size in zip(_rest[::2], _rest[1::2], strict=True):
        _UNITS |= dict.fromkeys(_names.split("/"), (_kind, Fraction(_size)))

_UPRIGHT = r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{[^{}]*\}"
_START = re.compile(rf"{_UPRIGHT}|%|\^ ?\\circ|\^ ?\{{? ?(?=th|st|nd|rd|\\text|\\mathrm)|(?<![\\a-zA-Z])[a-zA-Z]")
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
# Plurals and words behind a number that change it.
_NO_NOUN = re.compile(
    r"(?:hundred|thousand|[mbtr]\w*illion|lakh|crore|dozen|score|half|halve|third|quarter|\w*(?:four|fif|six|seven|eigh"
    r"|nin|ten|eleven|twelf|teen|tie|hundred|thousand|illion)th|time|minu|plu|le|les|pi|sin|co|"
    r"not|no|and|or|if|more|fewer|than|mod|base|factorial|choose|negative|positive|point|radian|other|over|by)s*"
)
_PLURALS = {"people", "children", "men", "women", "mice", "geese", "fish", "sheep", "teeth", "times"}


@dataclass(frozen=True)
class Unit:
    """What is counted or measured ("" for nothing), and how much of the base unit it is."""

    name: str
    size: Fraction = Fraction(1)

    def ratio(self, other: Unit) -> Fraction | None:
        """How many of the other unit are one of this; None if they measure different things."""
        return self.size / other.size if self.name == other.name else None


def split_unit(text: str) -> list[tuple[str, Unit]]:
    """The ways to read a cleaned text as a formula and the unit behind it; the last is the whole without a unit."""
    found = []
    for start in _START.finditer(text):
        body = text[: start.start()].rstrip()
        if body and (unit := _unit(text[start.start() :], text[: start.start()])):
            found.append((body, unit))
    return [*found[:4], (text, Unit(""))]


def _unit(text: str, before: str) -> Unit | None:
    number = re.fullmatch(r"[^a-zA-Z]*", before.replace("\\frac", "").replace("\\pounds", ""))
    if re.fullmatch(r"\^? ?\{? ?(?:\\\w+ ?\{)? ?(?:st|nd|rd|th) ?\}* ?\}*", text):
        return Unit("") if re.search(r"\d$", before) else None
    upright = re.match(_UPRIGHT, text)
    words = re.sub(rf"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{{([^{{}}]*)\}}", r" \1 ", text)
    power = 1
    for digit in re.findall(r"(?<=[a-zA-Z ])\^ ?\{? ?([23])", words):
        power *= int(digit)
    words = re.sub(r"(?<=[a-zA-Z ])\^ ?(?:\{ ?[23] ?\}|[23])", "", words).strip(" .").replace("per cent", "percent")
    words = re.sub(r" (?:old|long|tall|wide|high|deep|away|apart)$", "", words)
    if re.fullmatch(r"\^ ?\\circ ?[CFK]", words):
        return Unit(f"degree {words[-1]}")
    words = words.replace("^ \\circ", "^\\circ")
    if not re.fullmatch(r"%|\^\\circ|[a-zA-Z][a-zA-Z /.'-]*", words):
        return None
    parts = words.replace(".", "").split()
    for part in parts:
        power *= _POWERS.get(part, 1)
    name = " ".join(part for part in parts if part not in _POWERS)
    known = _known(name)
    if known:
        # Letters that are not upright may be variables, as in 2m, 2 m and 2in.
        bare = not upright and name.isalpha() and (len(name) < 2 or (not number and not before.endswith(" ")))
        kind, size = known
        return None if bare else Unit(f"{kind}^{power}" if power > 1 else kind, size**power)
    if name in ("unit", "units"):
        return Unit("")
    if not number and not upright:
        return None
    head = re.split(r" (?:of|for|to|in|from|per|at|on|with|and) ", name.lower())
    words_before = head[0].replace("-", " ").split()
    if any(_NO_NOUN.fullmatch(part) for part in words_before if part != "times") or not name[-1:].isalpha():
        return None
    last = words_before[-1] if words_before else ""
    plural = len(last) > 3 and last.endswith("s") or last in _PLURALS
    one = re.fullmatch(r"[+-]?1(?:\.0+)? ?", before) and len(last) > 2 and not last.endswith("ed")
    if not (plural or one) or name.lower() == "times" and upright is None and not before.endswith(" "):
        return None
    if len(words_before[0]) < 3 or re.search(r" (?:of|times|by|to) (?:\w|\d+)$", name):
        return None
    return Unit(" ".join(words_before).removesuffix("s"))


def _known(name: str) -> tuple[str, Fraction] | None:
    top, _, bottom = re.sub(r" ?/ ?| per ", "/", name).partition("/")
    if bottom:
        first, second = _known(top), _known(bottom)
        return (f"{first[0]}/{second[0]}", first[1] / second[1]) if first and second else None
    name = re.sub("^US ", "", top)
    for spelled in (name, name.lower(), name.lower().removesuffix("s")):
        if spelled in _UNITS:
            return _UNITS[spelled]
    return None
