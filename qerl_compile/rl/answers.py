"""From what a model wrote to the answer it gave, and the comparison of two answers.

Getting the answer out is kept apart from judging it, because judges are easily fooled by whole completions:
reasoning_gym scores "17" as half right for "7", and takes "7 or 8" for "7" in some tasks. So one answer is extracted
first, under a rule the user chose, and only that is judged.

The rules (`Extractor`):
* `final`: what stands in the last `<answer>...</answer>`, else in the last `\\boxed{...}`, else after the last `####`,
  else the last number (for a question whose answer is no number: the last line that is not empty). The default.
* `marked`: as `final`, but without a mark there is no answer.
* `first_number`: the first number. For prompts that end in an assistant prefix such as `4 + 3 =`, where the model
  answers at once and may go on talking.
* `last_number`: the last number, marks ignored.
* `text`: the whole completion, stripped.
For `final`, `marked` and `last_number`, thoughts do not count: the text after the last `</think>` is read, and a
`<think>` that was never closed leaves no answer.

A number here is digits with optional sign, thousands commas (LaTeX's too, `1{,}234`) and decimals. A minus is a sign
only where it cannot be a subtraction: `9 -5` holds 9 and 5, `is -5` and `(-5)` hold -5. Powers of ten (`1e5`), digits
glued to letters (`x2`) and numbers of more than 400 characters are not numbers.
"""

import re
from decimal import Decimal
from typing import Literal, get_args

Extractor = Literal["final", "marked", "first_number", "last_number", "text"]
EXTRACTORS: tuple[str, ...] = get_args(Extractor)

MAX_DIGITS = 400
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?+|\.[0-9]++"
# Possessive throughout: no backtracking, so `12e5` cannot match as `1`, and a long completion costs linear time.
NUMBER = re.compile(
    rf"(?<![A-Za-z0-9_.])(?<![0-9][eE][-+])(?P<sign>(?<![)\]])[-+])?\$?(?P<digits>{_DIGITS})(?![eE][-+]?[0-9])"
)
_ANSWER_TAG = re.compile(r"<(/?)answer>", flags=re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\{|[{}]")


_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[!,]|\\[!,],)(?=[0-9]{3}(?![0-9]))")
"""Between thousands in LaTeX: 1{,}234, 1,\\!234, 1\\!,234 and 1\\,234."""


def default_extractor(assistant_prefix: str | None) -> Extractor:
    """`first_number` when the prompt ends in an assistant prefix (the answer comes first), else `final`."""
    return "first_number" if assistant_prefix else "final"


def extract(text: str, how: Extractor = "final", *, numeric: bool = True) -> str | None:
    """The answer in a completion, or None when there is none.

    Args:
        text: the completion, without its prompt.
        how: the rule; see the module's docstring.
        numeric: whether the right answer is a number. A number found is returned in plain form (`1,000` as `1000`).
    """
    if how == "text":
        return text.strip() or None
    if how == "first_number":
        found = numbers(text)
        return found[0] if found else None
    spoken = after_thoughts(text)
    if spoken is None:
        return None
    marked = None if how == "last_number" else last_marked(spoken, numeric=numeric)
    if marked is not None:
        found = numbers(marked) if numeric else []
        return found[0] if len(found) == 1 else marked or None
    if how == "marked":
        return None
    if how == "last_number" or numeric:
        found = numbers(spoken)
        return found[-1] if found else None
    lines = spoken.strip().splitlines()
    return lines[-1].strip() if lines else None


def numbers(text: str) -> list[str]:
    """Every number of `text` in order, in plain form: `-7`, `1000`, `0.5`."""
    text = _plain(text)
    found = []
    for match in NUMBER.finditer(text):
        digits = match["digits"].replace(",", "")
        if len(digits) > MAX_DIGITS:
            continue
        negative = match["sign"] == "-" and not _sign_is_operator(text, match.start())
        found.append(("-" if negative else "") + ("0" if digits.startswith(".") else "") + digits)
    return found


def _plain(text: str) -> str:
    """Text with the typographic minus sign and LaTeX's separators of thousands as a keyboard has them."""
    return _SEPARATOR.sub(",", text.replace("\u2212", "-"))


def _sign_is_operator(text: str, at: int) -> bool:
    """Whether the sign at `at` follows, after spaces on its line, something one can subtract from."""
    before = text[max(0, at - 64) : at]
    return before != before.rstrip(" \t") and before.rstrip(" \t").endswith(tuple("0123456789)]"))


def last_marked(text: str, *, numeric: bool) -> str | None:
    """The content of the last answer tag, else the last box, else after the last `####`; None if unmarked.

    With `numeric`, a `####` that no number follows, or the number of a section (`#### 2. Answer`), is taken for what it
    is, a Markdown heading.
    """
    content = last_tagged(text)
    if content is None:
        content = last_boxed(text)
    if content is not None:
        return content.strip()
    start = r"[ \t]*+(?=[-+$.]*[0-9])(?![0-9]++[.)][ \t]+\S)" if numeric else r"[ \t]*(?=\S)"
    lines = re.findall(rf"(?<!#)####(?!#){start}([^\n]*)", text)
    return lines[-1].strip() if lines else None


def last_tagged(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`."""
    content, opened = None, None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            content, opened = text[opened : tag.start()], None
    return content


def last_boxed(text: str) -> str | None:
    r"""The content of the `\boxed{...}` that closes last, inner braces included."""
    content = None
    stack: list[int | None] = []  # where each open brace's content starts; None for a brace that is no box
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            stack.append(None if brace[0] == "{" else brace.end())
        elif stack:
            start = stack.pop()
            content = content if start is None else text[start : brace.start()]
    return content


def after_thoughts(text: str) -> str | None:
    """`text` after its last `</think>`; None when a `<think>` after that was never closed."""
    spoken = text.rpartition("</think>")[2]
    return None if "<think>" in spoken else spoken


def to_number(text: str | None) -> Decimal | None:
    """`text` as an exact number when it is one number in the sense above and nothing else, else None."""
    text = _plain((text or "").strip())
    match = NUMBER.fullmatch(text)
    if match is None or len(match["digits"]) > MAX_DIGITS:
        return None
    return Decimal((match["sign"] or "") + match["digits"].replace(",", ""))


def is_numeric_answer(reference: object) -> bool:
    """Whether a reference answer is a number; `0101` is not, because its zeros may carry meaning."""
    text = reference.strip() if isinstance(reference, str) else ""
    return to_number(text) is not None and not re.match(r"[-+]?0[0-9]", text)
