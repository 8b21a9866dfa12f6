"""Calibration: weights rounded, and scales measured, on sample text. `calibrate` is the way in; see running.py.

    model = qerl_compile.calibrate("path/or/hub-id", recipe, texts)

samples         texts → token rows
layer_calls     decoder layers one at a time
statistics      what is known of a linear's input
channel_scaling AWQ: factors moved from activations into weights
gptq            rounding with error feedback
layer           one layer: gather, fold, round
served_scales   input scales and FP8 cache scales
dense_weights   from memory or, layer by layer, from a checkpoint
running         `calibrate`
"""

from qerl_compile.calibrating.running import LayerReport, calibrate

__all__ = ["LayerReport", "calibrate"]
