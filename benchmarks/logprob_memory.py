"""Memory and time of log-probabilities: whole logits, checkpointed chunks, chunks with a backward of our own.

    python benchmarks/logprob_memory.py [--quick]      about 10 minutes, writes results/logprob_memory.md

A model of SmolLM2-135M's shapes (30 layers, hidden 576, vocabulary 49152, tied head) with random bf16 weights; only its
norms are trained, so that gradients cross every layer, as with adapters, and the head is frozen. One thread.

    whole      the model's logits for all completion positions, float32 log-softmax over them: what we did before
    chunked    qerl_compile.rl.token_logps
    function   the same chunks with an autograd function for a frozen dense head: gradients of a chunk are computed in
               place in backward. It knows nothing of adapted, packed or trained heads
    kl whole, kl chunked     the same two with the divergence from a teacher of the same shapes

*Memory* is the kernel's own mark (VmHWM, reset before each pass) above what was resident before the pass: it sees
temporaries inside operators too. What the process keeps from earlier passes counts as resident, and malloc keeps blocks
below 32 MiB: the layers' activations, the same for all, do not show; logits do. *Time* is CPU time of a forward and a
backward. Competitors run in turn, three rounds; the median of times and the largest memory are kept. The first pass of
each shape is thrown away.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qerl_compile.rl.logit_head import completion_logits
from qerl_compile.rl.policy_batch import MicroBatch, micro_batches
from qerl_compile.rl.rollout import Rollout
from qerl_compile.rl.rollout.padding import last_positions, positions
from qerl_compile.rl.token_logps import CHUNK_BYTES, token_logps, token_logps_and_kl

RESULT = Path(__file__).parent / "results" / "logprob_memory.md"
PROMPT = 64
TEMPERATURE = 0.9
MIB = 2**20


def model(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    made = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("norm" in name)
    return made


def batch(rows: int, completion: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 49152, (count,), generator=generator).tolist())

    rollouts = [Rollout(ids(PROMPT), ids(completion), (0.0,) * completion, True) for _ in range(rows)]
    made = micro_batches(rollouts, torch.ones(rows), max_tokens=10**9, pad_id=0, device=torch.device("cpu"))
    return next(made)


def whole_log_softmax(policy: Any, given: MicroBatch) -> Tensor:
    logits_BCV = policy(
        input_ids=given.ids_BS,
        attention_mask=given.attention_BS,
        position_ids=positions(given.attention_BS),
        use_cache=False,
        logits_to_keep=last_positions(given.ids_BS, given.mask_BC.shape[1] + 1),
    ).logits
    return torch.log_softmax(logits_BCV[:, :-1].float() / TEMPERATURE, dim=-1)


def picked(logp_BCV: Tensor, given: MicroBatch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        entropy_BC = torch.special.entr(logp_BCV.exp()).sum(-1)
    return logp_BCV.gather(2, given.ids_BS[:, -given.mask_BC.shape[1] :, None]).squeeze(2), entropy_BC


def whole(policy: Any, teacher: Any, given: MicroBatch) -> Tensor:
    return picked(whole_log_softmax(policy, given), given)[0].sum()


def whole_kl(policy: Any, teacher: Any, given: MicroBatch) -> Tensor:
    with torch.no_grad():
        taught_BCV = whole_log_softmax(teacher, given)
    logp_BCV = whole_log_softmax(policy, given)
    kl_BC = (logp_BCV.exp() * (logp_BCV - taught_BCV)).sum(-1)
    return picked(logp_BCV, given)[0].sum() + kl_BC.sum()


def chunked(policy: Any, teacher: Any, given: MicroBatch) -> Tensor:
    return token_logps(policy, given, TEMPERATURE)[0].sum()


def chunked_kl(policy: Any, teacher: Any, given: MicroBatch) -> Tensor:
    logp_BC, _, kl_BC = token_logps_and_kl(policy, teacher, given, TEMPERATURE)
    return logp_BC.sum() + kl_BC.sum()


class Chunks(torch.autograd.Function):
    """Log-probabilities of tokens from hidden states and a frozen weight; d hidden = W^T (onehot - p) / temperature."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies [N]."""
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        logps, entropies = [], []
        for hidden_nD, ids_n in Chunks.pairs(hidden_ND, ids_N, weight_VD):
            logp_nV = (hidden_nD @ weight_VD.T).float().div_(TEMPERATURE).log_softmax(1)
            logps.append(logp_nV.gather(1, ids_n[:, None]).squeeze(1))
            entropies.append(torch.special.entr(logp_nV.exp_()).sum(1))
        return torch.cat(logps), torch.cat(entropies)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Make each chunk of logits again and turn it into its gradient in place."""
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        rows = Chunks.rows(weight_VD)
        gradients = []
        for (hidden_nD, ids_n), grad_n in zip(
            Chunks.pairs(hidden_ND, ids_N, weight_VD), grads[0].split(rows), strict=True
        ):
            p_nV = (hidden_nD @ weight_VD.T).float().div_(TEMPERATURE).softmax(1)
            p_nV.scatter_add_(1, ids_n[:, None], torch.full((len(ids_n), 1), -1.0))
            gradients.append(p_nV.mul_(-grad_n[:, None] / TEMPERATURE).to(weight_VD.dtype) @ weight_VD)
        return torch.cat(gradients), None, None

    @staticmethod
    def rows(weight_VD: Tensor) -> int:
        """Return how many tokens a chunk has."""
        return CHUNK_BYTES // (4 * len(weight_VD))

    @staticmethod
    def pairs(hidden_ND: Tensor, ids_N: Tensor, weight_VD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return hidden states and token ids chunk by chunk."""
        rows = Chunks.rows(weight_VD)
        return list(zip(hidden_ND.split(rows), ids_N.split(rows), strict=True))


