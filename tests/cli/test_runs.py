import shutil

import pytest

from qerl_compile.cli.runs import Run, base_name, is_finished, is_run, open_tokenizer, refuse_output, run_directory
from qerl_compile.errors import CheckpointError, ExportError
from qerl_compile.recipe import Recipe

STEP = '{"step": 1, "reward": 0.5}\n'
EVALUATION = '{"step": 0, "eval/accuracy": 0.5}\n'


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("metrics, kept", [(None, False), (EVALUATION, False), (EVALUATION + STEP, True)])
def test_a_failed_run_keeps_its_directory_only_if_a_step_was_done(fault, metrics, kept, tmp_path):
    out = tmp_path / "deep" / "run"
    with pytest.raises(fault), run_directory(out):
        if metrics is not None:
            (out / "metrics.jsonl").write_text(metrics)
        raise fault
    assert out.exists() == kept


def test_a_run_that_ends_well_stays(tmp_path):
    with run_directory(tmp_path / "run"):
        pass
    assert (tmp_path / "run").is_dir()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match="expected a place where a directory can be made"),
        run_directory(tmp_path / "file" / "run"),
    ):
        pass


def test_run_json_round_trip(tmp_path):
    run = Run("base", "sums.jsonl", ["answer"], "final", system="Add.", assistant_prefix="{question} =")
    run.write(tmp_path, Recipe.named("nvfp4-lora"))
    assert Run.read(tmp_path) == run
    assert Recipe.from_file(tmp_path / "recipe.yaml") == Recipe.named("nvfp4-lora")
    assert is_run(tmp_path)
    assert not is_finished(tmp_path)


@pytest.mark.parametrize(
    "text, got",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format_version'"),
        ('{"format_version": 1}', "KeyError: 'model'"),
        ('{"format_version": 2}', "format_version: expected 1; got 2"),
    ],
)
def test_a_damaged_run_json_is_named(text, got, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json") as caught:
        Run.read(tmp_path)
    assert got in str(caught.value)


def test_outputs_that_exist_are_refused_whatever_they_are(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "."):
        with pytest.raises(ExportError, match="got an existing one"):
            refuse_output(tmp_path / name)
    refuse_output(tmp_path / "new")


def test_a_model_without_tokenizer_is_refused(world, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(world / "base" / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected the files of a tokenizer.*Copy tokenizer\.json"):
        open_tokenizer(str(tmp_path))


def test_other_programs_get_the_full_path_of_a_directory(world, monkeypatch):
    monkeypatch.chdir(world)
    assert base_name("base") == str(world / "base")
