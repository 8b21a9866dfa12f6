"""The report: one file that holds everything, true to its runs, harmless whatever a model wrote."""

import base64
import html
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from qerl_compile.errors import ExportError, TaskError
from qerl_compile.recipe import Recipe
from qerl_compile.rl.report import distinct_names, read_run, render
from qerl_compile.rl.report.charts import COLOURS, Curve, Style, chart, style
from qerl_compile.rl.report.series import points, smoothed, spread
from qerl_compile.rl.report.text import shortened, visible

SVG = "{http://www.w3.org/2000/svg}"


def make_run(root, name="run", *, seed=0, steps=4, gain=0.1, recipe="qerl-nvfp4-aqn", overrides=(), finished=True):
    """A run directory as `train` leaves it, with easy numbers."""
    run = root / name
    run.mkdir(parents=True)
    rows = [evaluation(0, 0.25)]
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "reward": gain * step,
                "frac_reward_zero_std": 0.5,
                "entropy": 2.0 - gain * step,
                "grad_norm": 1.0,
                "sampling/sampling_logp_difference/mean": 0.04,
                "completions/mean_length": 5.0,
                "rollout/tokens_per_s": 100.0 * step,
                "time/rollout": 1.0,
                "time/update": 2.0,
                "step_time": 30.0 if step == 1 else 3.0,
                "memory/peak_rss_mib": 2048.0 + step,
                "noise/sigma": 0.01,
            }
        )
    rows.append(evaluation(steps, 0.25 + gain))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "1 + 1 =", "completion": " 3", "reward": 0.0}
    samples = [{"step": 0, **sample}, {"step": steps, **sample, "completion": " 2", "reward": 1.0}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (run / "run.json").write_text(json.dumps({"model": "base", "task": "sums.jsonl", "format_version": 1}))
    rules = Recipe.named(recipe).with_overrides([f"train.seed={seed}", f"train.steps={steps}", *overrides])
    (run / "recipe.yaml").write_text(rules.to_yaml())
    if finished:
        (run / "adapter").mkdir()
    return run


def evaluation(step, accuracy):
    ends = {"eval/accuracy_low": accuracy - 0.1, "eval/accuracy_high": accuracy + 0.1}
    return {"step": step, "eval/accuracy": accuracy, **ends}


def page_of(*runs):
    return render([read_run(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)])


class Page(HTMLParser):
    """Tags with attributes, and the text of every cell, list item and <pre>."""

    VOID = ("meta", "img", "path")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            if tag in ("td", "th", "li", "pre", "p", "h3"):
                self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in {"td", "th", "li", "pre", "p", "h3"} & set(self.open):
            self.texts[tag][-1] += data

    def images(self):
        return [attrs for tag, attrs in self.tags if tag == "img"]

    def image(self, title):
        (found,) = [each for each in self.images() if each["alt"].startswith(f"{title}. ")]
        return found


def svg(image):
    return ElementTree.fromstring(base64.b64decode(image["src"].partition("base64,")[2]))  # noqa: S314  # our own


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Two seeds of one recipe and one run of another."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(root, "a", seed=1),
        make_run(root, "b", seed=2, gain=0.2, steps=3),
        make_run(root, "c", recipe="nvfp4-lora"),
    ]
    return runs, page_of(*runs)


def test_the_page_needs_nothing_but_itself(three):
    text = three[1]
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form", "base"} == set()
    for tag, attrs in page.tags:
        assert all(not name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "action"):
            if name in attrs:
                assert (tag, name) == ("img", "src")
                assert attrs[name].startswith("data:image/svg+xml;base64,")
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_image_is_an_svg_without_scripts_and_says_what_it_shows(three):
    images = Page(three[1]).images()
    assert len(images) > 20
    for image in images:
        root = svg(image)
        assert root.tag == f"{SVG}svg"
        assert not [element for element in root.iter() if "script" in element.tag]
        assert "at step" in image["alt"]


def test_every_metric_of_the_runs_has_its_curves(three):
    page = Page(three[1])
    alts = {image["alt"].partition(". ")[0] for image in page.images()}
    expected = {"Reward", "Held-out accuracy", "Entropy", "Noise σ", "Mismatch", "Groups without signal"}
    expected |= {"Gradient norm", "Completion length", "Rollout throughput", "Step time: rollout", "Step time: update"}
    assert expected <= alts
    assert any("No run has recorded" in text and "KL to the reference" in text for text in page.texts["p"])
    single = [image["alt"] for image in page.images() if image["alt"].startswith("Reward. a:")]
    assert single == [
        "Reward. a: 0.1 at step 1 to 0.4 at step 4, lowest 0.1, highest 0.4. "
        "b: 0.2 at step 1 to 0.6 at step 3, lowest 0.2, highest 0.6. "
        "c: 0.1 at step 1 to 0.4 at step 4, lowest 0.1, highest 0.4."
    ]


