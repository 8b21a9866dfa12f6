"""GRPO steps of a model with random weights: the trainer's own step, measured phase by phase.

One process builds a model and takes one step of each shape (prompts x group, new tokens). What a step needs is the
trainer's: rollout, rewards, advantages, update. Here it is only given tokens to work on and looked at:

    prompts     256 words of a tokenizer with a word a token, every prompt another
    reward      a number made of the completion's tokens, so that every group has signal and every row is trained on
    lengths     no token ends a completion, so all have the full length
    noise       on: the step is taken from the middle of a run

**Warm-up.** Before the measured step of a shape: four tokens in lines and pages of the real size, so that the CUDA
graphs captured then are those of the measured step; one update on one micro-batch of made-up completions, which makes
the optimizer's state too; and the same without gradients. The first shape's warm-up compiles nearly everything; its
seconds are noted.

**Log-probabilities.** With one update per rollout the trainer has no pass of its own for them: the update's forward
gives them. So the time of such a pass, without gradients, is taken beside the step, on made-up completions.

**Memory** is torch's own count of allocated bytes: after the model was made, and the most during rollout and update,
counted from zero each time. The trainer asks between the two whether it should stop, which is when the first is read.
Pages of an earlier shape are given back before the next begins; those of this shape stay during its update.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.qwen32b_phases import Load, PhaseHooks, Stopwatch, ceilings, floors, phases_of
from benchmarks.qwen32b_rows import GB, append, provenance
from benchmarks.random_models import RECIPES, random_model
from benchmarks.rollout import step_bytes
from qerl_compile.recipe import Recipe
from qerl_compile.rl.collecting import Experience
from qerl_compile.rl.policy_batch import micro_batches
from qerl_compile.rl.prompts import PromptFormat
from qerl_compile.rl.rollout import Rollout, Sampling
from qerl_compile.rl.rollout.memory import Workload
from qerl_compile.rl.token_logps import token_logps
from qerl_compile.rl.trainer import Trainer
from qerl_compile.warm_up import Rehearsal
from tests.rl.toy import Echo, words

STEPS, STEP = 20, 10  # of a run of 20 steps the tenth: noise begins after the first stage
NO_END = (-2,)
WARM_TOKENS = 4


@dataclass(frozen=True)
class Shape:
    """One step's work.

    Args:
        prompts: different ones.
        group: completions of each.
        new: tokens of each completion.
    """

    prompts: int
    group: int
    new: int

    @classmethod
    def read(cls, text: str) -> "Shape":
        """From PROMPTSxGROUP:NEW."""
        sequences, _, new = text.partition(":")
        prompts, _, group = sequences.partition("x")
        return cls(int(prompts), int(group), int(new))

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.group


def micro_batch_setting(text: str) -> tuple[int, bool]:
    """Tokens and recompute, from TOKENS:on or TOKENS:off."""
    tokens, _, recompute = text.partition(":")
    if recompute not in ("on", "off"):
        raise ValueError(text)
    return int(tokens), recompute == "on"


class Task(Echo):
    """Prompts of so many words, each prompt another."""

    def __init__(self, length: int) -> None:
        self.length = length

    def train_row(self, seed: int, position: int) -> dict[str, Any]:
        """A prompt made of its position."""
        names = ("say", "now", "red", "green", "blue", "grey")
        said = [names[(position * 31 + i * i) % 6] for i in range(self.length)]
        return {"prompt": " ".join(said), "answer": "red"}


def reward(completion_ids: Any, **_: Any) -> list[float]:
    """A number made of a completion's tokens."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


