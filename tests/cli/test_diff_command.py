from tests.cli.conftest import next_command, refusal, succeed


def headings(text):
    return [line for line in text.splitlines() if line.split()[0] in ("noise", "lora", "fuse", "quantize", "recompute")]


def test_diff_shows_every_pass_and_names_the_next_command(world):
    text = succeed("diff", world / "base", "--set", "train.recompute=true")
    assert [line.split()[0] for line in headings(text)] == ["noise", "lora", "fuse", "quantize", "recompute"]
    assert "quantized_linear" in text
    recipe = ["--recipe", "qerl-nvfp4-aqn", "--set", "train.recompute=true"]
    assert next_command(text)[1:] == ["transform", f"{world}/base", *recipe, "-o", f"{world}/base-nvfp4"]


def test_one_pass_can_be_shown_alone(world):
    text = succeed("diff", world / "base", "--pass", "noise")
    assert [line.split()[0] for line in headings(text)] == ["noise"]
    assert "quantized_linear" not in text


def test_a_recipe_without_packing_leads_to_training(world):
    assert next_command(succeed("diff", world / "base", "--recipe", "bf16-lora"))[1] == "train"


def test_what_is_not_there_is_refused(world):
    assert "Add --set train.recompute=true" in refusal("diff", world / "base", "--pass", "recompute")
    line = refusal("diff", world / "base", "--pass", "quantise")
    assert "--pass: expected one of noise, lora, fuse, quantize; got 'quantise'" in line
    assert "layer 5: expected an index below 1; got 5" in refusal("diff", world / "base", "--layer", 5)