def test_the_table_of_runs_says_what_was_measured(three):
    cells = Page(three[1]).texts["td"]
    row = cells[: cells.index("base", 3)][:9]
    assert row == [
        *("qerl-nvfp4-aqn", "base", "sums.jsonl", "1", "4 of 4", "25.0 % [15.0, 35.0] → 35.0 % [25.0, 45.0]"),
        *("3.00", "300", "2.0 GiB (process)"),  # medians of steps 2 to 4
    ]


def test_seeds_of_a_recipe_are_averaged_with_their_spread(three):
    page = Page(three[1])
    assert "40.0 % [35.0, 45.0]" in page.texts["td"]
    assert "1, 2" in page.texts["td"]
    grouped = [image["alt"] for image in page.images() if image["alt"].startswith("Reward. qerl-nvfp4-aqn, mean of 2")]
    assert len(grouped) == 1
    assert "0.15 at step 1 to 0.45 at step 3" in grouped[0]  # step 4 is of one run only
    assert any("differ in more than the seed: train.steps is 4 or 3" in text for text in page.texts["p"])


def test_single_runs_need_no_section_of_seeds(tmp_path):
    text = page_of(make_run(tmp_path, "a"), make_run(tmp_path, "b", recipe="nvfp4-lora"))
    assert "Seeds of one recipe" not in text


def test_samples_stand_before_and_after_in_one_row(three):
    page = Page(three[1])
    assert page.texts["pre"][:3] == ["1 + 1 =", " 3", " 2"]
    assert page.texts["td"][-3:] == ["1 + 1 =", " 3reward 0", " 2reward 1"]


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "</pre></td></table><h1>owned",
    "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}",
    "\x00\x1b[31mred\x07",
    "abc\u202egnp.exe\u2066",
    "\ud800 lone",
    "x" * 1_000_000,
    "&lt;b&gt; & \"quotes\" 'single'",
]


@pytest.mark.parametrize("completion", HOSTILE)
def test_hostile_completions_are_shown_and_do_nothing(completion, tmp_path):
    run = make_run(tmp_path)
    sample = {"step": 0, "prompt": completion, "completion": completion, "reward": 0.0}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = page_of(run)
    text.encode("utf-8")
    assert len(text) < 600_000
    page = Page(text)
    prompt, answer = page.texts["pre"]
    assert prompt == answer == visible(shortened(completion))
    assert {tag for tag, _ in page.tags} & {"script", "h1"} == {"h1"}
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)


def test_hostile_names_are_escaped_everywhere(tmp_path):
    name = '<b onclick="x">$\\frac{1}{2}$ & _x'
    run = make_run(tmp_path)
    (run / "run.json").write_text(json.dumps({"model": "<script>m", "task": "<i>t"}))
    text = render([read_run(run, name)], title="<script>title")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert name in page.texts["th"]
    assert {"<script>m", "<i>t"} <= set(page.texts["td"])
    assert page.image("Reward")["alt"].startswith(f"Reward. {name}: 0.1 at step 1")
    assert html.escape("<script>title") in text


def test_text_by_hand():
    assert visible("a\nb\tc d") == "a\nb\tc d"
    assert visible("\x00\x1b\x7f") == "␀␛\\u007f"
    assert visible("\u202e\ud800\u00a0é漢😀") == "\\u202e\\ud800\u00a0é漢😀"
    assert shortened("abcdef", 4) == "abcd … and 2 characters more"
    assert shortened("abcd", 4) == "abcd"