class Bench:
    """A model, and what is measured on it.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.watch = Stopwatch(self.device)
        self.ceilings = ceilings(self.device)
        self.rehearsal: Rehearsal | None = None
        begin = time.perf_counter()
        self.model = random_model(
            options.size, options.recipe, layers=options.layers, inner=options.inner, device=self.device,
            recompute=options.recompute,
        )  # fmt: skip
        self.watch.wait()
        self.after_load = self._allocated()
        self.built_s = time.perf_counter() - begin

    def settings(self, shape: Shape) -> dict[str, str]:
        """The training settings of a step."""
        options = self.options
        settings = {
            "steps": STEPS, "learning_rate_schedule": "constant", "warmup_ratio": 0.0, "eval_size": 1,
            "prompts_per_step": shape.prompts, "group_size": shape.group, "max_new_tokens": shape.new,
            "rollout_batch": shape.rows, "micro_batch_tokens": options.micro_batch_tokens,
            "recompute": str(options.recompute).lower(),
        }  # fmt: skip
        return {key: str(value) for key, value in settings.items()} | dict(pair.split("=") for pair in options.set)

    def trainer(self, shape: Shape, between: Callable[[], bool] | None = None) -> Trainer:
        """A trainer whose completions never end early; `between` is asked between rollout and update."""
        recipe = recipe_of(self.options.recipe, self.settings(shape))
        task = Task(self.options.prompt_tokens)
        trainer = Trainer(
            self.model, words(), recipe, task, [reward], PromptFormat(), "text", lambda row: None,
            stop=between, rehearsal=self.rehearsal,
        )  # fmt: skip
        trainer.end_ids = NO_END
        self.rehearsal = trainer.rehearsal  # later trainers would start one of their own, and be timed beside it
        return trainer

    def warm_up(self, trainer: Trainer, shape: Shape) -> dict[str, float]:
        """Compile and capture what the step of a shape needs; seconds of the rollout and of the update."""
        prompts = [self.prompt(trainer, position) for position in range(shape.prompts)]
        engine: Any = trainer.engine
        times: dict[str, float] = {}
        with self._timed(times, "rollout"), torch.inference_mode():
            engine._memory(Workload(tuple(map(len, prompts)), shape.group, shape.new, engine.shape.page_tokens))
            tokens, temperature = min(WARM_TOKENS, shape.new), trainer.config.temperature
            short = Sampling(tokens, NO_END, trainer.pad_id, temperature, seed=(0, "warm-up"))
            engine.generate(prompts, shape.group, short)
        fit = max(1, self.options.micro_batch_tokens // (len(prompts[0]) + shape.new))
        few = self.made_up(prompts[0], min(fit, shape.rows), shape.new)
        with self._timed(times, "update"):
            trainer.updater.update(STEP, few)
        if self.rehearsal is not None:
            self.rehearsal.wait()
        return times

    @staticmethod
    def prompt(trainer: Trainer, position: int) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return trainer.prompt.encode(trainer.tokenizer, trainer.task.train_row(0, position)).ids

    def made_up(self, prompt: tuple[int, ...], rows: int, new: int) -> Experience:
        """Random completions of one prompt, with advantages of both signs."""
        ids_NC = torch.randint(0, self.model.config.vocab_size, (rows, new), generator=torch.Generator().manual_seed(1))
        logps = (-1.0,) * new
        rollouts = [Rollout(prompt, tuple(ids), logps, ended=False) for ids in ids_NC.tolist()]
        signs_N = torch.tensor([(-1.0) ** row for row in range(rows)])
        return Experience([{}] * rows, rollouts, [""] * rows, signs_N.double(), signs_N, rows, 0, rows * new,
                          rows * len(prompt), {})  # fmt: skip

    def step(self, shape: Shape) -> dict[str, Any]:
        """Warm up, take the step, and return its row."""
        peaks: dict[str, int] = {}

        def between() -> bool:
            self.watch.wait()
            peaks["rollout"] = self._peak()
            self._reset_peak()
            return False

        held = self._allocated()  # grows from shape to shape if something of an earlier one was not given back
        trainer = self.trainer(shape, between)
        engine: Any = trainer.engine
        warm = self.warm_up(trainer, shape)
        self._reset_peak()
        self.watch.wait()
        compiled = _compiled()
        begin = time.perf_counter()
        with PhaseHooks(self.model, trainer.optimizer, self.watch) as hooks:
            metrics = trainer.step(STEP)
            self.watch.wait()
        total = time.perf_counter() - begin
        peaks["update"] = self._peak()
        compiled = _compiled() - compiled
        self._check(metrics, shape)
        load = Load(shape.prompts, shape.rows, self.options.prompt_tokens, shape.new)
        weight_bytes = step_bytes(self.model, 0)
        row = {
            **self.about("grpo", shape), "warm_up_s": warm, "total_s": total,
            "rollout_s": metrics["time/rollout"], "update_s": metrics["time/update"],
            "tokens_per_s": shape.rows * shape.new / metrics["time/rollout"],
            "peak_bytes": {"after_load": self.after_load, **peaks},
            "phases_s": phases_of(hooks, metrics["rollout/time"], total),
            "floors_s": floors(self.model, trainer.optimizer, load, self.ceilings, weight_bytes=weight_bytes),
            "ceilings": self.ceilings, "weight_bytes": weight_bytes, "built_s": self.built_s,
            "held_before": held, "compiled_meanwhile": compiled,
            "graphs": sum(compiler.graphs for compiler in self.model.qerl.compilers), "metrics": metrics,
        }  # fmt: skip
        if self.options.logprobs:
            row["logprob_s"] = self.logprob_s(trainer, shape)
        engine.release()
        return row

    def logprob_s(self, trainer: Trainer, shape: Shape) -> float:
        """Seconds of log-probabilities of a step's tokens without gradients; the second of two passes."""
        prompt = self.prompt(trainer, 0)
        experience = self.made_up(prompt, shape.rows, shape.new)
        batches = list(
            micro_batches(
                experience.rollouts, experience.advantages_N, max_tokens=self.options.micro_batch_tokens,
                pad_id=trainer.pad_id, device=torch.device(self.device),
            )
        )  # fmt: skip
        with torch.no_grad():
            token_logps(self.model, batches[0], 1.0)
            self.watch.wait()
            begin = time.perf_counter()
            for batch in batches:
                token_logps(self.model, batch, 1.0)
            self.watch.wait()
        return time.perf_counter() - begin

    def update_only(self, shape: Shape, micro_batch_tokens: int, recompute: bool) -> dict[str, Any]:
        """The update alone with other settings, on made-up completions; nothing of a rollout is in its memory."""
        self.options = argparse.Namespace(
            **{**vars(self.options), "micro_batch_tokens": micro_batch_tokens, "recompute": recompute}
        )
        if recompute:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        trainer = self.trainer(shape)
        prompt = self.prompt(trainer, 0)
        times: dict[str, float] = {}
        fit = max(1, micro_batch_tokens // (len(prompt) + shape.new))
        with self._timed(times, "update"):
            trainer.updater.update(STEP, self.made_up(prompt, min(fit, shape.rows), shape.new))
        everything = self.made_up(prompt, shape.rows, shape.new)
        self._reset_peak()
        compiled = _compiled()
        with self._timed(times, "measured"):
            trainer.updater.update(STEP, everything)
        return {
            **self.about("update", shape), "warm_up_s": {"update": times["update"]}, "update_s": times["measured"],
            "peak_bytes": {"after_load": self.after_load, "update": self._peak()},
            "compiled_meanwhile": _compiled() - compiled,
        }  # fmt: skip

    def about(self, part: str, shape: Shape) -> dict[str, Any]:
        """What every row says of itself."""
        options = self.options
        return {
            "part": part, "size": options.size, "recipe": options.recipe, "layers": self.model.config.num_hidden_layers,
            "prompts": shape.prompts, "rows": shape.rows, "prompt_tokens": options.prompt_tokens, "new": shape.new,
            "micro_batch_tokens": options.micro_batch_tokens, "recompute": options.recompute, "inner": options.inner,
            "settings": self.settings(shape), **provenance(options),
        }  # fmt: skip

    def _check(self, metrics: dict[str, Any], shape: Shape) -> None:
        wanted = {
            "completions/min_length": shape.new,
            "rollout/prefill_tokens": shape.prompts * self.options.prompt_tokens,
            "update/bad_steps": 0,
        }
        wrong = {name: metrics.get(name) for name, value in wanted.items() if metrics.get(name) != value}
        if wrong or not metrics["noise/sigma"]:
            raise RuntimeError(f"the step is not the one asked for: {wrong}, noise {metrics.get('noise/sigma')}")

    @contextmanager
    def _timed(self, times: dict[str, float], name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.watch.wait()
        times[name] = time.perf_counter() - begin

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.watch.on_cuda else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.watch.on_cuda else 0

    def _reset_peak(self) -> None:
        if self.watch.on_cuda:
            torch.cuda.reset_peak_memory_stats()


def recipe_of(name: str, settings: dict[str, str]) -> Recipe:
    """A recipe of random_models.py with these training settings."""
    return Recipe.named(RECIPES[name]).with_overrides(f"train.{key}={value}" for key, value in settings.items())


def _compiled() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def describe(row: dict[str, Any]) -> str:
    """A row in one line."""
    peaks = ", ".join(f"{name} {size / GB:.1f} GB" for name, size in row["peak_bytes"].items())
    what = f"{row['size']} {row['recipe']} {row['rows']} x {row['new']}"
    if row["compiled_meanwhile"]:
        what += f" (NOT WARM: {row['compiled_meanwhile']} graphs were compiled meanwhile)"
    if row["part"] == "update":
        setting = f"{row['micro_batch_tokens']} tokens, recompute {row['recompute']}"
        return f"{what} update alone, {setting}: {row['update_s']:.2f} s; {peaks}"
    logprob = f"log-prob {row['logprob_s']:.2f}, " if "logprob_s" in row else ""
    warm = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["warm_up_s"].items())
    return (
        f"{what}: rollout {row['rollout_s']:.2f} s, {logprob}update {row['update_s']:.2f}, total {row['total_s']:.2f}; "
        f"{row['tokens_per_s']:.0f} tok/s; {peaks}; warm-up {warm}"
    )


def describe_phases(row: dict[str, Any]) -> str:
    """Seconds and floor of each phase."""
    lines = [
        f"  {name:11} {row['phases_s'][name]:8.3f} s {row['phases_s'][name] / row['total_s']:6.1%}  floor "
        f"{row['floors_s'][name]:7.3f} s"
        for name in row["phases_s"]
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Measure every shape, then the updates with other settings on the last one."""
    shapes = [Shape.read(text) for text in options.shapes.split(",")]
    begin = time.perf_counter()
    bench = Bench(options)
    print(f"# model {bench.built_s:.1f} s, {bench.after_load / GB:.2f} GB, {bench.ceilings}", flush=True)
    for shape in shapes:
        row = bench.step(shape)
        append(options.json, row)
        print(describe(row), describe_phases(row), f"# {time.perf_counter() - begin:.0f} s", sep="\n", flush=True)
        _give_back()
    for tokens, recompute in options.also:
        row = bench.update_only(shapes[-1], tokens, recompute)
        append(options.json, row)
        print(describe(row), f"# {time.perf_counter() - begin:.0f} s", sep="\n", flush=True)
        _give_back()


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
