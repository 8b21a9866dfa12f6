"""Settings for every test: no network, one thread (two busy cores make torch's barriers spin), small hypothesis runs.

`QERL_FUZZ=100` multiplies the number of hypothesis examples by 100, for the long runs outside CI.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
collect_ignore_glob = [] if torch.cuda.is_available() else ["*_gpu.py"]  # not collected, rather than passed or skipped

# Dynamo makes objects by the million that live on, and looking through them costs more the longer a process runs:
# 5.5 of 44 s in tests/test_noise_acts.py alone, 1.3 s with these.
gc.set_threshold(50_000, 20, 50)

settings.register_profile(
    "qerl",
    max_examples=50 * int(os.environ.get("QERL_FUZZ", "1")),
    deadline=None,  # a shared machine; time is never asserted
    derandomize="QERL_FUZZ" not in os.environ,  # CI repeats itself, long runs explore
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("qerl")
