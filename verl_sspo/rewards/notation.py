"""Brings answers into one spelling where LaTeX, Markdown and people have several."""

from __future__ import annotations

import re

from verl_sspo.rewards.formula import FUNCTIONS

_PLAIN = {
    **dict.fromkeys("−–—‑", "-"), "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
    "θ": r"\theta ", "∞": r"\infty ", "°": r"^\circ ", "±": r"\pm ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∅": r"\emptyset ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "∕": "/",
    "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "√": r"\sqrt ", "∈": r"\in ", "ℝ": r"\mathbb{R}",
    "′": "'", "£": r"\pounds ", "€": r"\euro ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    "…": r"\ldots ", "...": r"\ldots ", "<=": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "**": "^", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\leq": r"\le",
    r"\leqslant": r"\le", r"\geq": r"\ge", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\lt": "<", r"\gt": ">",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")",
    r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\colon": ":", r"\varnothing": r"\emptyset",
    r"\dots": r"\ldots", r"\cdots": r"\ldots", r"\degree": r"^\circ", r"^{\circ}": r"^\circ", r"\prime": "'",
    r"^{\prime}": "'",
}  # fmt: skip
_PLAIN_RE = re.compile(
    "|".join(re.escape(key) + r"(?![a-zA-Z])" * key[-1].isalpha() for key in sorted(_PLAIN, key=len, reverse=True))
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BASES = {name: str(base) for base, name in enumerate(_NAMES, 2)}
_ANSWER_IS = r"(?:the )?(?:final )?answer ?(?:is ?:?|:) ?"
_OPENING = re.compile(rf"(?:\\text ?\{{ ?{_ANSWER_IS}\}}|{_ANSWER_IS})(?![a-zA-Z])", re.IGNORECASE)
#: Upright text; the group is its content. Bold letters are vectors, bold words are text.
UPRIGHT = r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathsf|mbox|operatorname)\*?\s*\{([^{}]*)\}"
_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:displaystyle|textstyle|limits|left|right|bf|rm|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\(?:text)?color ?\{\w+\}", ""),
        (r"\\!\s*", ""),
        (r"(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])", " "),
        # \frac12, \frac1{2}, \frac{1}2, \sqrt2
        (r"\\(frac|binom)\s*([\da-zA-Z])", r"\\\1{\2}"),
        (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
        (r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
        (rf"\\(?:text|mathrm|operatorname)\s*\{{ ?(?!min ?\}}(?! ?\())({FUNCTIONS}) ?\}}", r"\\\1 "),
        (r"\\mathrm\s*\{([ei])\}", r"\1"),
        (r"(\d+)\^\\circ ?(\d+)'", r"\1\\frac{\2}{60}^\\circ"),  # minutes of a degree
        (r"(?<![\d/.])(\d+) (\d+) ?/ ?(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
        # 9 \text{ chickens and } 10 \text{ rabbits}
        (r"(?<=\d)( ?\\text ?\{ ?(?!and\b|or\b)[a-z][^{}]*) (?:and|or) ?\}(?= ?\d)", r"\1}, "),
        (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
        (r"\( ?(?:\\text ?\{ ?mod ?\}|\\?mod)([^()]*)\)", r"\\pmod{\1}"),
        (r"\\pmod ?\{ ?(\w+) ?\}", r"\\pmod \1"),
        # "for all x" adds nothing to the formula.
        (r",? ?(?:\\text ?\{ ?,? ?for all (?:real )?\}|for all) ?[a-z]$", ""),
        (r"\s+", " "),
        (r"^= ?|^ | ?[.;,]* ?$", ""),
    )
]


def clean(text: str) -> str:
    """The text in one spelling, without marks that have no meaning."""
    text = re.sub(r"<\|[^|>]*\|>$", "", text.translate(_FULL_WIDTH).strip())
    text = re.sub(r"(?:\\\\|[\s.;,])+$", "", text)
    for left, right in (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inner = text[len(left) : -len(right)]
            text = text if left in inner else inner.strip()
    # "The answer is 18" and \text{12 students} are answers in a wrapper.
    if opening := _OPENING.match(text):
        return clean(text[opening.end() :])
    if (upright := re.fullmatch(UPRIGHT, text)) and re.search(r"\d", upright[1]):
        return clean(upright[1])
    text = _PLAIN_RE.sub(lambda found: _PLAIN[found[0]], text)
    text = text.replace("{,}", ",").replace(r"\%", "%").replace(r"\$", "$")
    text = re.sub(r"_ ?\{ ?\\text ?\{ ?(\w+) ?\} ?\}", lambda base: f"_{{{_BASES.get(base[1], base[1])}}}", text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text


def key_of(text: str) -> str:
    """A cleaned text without spaces, upright marks and braces around one character."""
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(UPRIGHT, r"\1", text))
    return re.sub(r"(?<=[\^_])\{(\w)\}", r"\1", re.sub(r"^0+(?=\d)", "", plain))


# Signs that make a text more than words: digits and operators, but not a hyphen between letters.
_MARK = re.compile(r"[\d\\^_=<>+*/]|(?<![a-zA-Z])-|-(?![a-zA-Z])")
_BOUND = re.compile(r"(?<![\\a-zA-Z])([a-z]) ?\\in(?![a-zA-Z])|\\\{ ?([a-z]) ?[|:]")


def words_of(text: str) -> str:
    """The key of a text that is not a formula. Case and punctuation count only if it has a digit or operator."""
    plain = re.sub(UPRIGHT, r" \1 ", text)
    if not _MARK.search(plain):
        words = " ".join(re.findall(r"\w+|[^\w\s(){}\[\].,'\"-]", plain))
        return words if len(words) < 2 else words.lower()
    if bound := _BOUND.search(text):  # { x : x > 0 } is { y | y > 0 }
        letter = bound[1] or bound[2]
        text = re.sub(rf"(?<![\\a-zA-Z]){letter}(?![a-zA-Z])", "□", text)
        text = re.sub(r"(\\\{ ?□) ?:", r"\1|", text)
    text = re.sub(UPRIGHT, lambda upright: f" {upright[1].lower()} ", text)
    # PM, pm and p.m., but not R and r
    text = re.sub(r"(?<![\\a-zA-Z])(?:[a-zA-Z]\.?){2,}", lambda word: word[0].lower().replace(".", ""), text)
    return key_of(re.sub(r"\.(?!\d)", "", text))
