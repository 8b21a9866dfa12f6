import sys

from tests.cli.conftest import next_command, refusal, succeed
from tests.rl.test_report import Page, make_run


def test_runs_become_one_page_and_the_next_command_measures_the_last_finished_one(tmp_path):
    runs = [make_run(tmp_path, "a"), make_run(tmp_path, "b", recipe="nvfp4-lora", finished=False)]
    out = tmp_path / "page.html"
    text = succeed("report", *runs, "-o", out, "--title", "Two <runs>")
    assert "note  b: No adapter yet" in text
    assert f"wrote {out}  2 runs, " in text
    assert next_command(text) == ["qerl-compile", "eval", str(runs[0]), "--samples", "8"]
    page = Page(out.read_text(encoding="utf-8"))
    assert {"a", "b"} <= set(page.texts["th"])
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_run_as_train_wrote_it_is_reported_without_notes(run, tmp_path):
    text = succeed("report", run.path, "-o", tmp_path / "page.html")
    assert "note" not in text
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "2 of 2" in page.texts["td"]
    titles = {image["alt"].partition(". ")[0] for image in page.images()}
    assert {"Reward", "Held-out accuracy", "Entropy", "Mismatch", "Step time: rollout"} <= titles


def test_a_report_is_replaced_and_any_other_file_is_not(tmp_path):
    run, out = make_run(tmp_path, "a"), tmp_path / "page.html"
    succeed("report", run, "-o", out)
    first = out.read_bytes()
    succeed("report", run, "-o", out, "--title", "Second")
    assert out.read_bytes() != first
    for other in (tmp_path / "notes.html", tmp_path / "dir"):
        other.mkdir() if other.name == "dir" else other.write_text("<p>mine</p>")
        assert "got an existing one" in refusal("report", run, "-o", other)
    assert (tmp_path / "notes.html").read_text() == "<p>mine</p>"
    (tmp_path / "link.html").symlink_to(out)
    assert "got an existing one" in refusal("report", run, "-o", tmp_path / "link.html")
    assert "no directory" in refusal("report", run, "-o", tmp_path / "no" / "page.html")


def test_what_is_no_run_or_named_twice_is_refused_and_nothing_is_written(tmp_path):
    run, out = make_run(tmp_path, "a"), tmp_path / "page.html"
    assert f"{tmp_path}/no/metrics.jsonl" in refusal("report", tmp_path / "no", "-o", out)
    assert "one directory twice" in refusal("report", run, run, "-o", out)
    (run / "metrics.jsonl").write_text("broken\n{}\n")
    assert "metrics.jsonl, line 1" in refusal("report", run, "-o", out)
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refusal("report", tmp_path / "no", "-o", tmp_path / "page.html")
    assert "Run pip install 'qerl-compile[report]'." in line
