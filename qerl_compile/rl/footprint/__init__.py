"""What a run takes of a GPU, predicted from shapes: weights, adapters, pages, activations, peaks, and what fits.

prediction.py          the sum: after load, rollout, update
resident.py            what a transformed model holds, counted on a model without weights
layer_graphs.py        one layer of each kind, compiled up to code generation
liveness.py            what of such a graph lives when
operator_scratch.py    what an operator allocates within a call
planned_attention.py   attention as a GPU's kernels hold it
fitting.py             which one setting makes it fit
"""

from qerl_compile.rl.footprint.prediction import Footprint, Predictor, predict, present_device_bytes

__all__ = ["Footprint", "Predictor", "predict", "present_device_bytes"]
