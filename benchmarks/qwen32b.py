"""32 billion parameters on one GPU: GRPO steps, training steps against QLoRA, where time goes, seconds to compile.

    python -m benchmarks.qwen32b grpo --size 32B --recipe nvfp4 --json OUT.json     steps of 2, 8 and 64 sequences
    python -m benchmarks.qwen32b profile --size 32B --json OUT.json                 one shape: phases beside floors
    python -m benchmarks.qwen32b qlora --size 7B --json OUT.json                    a training step against bitsandbytes
    python -m benchmarks.qwen32b compile --size 32B --json OUT.json                 cold and warm caches, new processes
    python -m benchmarks.qwen32b warm --sizes 7B,14B --recipes nvfp4,bf16           fill the compilers' caches on disk
    python -m benchmarks.qwen32b predict OUT.json                                   on any machine: predicted, measured
    python -m benchmarks.qwen32b report OUT.json ... > benchmarks/results/qwen32b.md

Qwen2.5's shapes with random weights that are made on the device (random_models.py), rank-32 adapters on all seven
linears, noise on. Each part is a module: qwen32b_grpo.py, qwen32b_phases.py, qwen32b_qlora.py, qwen32b_compile.py.
Rows go to a JSON list one by one, so a time limit costs the row in hand and nothing else.

`--size tiny --inner eager` runs every part end to end on a CPU in seconds, where times mean nothing.
"""

import argparse

import torch

from benchmarks import qwen32b_compile, qwen32b_grpo, qwen32b_predict, qwen32b_qlora, qwen32b_report
from benchmarks.random_models import RECIPES, SHAPES

SHAPES_OF_A_STEP = "8x8:512,1x2:2048,1x8:2048"
MICRO_BATCH_TOKENS = 4608  # two sequences of 256 + 2048 tokens, or six of 256 + 512


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("--size", default="32B", choices=SHAPES)
    one.add_argument("--layers", type=int, default=None, help="fewer than the shape has")
    one.add_argument("--inner", default="inductor")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--commit", default="unknown")
    one.add_argument("--json", default="qwen32b.json", help="rows are added to it")
    step = argparse.ArgumentParser(add_help=False)
    step.add_argument("--recipe", default="nvfp4", choices=RECIPES)
    step.add_argument("--prompt-tokens", type=int, default=256)
    step.add_argument("--micro-batch-tokens", type=int, default=MICRO_BATCH_TOKENS)
    step.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    step.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the training settings")
    grpo = parts.add_parser("grpo", parents=[one, step])
    grpo.add_argument("--shapes", default=SHAPES_OF_A_STEP, metavar="PROMPTSxGROUP:NEW,...")
    grpo.add_argument("--logprobs", action=argparse.BooleanOptionalAction, default=True)
    grpo.add_argument(
        "--also", action="append", default=[], type=qwen32b_grpo.micro_batch_setting, metavar="TOKENS:on|off",
        help="the update of the last shape again, with micro-batches of so many tokens and recompute on or off",
    )  # fmt: skip
    profile = parts.add_parser("profile", parents=[one, step])
    profile.add_argument("--shapes", default="1x8:2048", metavar="PROMPTSxGROUP:NEW,...")
    profile.set_defaults(logprobs=False, also=[])
    qwen32b_qlora.add_arguments(parts.add_parser("qlora", parents=[one]))
    compiling = parts.add_parser("compile", parents=[one, step])
    compiling.add_argument("--shape", default="1x8:64", metavar="PROMPTSxGROUP:NEW")
    compiling.add_argument("--caches", help="a new directory where both caches are kept; by default they are deleted")
    compiling.add_argument("--child", action="store_true", help="be one of the two processes")
    warm = parts.add_parser("warm", parents=[one, step])
    warm.add_argument("--sizes", default="7B,14B,32B")
    warm.add_argument("--recipes", default="nvfp4,bf16")
    warm.add_argument("--shapes", default="8x8:32,1x2:32,1x8:32", metavar="PROMPTSxGROUP:NEW,...")
    for name in ("predict", "report"):
        parts.add_parser(name).add_argument("json", nargs="+")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    {
        "grpo": qwen32b_grpo.run,
        "profile": qwen32b_grpo.run,
        "qlora": qwen32b_qlora.run,
        "compile": qwen32b_compile.run,
        "warm": qwen32b_compile.warm,
        "predict": qwen32b_predict.run,
        "report": qwen32b_report.run,
    }[options.part](options)


if __name__ == "__main__":
    main()
