"""`inspect`: what a directory of NVFP4 weights is, and what is wrong with it, whoever wrote it.

    report = inspect_checkpoint(DIR)                 or: qerl-compile inspect DIR [--against BASE] [--json]
    report.faults                                    each with what breaks where, and what to do

The field is full of NVFP4 files that load everywhere and answer garbage: a scale the wrong way up, scales that an
engine fuses but the writer did not, an entry missing in a list. `load` refuses the first fault that it meets. Here all
are told, so the reading is tolerant: a missing tensor is a line in the report and not an exception. Only a directory
that checkpoint_dir.py refuses, because it is damaged or hostile, raises.

    recognition    which dialect, and which tensors belong to which linear        recognition.py
    skeleton       the linears and tensors that config.json promises              skeleton.py
    configs        quantization configs against the schema and the tensors        configs.py, lists.py
    headers        names, shapes and dtypes                                       headers.py
    numbers        each linear's values, one at a time: statistics and faults     numbers.py
    against        signal to noise against the dense base, if there is one        against.py

What breaks which engine was measured or read in its source; `kinds.py` is the table, from design/formats.md.

What cannot be told: whether the nibbles of all bytes are swapped. A block has the same sixteen codes either way.
Against the base it can be told, and is.
"""

from qerl_compile.checkup.findings import Fault, LayerReport, Report
from qerl_compile.checkup.inspecting import inspect_checkpoint

__all__ = ["Fault", "LayerReport", "Report", "inspect_checkpoint"]
