"""Sample text as rows of tokens, all of one length and without padding.

Texts are joined, an end-of-text token after each, and the stream is cut into rows, as GPTQ and most that followed do: a
padded row would put tokens into the statistics that no user ever sends. A tokenizer that begins texts with a token of
its own (Llama 2, Gemma) begins every row with it, for models of that kind compute nonsense without.

What this module does not do: read files (perplexity.py, `read_texts`) or choose texts. Text like that which the model
will see is best; a chat template, if the model is used with one, is the caller's to apply.

Shape suffixes: S samples, T tokens of each.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qerl_compile.errors import TaskError
from qerl_compile.perplexity import first_token


def token_rows(texts: Iterable[str], tokenizer: Any, *, samples: int, tokens: int) -> Tensor:
    """Return the first rows of the joined texts; reads no more texts than it needs.

    Args:
        texts: in the order in which they are read.
        tokenizer: a Hugging Face tokenizer.
        samples: most rows.
        tokens: length of each row.

    Returns:
        int64 [S, T] on the CPU, 1 <= S <= `samples`; the rest of the stream that fills no row is dropped.

    Raises:
        TaskError: `texts` is one string, or all texts together are shorter than one row.
    """
    if isinstance(texts, str):
        raise TaskError(
            where="calibration texts",
            expected="a list of texts",
            got="one string, which would be read letter by letter",
            do="Pass [text].",
        )
    begin = first_token(tokenizer)
    fresh = tokens - len(begin)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]
        if len(stream) >= samples * fresh:
            break
    count = min(samples, len(stream) // fresh)
    if count == 0:
        raise TaskError(
            where="calibration texts",
            expected=f"at least {fresh} tokens, to fill one sample",
            got=f"{len(stream)}",
            do="Give more text, or set calibration.tokens lower.",
        )
    return torch.tensor([[*begin, *stream[i * fresh : (i + 1) * fresh]] for i in range(count)])
