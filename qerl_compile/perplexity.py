"""Perplexity: how surprised a language model is by a text, per token.

    perplexity = exp( -mean log p(token t | tokens before t) )

Texts are cut into windows that do not overlap. Every token of a window but the first is predicted from those before it
in that window. This is what papers report for quantized models, and it is cheaper, and a little higher, than sliding
windows. If the tokenizer begins texts with a token of its own (Llama 2 and Gemma do), every window begins with it.

Numbers of two models can be compared only if tokenizer, texts and window are the same; the windows are therefore made
once (`token_windows`) and given to both. Log-softmax runs in float32 over a few rows at a time: at a vocabulary of
150,000 a window of 512 tokens would be 300 MB of float32.

`sample_text.txt` is 6 kB of English written for this project: a story, a recipe, facts, a sum, a dialogue. It tells a
broken model from a whole one; some 1,300 tokens are too few to rank two good ones. Give your own text for that.

What this module does not do: switch noise or adapters off, strides, tasks.

Shape suffixes: T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qerl_compile.checkpoint_config import read_bounded
from qerl_compile.strict_json import parse_json
from qerl_compile.wording import refuse_checkpoint, shown

WINDOW = 512
MAX_TEXT_BYTES = 64_000_000
ROWS_AT_ONCE = 64  # of float32 logits: 38 MB at 150,000 tokens


def perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, window: int = WINDOW) -> float:
    """Return the perplexity of texts under a causal LM, as it is: noise and adapters are the caller's business.

    Args:
        model: called as `model(input_ids=…, use_cache=False)`; on any device.
        tokenizer: a Hugging Face tokenizer.
        texts: each is cut into windows by itself.
        window: most tokens of a window.

    Raises:
        CheckpointError: the texts have no token that could be predicted.
    """
    nats, count = 0.0, 0
    for ids_T in token_windows(tokenizer, texts, window=window):
        nats_T = token_nats(window_logits(model, ids_T), ids_T)
        nats, count = nats + float(nats_T.double().sum()), count + len(nats_T)
    return math.exp(nats / count)


def token_windows(
    tokenizer: Any, texts: Iterable[str], *, window: int = WINDOW, max_tokens: int | None = None
) -> list[Tensor]:
    """Return the windows of texts: int64 [T] on the CPU, 2 <= T <= `window`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: each is cut by itself; a rest of one token is dropped.
        window: most tokens of a window, at least 2.
        max_tokens: stop when the windows hold this many; the last one is cut.

    Raises:
        CheckpointError: no window at all.
    """
    first = first_token(tokenizer)
    windows: list[Tensor] = []
    left = math.inf if max_tokens is None else max_tokens
    for text in texts:
        if left < 2:
            break
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        step = window - len(first)
        for start in range(0, len(ids), step):
            part = [*first, *ids[start : start + step]][: int(min(left, window))]
            if len(part) >= 2:
                windows.append(torch.tensor(part))
                left -= len(part)
    if not windows:
        do = "Give texts of at least two tokens."
        refuse_checkpoint("texts for perplexity", "at least one token to predict", "none", do=do)
    return windows


@torch.no_grad()
def window_logits(model: nn.Module, ids_T: Tensor) -> Tensor:
    """Return the logits [T, V] of one window, in the model's dtype and on its device."""
    device = next(model.parameters()).device
    return model(input_ids=ids_T[None].to(device), use_cache=False).logits[0]


def token_nats(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return -log p of every token but the first, in nats: float32 [T-1] on the CPU.

    Args:
        logits_TV: any float dtype [T, V]; the last row predicts nothing here.
        ids_T: int64 [T].
    """
    next_ids_T = ids_T[1:].to(logits_TV.device)
    nats = [
        torch.nn.functional.cross_entropy(logits_TV[rows].float(), next_ids_T[rows], reduction="none")
        for rows in row_chunks(len(next_ids_T))
    ]
    return torch.cat(nats).cpu()


def row_chunks(rows: int) -> Iterator[slice]:
    """Yield slices of at most `ROWS_AT_ONCE` rows that cover `rows`."""
    for start in range(0, rows, ROWS_AT_ONCE):
        yield slice(start, min(start + ROWS_AT_ONCE, rows))


def sample_texts() -> list[str]:
    """Return the text that comes with the package, as one document."""
    return [Path(__file__).with_name("sample_text.txt").read_text(encoding="utf-8")]


def read_texts(file: str | PathLike[str]) -> list[str]:
    """Read texts from a file of up to 64 MB: plain UTF-8, which is one text, or JSON lines, one text a line.

    A line's text is its `text`; without one, its strings joined by blank lines, in their order (a `question`, then an
    `answer`).

    Raises:
        CheckpointError: unreadable, too large, not UTF-8, or a line without any string.
    """
    path = Path(file)
    raw = read_bounded(path, MAX_TEXT_BYTES)
    if path.suffix != ".jsonl":
        try:
            return [raw.decode("utf-8")]
        except UnicodeDecodeError as fault:
            refuse_checkpoint(str(path), "text in UTF-8", str(fault), do="Convert the file to UTF-8.")
    lines = [(number, line) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    return [_line_text(parse_json(line, where=f"{path}:{number}"), f"{path}:{number}") for number, line in lines]


def _line_text(row: Any, where: str) -> str:
    strings = [value for value in row.values() if isinstance(value, str)] if isinstance(row, dict) else []
    if not strings:
        refuse_checkpoint(where, "an object with a string in it", shown(row), do='Write lines like {"text": "…"}.')
    return row["text"] if isinstance(row.get("text"), str) else "\n\n".join(strings)


def first_token(tokenizer: Any) -> list[int]:
    """Return the token that a tokenizer puts before every text, alone in a list; an empty one if it puts none."""
    ids = tokenizer("a")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []
