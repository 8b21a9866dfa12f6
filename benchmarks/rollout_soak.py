"""Two thousand requests of random lengths and stops through our engine: nothing lost, nothing twice, memory flat.

    python benchmarks/rollout_soak.py [--device cuda] [--requests 2000]      writes results/rollout_soak.json

A tiny transformed Llama, one sampler whose cache holds a quarter of what its rows could use, so that samples wait for
rows and for pages. Each call has its own prompts (1 to 200 tokens, some several times), group size, limit, end tokens
and way of drawing; adapters and noise change between calls, as in training. What is checked, and ends the run with an
error if it does not hold:

    order        rollouts are those of prompt 0's samples, prompt 1's samples, …, by prompt and by number
    once         every (prompt, sample) is started once and finished once
    ends         a completion ends at its first end token or at the limit
    origin       log-probabilities of one completion in ten, recomputed by a training forward over prompt and completion
    alone        one prompt per call on one row gives the same tokens (CPU only: products on a GPU depend on the rows)
    pages        all are free when a call is over
    memory       RSS on a CPU, allocated bytes on a GPU: no more at the end than in the first half, in which every kind
                 of call has run (on a GPU all graphs are captured before), but for what an allocator keeps
                 (`SLACK_BYTES`)

Lengths are what makes an engine lose things, so they are drawn wide: from one token to fifty times as many.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from benchmarks.rollout_cpu import cpu
from qerl_compile.rl.rollout import PagedSampler, Rollouts, Sampling, paged
from qerl_compile.rl.rollout.cache import CacheShape
from qerl_compile.rl.rollout.memory import Workload
from qerl_compile.rl.rollout.pages import PagePool
from qerl_compile.rl.rollout.schedule import Admission, Request, Schedule
from qerl_compile.transforming import resample_noise, transform

RESULTS = Path(__file__).parent / "results"
ROWS, LONGEST, NEW, VOCABULARY, PER_CALL = 24, 200, 96, 128, 100
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 512,
}  # fmt: skip
DRAWING: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9}]
COLUMNS = (
    "requests", "group", "prompts", "limit", "ends", "tokens", "lengths", "ended", "no pages", "occupancy", "off", "s",
    "MiB",
)  # fmt: skip
SLACK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 20}
TOLERANCE = {"cpu": 1e-4, "cuda": 0.2}  # float32; bf16 logits of up to 10


@dataclass(frozen=True)
class Call:
    """One call of `generate`."""

    prompts: list[tuple[int, ...]]
    group_size: int
    params: Sampling


class WatchedPool(PagePool):
    """Tells which pages are still held when a call is over."""

    made: ClassVar[list["WatchedPool"]] = []

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.made.append(self)


class WatchedSchedule(Schedule):
    """Counts starts and finishes of each request."""

    started: ClassVar[Counter[Request]] = Counter()
    finished: ClassVar[Counter[Request]] = Counter()
    out_of_pages: ClassVar[Counter[bool]] = Counter()

    def admit(self) -> Admission:
        """Count the starts, and whether rows stay free for want of pages."""
        admission = super().admit()
        self.started.update(start.request for start in admission.starts)
        self.out_of_pages[bool(self.waiting and self._free_rows)] += 1
        return admission

    def finish(self, row: int) -> Request:
        """Count it."""
        request = super().finish(row)
        self.finished[request] += 1
        return request


def make_model(device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(8)  # 0.02 gives logits too flat to tell tokens apart
    model = model.to(torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    return transform(model, "qerl-nvfp4-aqn", inner="eager")


def random_call(number: int, requests: int) -> Call:
    rng = random.Random(number)  # noqa: S311  # nothing secret
    if number == 0:  # the largest of all: no later call needs more memory
        longest = [tuple(rng.randrange(VOCABULARY) for _ in range(LONGEST)) for _ in range(requests // 2)]
        return Call(longest, 2, Sampling(NEW, (1,), 0, seed=(0, "soak")))
    group_size = rng.choice([1, 2, 4, 7, 8])
    count = max(1, requests // group_size)
    lengths = [rng.choice([1, 15, 16, 17, rng.randint(1, 40), rng.randint(1, LONGEST)]) for _ in range(count)]
    prompts = [tuple(rng.randrange(VOCABULARY) for _ in range(length)) for length in lengths]
    prompts[-1] = prompts[0]  # the same prompt at two places is two requests
    ends = tuple(rng.sample(range(VOCABULARY), rng.randint(0, 16)))
    drawing = DRAWING[number % len(DRAWING)]
    return Call(prompts, group_size, Sampling(rng.randint(1, NEW), ends, 0, **drawing, seed=(number, "soak")))


def used_bytes(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(condition: bool, what: str, call: int) -> None:
    if not condition:
        raise SystemExit(f"soak: call {call}: {what}")


def check_call(number: int, call: Call, got: Rollouts, model: Any, device: str) -> float:
    """Every check of one call; returns the largest difference of a recomputed log-probability."""
    wanted = [Request(prompt, sample) for prompt in range(len(call.prompts)) for sample in range(call.group_size)]
    check([r.prompt_ids for r in got] == [call.prompts[w.prompt] for w in wanted], "rollouts out of order", number)
    once = Counter(wanted)
    check(WatchedSchedule.started == once, "a request was lost or started twice", number)
    check(WatchedSchedule.finished == once, "a request was lost or finished twice", number)
    check(all(pool.free == pool.pages for pool in WatchedPool.made), "pages are still held", number)
    ends, limit = set(call.params.end_ids), call.params.max_new_tokens
    worst = 0.0
    for index, rollout in enumerate(got):
        tokens = rollout.completion_ids
        check(1 <= len(tokens) <= limit and len(rollout.logps) == len(tokens), f"length of rollout {index}", number)
        check(not ends & set(tokens[:-1]), f"rollout {index} goes on after an end token", number)
        check(rollout.ended == (tokens[-1] in ends), f"`ended` of rollout {index}", number)
        check(rollout.ended or len(tokens) == limit, f"rollout {index} stops early", number)
        if index % 10 == 0:
            worst = max(worst, difference(model, call.params.temperature, rollout, device))
    check(worst < TOLERANCE[device], f"log-probabilities are {worst} off, or of another request", number)
    return worst


@torch.no_grad()
def difference(model: Any, temperature: float, rollout: Any, device: str) -> float:
    """How far recorded log-probabilities are from recomputed ones; if greedy, how far a logit is from the largest."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]], device=device)
    start = len(rollout.prompt_ids)
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
    chosen = ids[0, start:, None]
    if temperature == 0:
        return float((logits.max(-1).values - logits.gather(1, chosen).squeeze(1)).max())
    logps = torch.log_softmax(logits / temperature, -1).gather(1, chosen).squeeze(1)
    return float((logps.cpu() - torch.tensor(rollout.logps)).abs().max())


@torch.no_grad()
def train(model: Any, number: int, device: str) -> None:
    """Other adapters and other noise, in place."""
    generator = torch.Generator(device).manual_seed(number)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.05, generator=generator)
    resample_noise(model, 0.02, torch.Generator().manual_seed(number))


def capture_all(sampler: PagedSampler) -> None:
    """Call 0 for the sizes of pages and lines, then every batch size with every way of drawing: no graph is new after.

    Which sizes a call needs depends on what ends when, so calls alone would meet the last one late or never.
    """
    first = random_call(0, PER_CALL)
    sampler.generate(first.prompts, first.group_size, first.params)
    for drawing in DRAWING:
        for count in range(1, ROWS + 1):
            sampler.generate([(1, 2)] * count, 1, Sampling(3, (), 0, **drawing, seed=(count, "soak")))


def soak(device: str, requests: int) -> dict[str, Any]:
    paged.Schedule, paged.PagePool = WatchedSchedule, WatchedPool
    model = make_model(device)
    sampler = PagedSampler(model, rows=ROWS, budget_bytes=budget(device))
    alone = PagedSampler(model, rows=1)
    rows: list[dict[str, Any]] = []
    done = number = 0
    if device == "cuda":
        capture_all(sampler)
    print(" ".join(f"{name:>9}" for name in COLUMNS))
    while done < requests:
        call = random_call(number, min(PER_CALL, requests - done))
        train(model, number, device)
        watched = WatchedSchedule
        for counts in (watched.started, watched.finished, watched.out_of_pages, WatchedPool.made):
            counts.clear()
        begin = time.perf_counter()
        got = sampler.generate(call.prompts, call.group_size, call.params)
        took = time.perf_counter() - begin
        worst = check_call(number, call, got, model, device)
        if device == "cpu":
            again = alone.generate(call.prompts[:1], 1, call.params)
            check(again[0].completion_ids == got[0].completion_ids, "rollout 0 is another one alone", number)
        lengths = [len(rollout.completion_ids) for rollout in got]
        done += len(got)
        prompts = [len(prompt) for prompt in call.prompts]
        cells = (
            len(got), call.group_size, f"{min(prompts)}-{max(prompts)}", call.params.max_new_tokens,
            len(call.params.end_ids), sum(lengths), f"{min(lengths)}-{max(lengths)}", sum(r.ended for r in got),
            watched.out_of_pages[True], round(got.metrics["rollout/occupancy"], 2), float(f"{worst:.1e}"),
            round(took, 2), round(used_bytes(device) / 2**20, 1),
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
        print(" ".join(f"{cell!s:>9}" for cell in cells), flush=True)
        number += 1
    warm = max(row["MiB"] for row in rows[: max(2 * len(DRAWING), len(rows) // 2)])
    growth = rows[-1]["MiB"] - warm
    check(growth * 2**20 <= SLACK_BYTES[device], f"memory grew by {growth:.1f} MiB", number)
    check(done == requests, f"{done} requests instead of {requests}", number)
    return {"calls": rows, "requests": done, "growth_mib": round(growth, 1)}


def budget(device: str) -> int:
    """Bytes for a quarter of the pages that the rows could use at most."""
    tokens = paged.PAGE_TOKENS[device]
    most = Workload((LONGEST,) * ROWS, 1, NEW, tokens).most_pages(ROWS)
    shape = CacheShape(2, 2, 16, tokens, torch.float32 if device == "cpu" else torch.bfloat16)
    return most // 4 * shape.page_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", default=str(RESULTS / "rollout_soak.json"))
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    report = {
        "commit": options.commit or subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu(),
        "torch": torch.__version__,
        **soak(options.device, options.requests),
    }
    Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    tokens = sum(row["tokens"] for row in report["calls"])
    print(f"{report['requests']} requests, {tokens} tokens, memory {report['growth_mib']:+} MiB; wrote {options.json}")


if __name__ == "__main__":
    main()
