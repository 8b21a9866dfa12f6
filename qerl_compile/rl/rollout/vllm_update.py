"""What vLLM is told before each rollout, so that its copy of the weights is the model that is being trained.

    adapter   PEFT files in a directory of their own → LoRARequest with a name and a number never used before
    norms     clean (or trained) + z in a safetensors file → `vllm_worker.NormLoader` in every worker
    cache     reset_prefix_cache, since its blocks were computed with the old weights

**Why files, and a method called by name.** vLLM offers four ways to its weights (read in 0.10.2, 0.16.0, 0.24.0 and
0.33.0). `LLM.apply_model(function)`: the engine is another process by default, and a function crosses over only under
VLLM_ALLOW_INSECURE_SERIALIZATION=1. `collective_rpc` with tensors: untyped arguments arrive as they were encoded, not
as tensors. `init_weight_transfer_engine` and `update_weights` (from 0.16 on): nothing comes back to be counted, two
calls had become four by 0.24, and the transport for one GPU imports ray there. `collective_rpc` with strings:
documented, the same in every version, nothing pickled.

**Why a fresh name.** vLLM loads an adapter's number once, and finds cached prefixes by the adapter's name alone, so one
that is overwritten in place meets the prefixes of its predecessor (vllm-project/vllm issue 42125, pull request 48352).

**Noise is rounded here.** vLLM keeps norms in its dtype. In bfloat16, numbers near 1 are 2⁻⁷ apart, and w + z with
σ = 5e-4 is w again for nearly every element (passes/noise.py). `noise/rms_served` is what vLLM computes with, to be
compared with `noise/rms`; our own engine adds in float32. Trained norms go the same way, and so are rounded too: vLLM
refuses an adapter that brings norms (lora/peft_helper.py).

**Its base is checked once**, by norms and one packed weight: an adapter fits only the weights it was trained on.
"""

import math
import shutil
import tempfile
import weakref
from collections import Counter
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qerl_compile.adapter_files import adapters_of, write_adapter
from qerl_compile.checkpoint_dir import open_checkpoint
from qerl_compile.errors import CheckpointError, ModelError
from qerl_compile.passes.trained_norms import norm_weight
from qerl_compile.plan import Plan
from qerl_compile.transforming import state_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What every version takes as max_lora_rank (config/lora.py)."""


class WeightUpdate:
    """Writes what changed, makes vLLM read it, and checks that it did.

    Args:
        model: the transformed model.
        base_dir: what vLLM was started on.
        dtype: of vLLM's norms.
        work_dir: where the files go; they are removed with this object. None is the system's temporary directory.
        workers: how many workers hold each norm: tensor_parallel_size.
    """

    def __init__(
        self, model: Any, base_dir: Path, dtype: torch.dtype, work_dir: str | PathLike[str] | None, workers: int
    ) -> None:
        self.model, self.base_dir, self.dtype, self.workers = model, base_dir, dtype, workers
        self.sites = pushed_norms(state_of(model).plan)
        self.count = 0
        self.directory = Path(tempfile.mkdtemp(prefix="qerl-vllm-", dir=work_dir))
        weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)

    def push(self, llm: Any) -> tuple[Any, dict[str, float]]:
        """Bring `llm` up to date.

        Returns:
            The LoRARequest to generate with (None without adapters), and metrics.

        Raises:
            ModelError: a norm did not arrive, or the engine is busy.
            ExportError: NaN or Inf in an adapter.
        """
        metrics = self._push_norms(llm) if self.sites else {}
        request = self._write_adapter() if adapters_of(self.model) else None
        if not llm.reset_prefix_cache():
            raise ModelError(
                where="VllmSampler: prefix cache",
                expected="an idle engine, whose cached prefixes can be dropped after its weights changed",
                got="reset_prefix_cache() returned False, so requests are running",
                do="Use this vLLM for nothing else while it samples rollouts.",
            )
        return request, metrics

    def _push_norms(self, llm: Any) -> dict[str, float]:
        from safetensors.torch import save_file

        path = self.directory / "norms.safetensors"
        served, squares, elements = {}, 0.0, 0
        for site in self.sites:
            norm = self.model.get_submodule(site)
            clean, noise = norm_weight(norm), norm._buffers.get("noise")
            noisy = (clean if noise is None else clean + noise).to(self.dtype)
            served[f"{site}.weight"] = noisy.cpu().contiguous()
            squares += (noisy.double() - clean.to(self.dtype).double()).square().sum().item()
            elements += noisy.numel()
        save_file(served, path)
        answers = llm.collective_rpc("qerl_load_norms", args=(str(path),))
        arrived = Counter(name for names in answers for name in names)
        missing = [name for name in served if arrived[name] != self.workers]
        if missing:
            raise ModelError(
                where="VllmSampler: noise",
                expected=f"{len(served)} norms in vLLM's model, as planned, on {self.workers} worker(s) each",
                got=f"{len(served) - len(missing)}, without {', '.join(missing[:3])}",
                do="Check `dtype`; if it is vLLM's own, report the architecture: its model has other names for them.",
            )
        return {"rollout/norms": float(len(served)), "noise/rms_served": math.sqrt(squares / elements)}

    def _write_adapter(self) -> Any:
        """Write the adapter and name it anew; its predecessor will not be asked for again, so its files go."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]  # optional

        shutil.rmtree(self.directory / f"adapter-{self.count}", ignore_errors=True)
        self.count += 1
        path = self.directory / f"adapter-{self.count}"
        write_adapter(self.model, path, base_name=str(self.base_dir), norms=False)
        name = f"{self.directory.name}-{self.count}"
        return LoRARequest(lora_name=name, lora_int_id=self.count, lora_path=str(path))