def test_a_run_that_is_going_on_is_reported_up_to_its_last_whole_row(tmp_path):
    run = make_run(tmp_path, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rewa')
    read = read_run(run)
    assert read.steps == 4
    assert read.notes == ("No adapter yet: the run is going on, or was cut off, at step 4 of 4.",)
    assert read.notes[0] in Page(render([read])).texts["li"]


def test_a_run_with_nothing_but_metrics_is_reported_with_notes(tmp_path):
    run = make_run(tmp_path)
    for name in ("run.json", "recipe.yaml", "samples.jsonl"):
        (run / name).unlink()
    read = read_run(run)
    assert len(read.notes) == 3
    assert all(word in "".join(read.notes) for word in ("run.json", "recipe.yaml", "samples.jsonl"))
    page = Page(render([read]))
    assert set(read.notes) <= set(page.texts["li"])
    assert "None were kept." in page.texts["p"]
    assert page.texts["td"][:3] == ["run", "unknown", "unknown"]


@pytest.mark.parametrize("damage", ["", "[]", "{", "\xff", '{"train": {"steps": 0}}', "\x00"])
def test_damaged_side_files_become_notes(damage, tmp_path):
    run = make_run(tmp_path)
    for name in ("run.json", "recipe.yaml"):
        (run / name).write_bytes(damage.encode("latin-1"))
    (run / "samples.jsonl").write_bytes(damage.encode("latin-1") + b'\n{"step": 1}\n')
    read = read_run(run)
    assert any("run.json" in note for note in read.notes)
    assert any("recipe" in note for note in read.notes)
    assert any("samples.jsonl" in note for note in read.notes)
    Page(render([read]))


def test_metrics_that_are_missing_empty_or_damaged_are_an_error_that_names_the_file(tmp_path):
    with pytest.raises(TaskError, match=r"no/metrics\.jsonl: expected the metrics of a training run; got no such dir"):
        read_run(tmp_path / "no")
    run = make_run(tmp_path)
    file = run / "metrics.jsonl"
    good = file.read_text()
    file.write_text("garbage\n" + good)
    with pytest.raises(TaskError, match=r"metrics\.jsonl, line 1: expected a JSON object; got b'garbage'"):
        read_run(run)
    file.write_text('{"step": 0, "torn')
    with pytest.raises(TaskError, match=r"metrics\.jsonl: expected at least one complete row; got none"):
        read_run(run)
    file.unlink()
    with pytest.raises(TaskError, match=r"metrics\.jsonl: .*got no such file"):
        read_run(run)


def test_values_that_are_no_numbers_leave_gaps_and_rows_without_a_step_are_told(tmp_path):
    run = make_run(tmp_path)
    rows = [
        {"step": 5, "reward": None, "entropy": "high", "grad_norm": True},
        {"step": 6, "reward": 0.6, "grad_norm": 10**400},
        {"step": "seven", "reward": 1.0},
        {"step": -1, "reward": 1.0},
        {"step": 7, "diagnosis": "all_truncated: Raise it."},
        {"step": 8, "update/fault": "NaN in the loss"},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    read = read_run(run)
    assert list(read.points("reward")) == [1, 2, 3, 4, 6]
    assert list(read.points("entropy")) == list(read.points("grad_norm")) == [1, 2, 3, 4]
    assert read.notes == (
        "2 of 12 rows of metrics.jsonl have no usable step and are left out.",
        "Step 7: all_truncated: Raise it.",
        "Step 8 changed nothing: NaN in the loss",
    )
    Page(render([read]))


def test_the_later_row_of_a_step_holds_also_when_it_is_a_gap():
    rows = [{"step": 2, "a": 1}, {"step": 1, "a": 2.0}, {"step": 2, "a": 3}, {"step": 1, "b": 5}]
    assert points(rows, "a") == {1: 2.0, 2: 3.0}
    assert points([*rows, {"step": 2, "a": None}], "a") == {1: 2.0}


def test_moving_means_and_spreads_by_hand():
    curve = {step: float(step) for step in range(1, 41)}  # 40 points: a width of 2
    assert smoothed(curve) == {1: 1.0} | {step: step - 0.5 for step in range(2, 41)}
    over = spread([{1: 1.0, 2: 5.0, 3: 0.0}, {1: 3.0, 2: 3.0}])
    assert (over.mean, over.low, over.high) == ({1: 2.0, 2: 4.0}, {1: 1.0, 2: 3.0}, {1: 3.0, 2: 5.0})


def test_bands_and_dashes_are_drawn():
    line, low, high = {1: 0.2, 2: 0.4}, {1: 0.1, 2: 0.3}, {1: 0.3, 2: 0.5}

    def styles(curve):
        root = svg({"src": chart([curve], "u")["uri"]})
        return [e.get("style") for e in root.iter() if "#0072b2" in e.get("style", "")]

    (plain,) = styles(Curve("a", line, Style("#0072B2")))
    assert "stroke-dasharray" not in plain
    band, dashed = styles(Curve("a", line, Style("#0072B2", "6 2"), low, high))
    assert "fill: #0072b2; fill-opacity: 0.15" in band
    assert "stroke-dasharray" in dashed


def test_the_same_curves_give_the_same_bytes():
    curves = [Curve("a", {1: 0.2, 2: 0.4}, style(0), {1: 0.1, 2: 0.2}, {1: 0.3, 2: 0.6}, marks=True)]
    assert chart(curves, "u") == chart(curves, "u")


def test_colours_stand_out_from_white_and_styles_differ():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour  # WCAG 2.2, 1.4.11 asks for 3 of what carries meaning
    looks = [style(group, member) for group in range(5) for member in range(4)]
    assert len(set(looks)) == 20
    assert style(5) != style(0)


def test_sampled_accuracies_get_charts_of_their_own(tmp_path):
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "eval/pass@8": 0.7, "eval/pass@8_low": 0.6, "eval/pass@8_high": 0.8}) + "\n")
    assert Page(page_of(run)).image("Held-out pass@8")["alt"].endswith("run: 0.7 at step 4.")


def test_names_take_as_many_parents_as_they_need(tmp_path):
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert distinct_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    with pytest.raises(TaskError, match="one directory twice"):
        distinct_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExportError, match=r"the package matplotlib.*qerl-compile\[report\]"):
        page_of(make_run(tmp_path))
