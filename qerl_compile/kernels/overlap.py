"""Which savings of launches are on: for one comparison on a GPU, after which this file goes.

QERL_OVERLAP is the sum of
    1    h and x in order from one launch (lead_in.py)
    2    that launch is a programmatic dependent
    4    attention's second kernel is one
    8    attention's first kernel is one too
    16   the stream kernel adds the residual
It is read at every launch, so that one process can capture graphs with and without.
"""

import os

BITS = int(os.environ.get("QERL_OVERLAP", "31"))


def on(bit: int) -> bool:
    """Whether this saving is on."""
    return bool(BITS & bit)