def function(policy: Any, teacher: Any, given: MicroBatch) -> Tensor:
    hidden_ND = completion_logits(policy, given).features_NX
    ids_N = given.ids_BS[:, -given.mask_BC.shape[1] :][given.mask_BC]
    return Chunks.apply(hidden_ND, policy.lm_head.weight, ids_N)[0].sum()


COMPETITORS: dict[str, Callable[[Any, Any, MicroBatch], Tensor]] = {
    "whole": whole,
    "chunked": chunked,
    "function": function,
    "kl whole": whole_kl,
    "kl chunked": chunked_kl,
}


def status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measured(run: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Return bytes above what was resident, CPU seconds, and the loss."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    before, begin = status_kib("VmRSS"), time.process_time()
    loss = run()
    loss.backward()
    return (status_kib("VmHWM") - before) * 1024, time.process_time() - begin, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, one round, one shape; writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    policy, teacher = (model(2 if quick else 30) for _ in range(2))
    lines = []
    for rows, completion in [(4, 128)] if quick else [(4, 128), (8, 256)]:
        given = batch(rows, completion)
        cells: dict[str, list[tuple[float, float, float]]] = {name: [] for name in COMPETITORS}
        for round_ in range(2 if quick else 4):
            for name, run in COMPETITORS.items():
                policy.zero_grad()
                cell = measured(lambda run=run, given=given: run(policy, teacher, given))
                if round_:
                    cells[name].append(cell)
        for name, taken in cells.items():
            peak, seconds = max(cell[0] for cell in taken), statistics.median(cell[1] for cell in taken)
            lines.append(f"| {rows} × {completion} | {name} | {peak / MIB:.0f} | {seconds:.2f} | {taken[-1][2]:.1f} |")
            print(lines[-1], flush=True)
    if quick:
        return
    git = ["git", "-C", str(RESULT.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    RESULT.write_text(
        "# Log-probabilities from whole logits and from chunks\n\n"
        "Forward and backward of one micro-batch; benchmarks/logprob_memory.py says what is measured.\n"
        "Activations of the layers, the same for all, are not in the peak.\n\n"
        f"commit {commit}; torch {torch.__version__}, {platform.machine()}, one thread; 64 prompt tokens a row; "
        f"chunks of {CHUNK_BYTES // MIB} MiB ({CHUNK_BYTES // (4 * 49152)} tokens)\n\n"
        "| rows × completion | | peak MiB above resident | CPU s | sum |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
