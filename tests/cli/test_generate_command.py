from tests.cli.conftest import next_command, refusal, succeed


def answers(text):
    """What the assistant said, turn by turn; a random model may say line breaks."""
    turns = text.split("assistant ")[1:]
    return [turn.split("     user ")[0] for turn in turns]


def generate(model, *words, prompts=("1 + 1 = ?",)):
    return succeed("generate", model, *prompts, "--max-new-tokens", 4, *words)


def test_a_run_speaks_with_its_adapter_and_its_system_message(run, packed, world):
    as_trained, base = generate(run.path), generate(packed.path, "--system", "Add.")
    assert answers(as_trained)[0] != answers(base)[0]
    assert f"tokens from {world}/base with {run.path}/adapter; nothing was written" in as_trained
    assert next_command(as_trained)[1:3] == ["export", str(run.path)]
    assert next_command(base)[1:3] == ["train", str(packed.path)]
    assert generate(run.path, "--system", "Add.") == as_trained


def test_samples_repeat_text_is_shown_as_it_is_and_a_dense_model_is_told_how_to_be_packed(world):
    options = ("--temperature", 1, "--assistant-prefix", "{2} =", "--seed", 3)
    text, again = (generate(world / "base", *options, prompts=["[red]x[/red]", "[b", "[b"]) for _ in range(2))
    assert text == again
    first, second, third = answers(text)
    assert first.startswith("{2} =")
    assert second != third.partition("\n")[0]
    assert "     user [red]x[/red]\n" in text
    assert "     user [b\n" in text
    assert next_command(text) == ["qerl-compile", "transform", f"{world}/base", "-o", f"{world}/base-nvfp4"]


def test_what_is_no_model_is_refused(tmp_path):
    assert "expected an existing model directory, or a hub id" in refusal("generate", tmp_path / "no", "hello")
    assert "config.json" in refusal("generate", tmp_path, "hello")
