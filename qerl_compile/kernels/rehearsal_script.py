"""What a rehearsal is told: which shapes a run will launch kernels for.

warm_up.py writes a script in the run's own process, rehearsal.py reads it in another. It stands apart because
rehearsal.py imports Triton, which a machine without a GPU does not have.

What this module does not do: know a model (warm_up.py), or launch anything (rehearsal.py).
"""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Linear:
    """A packed weight as rollouts and training multiply by it.

    Attributes:
        n: output features, of a fused group all of them.
        k: input features.
        rank: of the stacked adapter, as padded; 0 for none.
        residual: whether rollouts add what the result is added to in its kernel (passes/residual.py).
    """

    n: int
    k: int
    rank: int = 0
    residual: bool = False


@dataclass(frozen=True)
class Attention:
    """Paged attention of a decode step.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        head_dim: D.
        page_tokens: positions of a page.
        pages: of a row, at most.
        bias: whether q, k and v have one.
        windows: positions seen, 0 for all; one entry for each kind of layer.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    pages: int
    bias: bool
    windows: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Script:
    """What will be launched.

    Attributes:
        capability: compute capability of the run's device.
        multiprocessors: of that device.
        linears: packed weights, each shape once.
        attention: of a decode step; None for none.
        decode_rows: batch sizes of decode steps.
        prefill_tokens: numbers of tokens of prefills.
        training_tokens: numbers of tokens of micro-batches.
        processes: to compile in.
    """

    capability: tuple[int, int]
    multiprocessors: int
    linears: tuple[Linear, ...]
    attention: Attention | None = None
    decode_rows: tuple[int, ...] = ()
    prefill_tokens: tuple[int, ...] = ()
    training_tokens: tuple[int, ...] = ()
    processes: int = 1

    def to_json(self) -> str:
        """Return the script as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Script":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        attention = fields.pop("attention")
        if attention is not None:
            attention = Attention(**attention | {"windows": tuple(attention["windows"])})
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return cls(
            **fields | lists | {"linears": tuple(Linear(**one) for one in fields["linears"])}, attention=attention
        )