def pushed_norms(plan: Plan) -> tuple[str, ...]:
    """Return the norms whose weights change from rollout to rollout: the noisy and the trained."""
    return tuple(dict.fromkeys([*plan.noise, *plan.trained_norms]))


def served_rank(model: Any) -> int:
    """Return the least max_lora_rank that holds the model's adapters; 0 without any.

    Raises:
        ModelError: adapters that vLLM cannot compute.
    """
    adapters = adapters_of(model)
    scalings = {adapter.alpha / adapter.rank for adapter in adapters.values()}
    if len(scalings) > 1:
        raise ModelError(
            where="VllmSampler: adapters",
            expected="one alpha / rank, since vLLM applies that of adapter_config.json to every module",
            got=", ".join(f"{scaling:g}" for scaling in sorted(scalings)),
            do="Give the recipe's lora rules alphas in proportion to their ranks.",
        )
    largest = max((adapter.rank for adapter in adapters.values()), default=0)
    if largest > RANKS[-1]:
        raise ModelError(
            where="VllmSampler: adapters",
            expected=f"ranks up to {RANKS[-1]}",
            got=str(largest),
            do="Lower the rank in the recipe's lora rules.",
        )
    return next(rank for rank in RANKS if rank >= largest) if adapters else 0


def check_base(model: Any, base_dir: Path) -> None:
    """Refuse a checkpoint that does not hold the weights of the model.

    Raises:
        CheckpointError: a norm or the first packed weight is missing or has other numbers, or the directory is faulty.
    """
    from safetensors import safe_open

    plan = state_of(model).plan
    packed = list(plan.quantize)[:1]
    leaves = [(site, "weight") for site in pushed_norms(plan)] + [(site, "weight_packed") for site in packed]
    entries = open_checkpoint(base_dir).tensors
    for site, leaf in leaves:
        name, found = f"{site}.{leaf}", None
        own: Tensor = model.get_submodule(site).get_parameter(leaf).detach().cpu()
        if name in entries:
            with safe_open(entries[name].file, framework="pt") as file:
                found = file.get_tensor(name)
        if found is None or not torch.equal(found, own.to(found.dtype)):
            raise CheckpointError(
                where=str(base_dir),
                expected=f"the weights of the model that is being trained, {name} among them",
                got="no such tensor" if found is None else "other numbers",
                do="Write it with qerl_compile.export(model, DIR, target='vllm').",
            )
