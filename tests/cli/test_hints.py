import pytest

from qerl_compile.cli.hints import beside, export_command, serve_command, train_command, transform_command

TASK = "--task rg:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1 --assistant-prefix '{expression} ='"


@pytest.mark.parametrize(
    "got, want",
    [
        (transform_command("smollm2"), "qerl-compile transform smollm2 -o smollm2-nvfp4"),
        (
            transform_command("Qwen/Qwen3-4B", "nvfp4-lora", ["lora=[]"]),
            "qerl-compile transform Qwen/Qwen3-4B --recipe nvfp4-lora --set 'lora=[]' -o Qwen3-4B-nvfp4",
        ),
        (train_command("smollm2"), f"qerl-compile train smollm2 --set train.eval_size=64 {TASK} -o smollm2-run"),
        (
            train_command("m", "r.yaml", ["train.eval_size=9"]),
            f"qerl-compile train m --recipe r.yaml --set train.eval_size=9 {TASK} -o m-run",
        ),
        (export_command("runs/a", packed=True), "qerl-compile export runs/a --target vllm -o a-vllm"),
        (export_command("a b", packed=False), "qerl-compile export 'a b' --target peft -o 'a b-peft'"),
        (serve_command("vllm", "out"), "vllm serve out"),
        (
            serve_command("vllm", "out", "run/adapter", 32),
            "vllm serve out --enable-lora --max-lora-rank 32 --lora-modules trained=run/adapter",
        ),
        (
            serve_command("peft", "Qwen/Qwen3-4B", "out", 33),
            "vllm serve Qwen/Qwen3-4B --enable-lora --max-lora-rank 64 --lora-modules trained=out",
        ),
        (serve_command("sglang", "out"), "python -m sglang.launch_server --model-path out"),
        (
            serve_command("sglang", "out", "run/adapter", 32),
            "python -m sglang.launch_server --model-path out --lora-paths trained=run/adapter",
        ),
    ],
)
def test_next_commands(got, want):
    assert got == want


def test_outputs_go_beside_a_directory_and_here_for_a_hub_id(tmp_path):
    assert beside(tmp_path, "run") == f"{tmp_path}-run"
    assert beside(f"{tmp_path}/", "run") == f"{tmp_path}-run"
    assert beside("org/model", "run") == "model-run"
    assert beside(".", "run") == "model-run"
