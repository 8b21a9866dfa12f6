"""Which questions are held out: decided by the question's own text and by nothing else.

    side(q) = held out  if  sha256(words of q)[:8] / 2**64 < share,  else training

The rule needs no list, no state and no seed. A later evaluation with more items, another run, or a resumed one draws
the same line, so a held-out question has never been trained on. For small task spaces (chain_sum with two one-digit
terms has 200 questions) that matters more than independent seeds, which would repeat nearly every question.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from qerl_compile.errors import TaskError

MAX_SHARE = 0.9


def normalized(question: str) -> str:
    """The question as compared: its words joined by single spaces."""
    return " ".join(question.split())


def question_of(row: Mapping[str, Any]) -> str:
    """The text by which two rows are the same question: a string prompt, or what its messages say."""
    prompt = row["prompt"]
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    return normalized(text)


def is_held_out(question: str, share: float) -> bool:
    """Whether `question` belongs to the held-out side when `share` of all questions does."""
    digest = hashlib.sha256(normalized(question).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def check_share(share: object, *, where: str) -> float:
    """`share` as a float in (0, 0.9], or a TaskError that says so."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= MAX_SHARE:
        raise TaskError(
            where=f"{where}, held_out",
            expected=f"a number above 0 and at most {MAX_SHARE}",
            got=repr(share),
            do="Give the share of questions to keep for evaluation, such as held_out=0.5.",
        )
    return float(share)
