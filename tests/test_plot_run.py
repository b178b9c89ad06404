"""plot_run.py: which runs RUN names, their parents, and where they are drawn."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from drive import ROOT, command, train
from script import NOTHING_OF_TRAINING, Said, call, copied, script, train_family
from test_progress import on_a_terminal

from milepost.plots import terminal
from milepost.plots.curves import smoothed, with_parents
from milepost.plots.picture import legend_of
from milepost.plots.terminal import draw_terminal

plot = script("plot_run")

# ---------------------------------------------------------------------------------------------------------------------
# Which runs, and the table of them.


def written(
    folder: Path, name: str, *, losses: list[float], since: float = 1000.0, before: int = 0, parent: object = None
) -> Path:
    """A run of so many lines, a step and a second each, after the steps `before` it, and a validation at its end."""
    place = folder / "runs" / name
    place.mkdir(parents=True)
    rows = [
        {"step": before + n, "time": since + n, "split": "train", "loss": loss, "lr": 0.1, "tok_s": 500.0}
        for n, loss in enumerate(losses, 1)
    ]
    rows.append(rows[-1] | {"split": "validation", "loss": losses[-1] + 0.5, "lr": None, "tok_s": None})
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "run.json").write_text(json.dumps({"run_id": name, "parent": parent}))
    return place


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three runs; by name the last is a2, by time b1."""
    written(tmp_path, "a1", losses=[3.0, 2.0, 1.0])
    written(tmp_path, "a2", losses=[3.0, 2.5])
    written(tmp_path, "b1", losses=[3.0, 2.75, 2.5, 2.25], since=2000.0)
    return tmp_path


def drawn(folder: Path, **changes: str) -> Said:
    return call(plot, folder, **changes)


def names_in(said: Said) -> list[str]:
    """The runs of the table at the end."""
    assert said.code == 0, said.err
    table = said.out.rstrip().split("\n\n")[-1].splitlines()[1:]
    return [row.split()[1] for row in table]


@pytest.mark.parametrize(
    ("requested", "names"),
    [
        (None, ["b1"]),
        ("latest", ["b1"]),
        ("a1", ["a1"]),
        ("a", ["a1", "a2"]),
        ("*1", ["a1", "b1"]),
        ("[ab]1", ["a1", "b1"]),
        ("LATEST, a1", ["a1", "b1"]),
        ("a2,a", ["a1", "a2"]),
        ("{folder}/runs/a2/,latest", ["a2", "b1"]),
    ],
)
def test_every_form_of_run(requested, names, folder):
    assert sorted(names_in(drawn(folder, RUN=requested and requested.format(folder=folder)))) == names


def test_a_folder_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names_in(drawn(folder, RUN="b1,~/runs/a1")) == ["a1", "b1"]


@pytest.mark.parametrize("by", ["{runs}/small, then large", "small, then large"])
def test_a_folder_with_a_comma_in_its_name(by, folder):
    written(folder, "small, then large", losses=[3.0, 2.0])
    assert drawn(folder, RUN=by.format(runs=folder / "runs")).out.count("then large") >= 1


def test_latest_is_the_run_that_wrote_last_whatever_the_file_times(folder):
    os.utime(folder / "runs" / "a1" / "metrics.jsonl", (2e9, 2e9))
    with open(folder / "runs" / "b1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "time": 1')  # torn by a kill
    assert names_in(drawn(folder)) == ["b1"]
    written(folder, "c", losses=[1.0] * 200, since=1900.0)
    assert names_in(drawn(folder)) == ["c"]


def test_latest_is_found_behind_long_lines_and_what_a_crash_left(folder):
    place = written(folder, "long", losses=[1.0], since=5000.0)
    line = {"step": 2, "time": 5002.0, "split": "train", "loss": 1.0} | {f"metric_{n}": 0.123456 for n in range(1000)}
    with open(place / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n" + "\0" * 10_000)  # a file system may fill the end of a file that it lost
    assert names_in(drawn(folder)) == ["long"]


def test_two_folders_of_one_name_are_refused_and_two_paths_of_one_are_one_run(folder):
    other = written(folder / "other machine", "b1", losses=[3.0, 1.0])
    said = drawn(folder, RUN=f"b1,{other}")
    both = f"{folder / 'runs' / 'b1'} and {other} have the same name"
    assert (said.code, said.out) == (2, "")
    assert f"{both}: rename one, or plot them one after the other" in said.err
    (folder / "link").symlink_to(folder / "runs")
    assert names_in(drawn(folder, RUN=f"b1,{folder / 'link' / 'b1'}")) == ["b1"]


def test_the_table_shows_the_values_of_the_lines(folder):
    *_, head, row = drawn(folder, RUN="a1").out.rstrip().splitlines()
    assert head.split() == ["run", "step", "train", "val", "best", "tokens/s"]
    assert row.split() == ["*", "a1", "3", "1.0000", "1.5000", "1.5000", "500"]


def test_several_runs_share_charts_and_have_letters_without_color(folder):
    out = drawn(folder, RUN="a1,b1").out
    assert "\x1b" not in out
    loss = out.split("\n\n")[0].splitlines()
    assert loss[0] == "loss (nats per token), validation as A"
    assert "".join(loss[1:]).count("a") > 5
    assert "".join(loss[1:]).count("A") == "".join(loss[1:]).count("B") == 1
    assert [line.split()[0] for line in loss[1:-1] if "┤" in line] == ["3", "2", "1"]
    assert [row.split()[:2] for row in out.rstrip().split("\n\n")[-1].splitlines()[1:]] == [["a", "a1"], ["b", "b1"]]


REFUSED = [
    ("x", "RUN=x: no run in {runs} matches; it holds b1, a1, a2"),
    ("a1,?", "RUN=?: no run in {runs} matches"),
    ("../checkpoints", "RUN=../checkpoints: no run in {runs}"),
    (",", "RUN=,: expected latest, "),
    (" , ,", "expected latest, "),
    ("a" * 5000, "no run in {runs} matches"),
    ("\x1b[2J", "no run in {runs} matches"),
]


@pytest.mark.parametrize(("requested", "sentence"), REFUSED)
def test_an_unknown_run_is_refused_with_the_known_ones(requested, sentence, folder):
    said = drawn(folder, RUN=requested)
    assert (said.code, said.out) == (2, "")
    assert sentence.format(runs=folder / "runs") in said.err
    assert said.err.count("\n") == 1
    assert "\x1b" not in said.err


def test_no_runs_at_all(tmp_path):
    said = drawn(tmp_path)
    assert said.code == 2
    assert said.err.startswith(f"error: RUNS_DIR={tmp_path / 'runs'}: no such folder")
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    assert "it holds no runs" in drawn(tmp_path).err
    (tmp_path / "runs" / "empty" / "metrics.jsonl").write_text("")
    said = drawn(tmp_path)
    assert said.code == 4
    assert "metrics.jsonl is empty" in said.err


NONSENSE = [
    "",
    "null",
    "[]",
    "{",
    '{"step": "x", "time": 1}',
    '{"step": 1, "time": null, "loss": 3}',
    '{"step": 2, "time": 5, "split": "train", "loss": "low"}',
    '{"step": 3, "time": 6, "split": "train", "loss": NaN, "lr": true}',
    '{"step": -4, "time": 6, "split": ["train"]}',
    "\ufffd\x00",
]


def test_nonsense_in_the_files_of_a_run_is_left_out(folder):
    place = folder / "runs" / "a1"
    whole = drawn(folder, RUN="a1").out
    with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n".join(NONSENSE))
    assert drawn(folder, RUN="a1").out == whole
    for text in (
        "",
        "[]",
        '{"parent": 3}',
        '{"parent": {"run_id": 3}}',
        '{"parent": {"run_id": "../../etc", "step": 1}}',
    ):
        (place / "run.json").write_text(text)
        assert names_in(drawn(folder, RUN="a1")) == ["a1"]


DEEP = "[" * 3000 + "]" * 3000


def test_deeply_nested_lines_are_left_out(folder):
    place = folder / "runs" / "b1"
    whole = drawn(folder, RUN="b1").out
    with open(place / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{DEEP}\n{{"loss": {DEEP}, "step": 9, "time": 9999}}\n[{DEEP}')
    (place / "run.json").write_text(f'{{"parent": {DEEP}}}')
    assert drawn(folder, RUN="b1").out == whole
    assert names_in(drawn(folder, RUN="*")) == ["a1", "a2", "b1"]


def not_a_file(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "link to itself"])
def test_metrics_that_are_no_file_hide_no_other_run(kind, folder):
    """In a process with a limit: reading a pipe would wait for ever, and reading the device would fill the memory."""
    not_a_file(folder / "runs" / "a1" / "metrics.jsonl", kind)
    changes = {"RUNS_DIR": str(folder / "runs")}
    for requested, names in (("latest", ["b1"]), ("*", ["a2", "b1"])):
        done = command("scripts/plot_run.py", folder, RUN=requested, **changes)
        assert done.returncode == 0, done.stderr
        assert [row.split()[1] for row in done.stdout.rstrip().split("\n\n")[-1].splitlines()[1:]] == names
    done = command("scripts/plot_run.py", folder, RUN="a1", **changes)
    assert done.returncode == 4
    assert "a1/metrics.jsonl" in done.stderr


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "link to itself"])
def test_a_parent_in_what_is_no_file_is_unknown(kind, folder):
    not_a_file(folder / "runs" / "b1" / "run.json", kind)
    done = command("scripts/plot_run.py", folder, RUNS_DIR=str(folder / "runs"))
    assert done.returncode == 0, done.stderr
    *_, head, row = done.stdout.rstrip().splitlines()
    assert "resumed from" not in head
    assert row.split() == ["*", "b1", "4", "2.2500", "2.7500", "2.7500", "500"]


HUGE = ["1e301", "-1.7e308", "1" + "0" * 400, "-1" + "0" * 400, "1e999", "NaN"]


@pytest.mark.parametrize("value", HUGE)
def test_numbers_that_would_overflow_are_left_out(value, folder):
    whole = drawn(folder, RUN="a1").out
    with open(folder / "runs" / "a1" / "metrics.jsonl", "a") as file:
        for split in ("train", "validation"):
            file.write(
                f'{{"step": 2, "time": 1, "split": "{split}", "loss": {value}, "lr": {value}, "tok_s": {value}}}\n'
            )
        file.write(f'{{"step": {value}, "time": 1, "split": "train", "loss": 1}}\n')
        file.write(f'{{"step": 2, "time": {value}}}\n')
    assert drawn(folder, RUN="a1").out == whole
    assert drawn(folder).code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Parents.


def test_a_parent_is_drawn_up_to_the_step_of_its_child(folder):
    written(folder, "child", losses=[1.5], since=3000.0, before=2, parent={"run_id": "a1", "step": 2, "file": "x.pt"})
    written(
        folder,
        "grandchild",
        losses=[1.25],
        since=4000.0,
        before=3,
        parent={"run_id": "child", "step": 3, "file": "y.pt"},
    )
    said = drawn(folder, RUN="grandchild")
    assert names_in(said) == ["a1", "child", "grandchild"]
    rows = said.out.rstrip().split("\n\n")[-1].splitlines()[1:]
    assert rows[0].split()[:4] == ["a", "a1", "2", "2.0000"]  # not its step 3
    assert rows[2].endswith("  child at step 3")
    assert names_in(drawn(folder, RUN="grandchild,a1")) == ["child", "a1", "grandchild"]
    whole = drawn(folder, RUN="grandchild,a1").out.rstrip().split("\n\n")[-1].splitlines()[2]
    assert whole.split()[:4] == ["b", "a1", "3", "1.0000"]  # requested, so it is whole


def test_a_missing_parent_is_logged_and_a_cycle_ends(folder):
    written(folder, "orphan", losses=[1.5], before=2, parent={"run_id": "lost", "step": 2})
    said = drawn(folder, RUN="orphan")
    assert names_in(said) == ["orphan"]
    assert said.err == f"orphan resumed from lost, which is missing in {folder / 'runs'}\n"
    written(folder, "x", losses=[1.5], before=5, parent={"run_id": "y", "step": 5})
    written(folder, "y", losses=[1.5], before=5, parent={"run_id": "x", "step": 5})
    assert sorted(names_in(drawn(folder, RUN="x"))) == ["x", "y"]


def test_a_run_started_from_weights_is_drawn_without_the_run_that_trained_them(folder):
    written(folder, "tuned", losses=[1.5, 1.25], since=3000.0, parent={"run_id": "a1", "step": 3, "file": "x.pt"})
    written(folder, "child", losses=[1.0], since=4000.0, before=2, parent={"run_id": "tuned", "step": 2})
    said = drawn(folder, RUN="tuned")
    assert (names_in(said), said.err) == (["tuned"], "")
    assert said.out.rstrip().endswith("  weights from a1 at step 3")
    assert names_in(drawn(folder, RUN="child")) == ["tuned", "child"]
    written(folder, "late", losses=[1.0], since=5000.0, before=2, parent={"run_id": "a1", "step": 3})
    assert names_in(drawn(folder, RUN="late")) == ["late"]  # it trained step 3 itself
    written(folder, "new", losses=[1.0], since=5000.0, before=2, parent={"run_id": None, "step": 0, "file": "gpt2"})
    assert drawn(folder, RUN="new").out.rstrip().endswith("  weights from gpt2 at step 0")
    assert names_in(drawn(folder, RUN="tuned,a1")) == ["a1", "tuned"]  # requested
    told = [legend_of(run) for run in with_parents([folder / "runs" / "child"], pytest.fail)]
    assert told == ["tuned (weights from a1 at step 3)", "child (from tuned at step 2)"]


def test_a_trained_child_is_drawn_after_its_parent(tmp_path, tmp_path_factory):
    origin = train_family(tmp_path_factory.mktemp("family"))
    copied(origin, tmp_path)
    said = drawn(tmp_path, RUNS_DIR=str(origin / "runs"))
    parent, child = names_in(said)
    rows = [row.split() for row in said.out.rstrip().split("\n\n")[-1].splitlines()[1:]]
    assert [row[2] for row in rows] == ["4", "6"]
    assert " ".join(rows[1]).endswith(
        f"{parent} at step 4 BATCH_SIZE=2 LEARNING_RATE=0.0001 TRAINING_STEPS=6 WARMUP_STEPS=0"
    )
    assert child != parent


# ---------------------------------------------------------------------------------------------------------------------
# Terminals, pipes and files.


def outside(folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """The script in a process of its own, its output in a pipe."""
    words = programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1", "RUNS_DIR": str(folder / "runs")} | env
    return programs.run(
        [sys.executable, str(ROOT / "scripts" / "plot_run.py")], env=words, capture_output=True, check=True
    )


def test_a_pipe_gets_no_colours_and_a_poor_encoding_gets_ascii(folder):
    rich = outside(folder, RUN="a1", PYTHONIOENCODING="utf-8").stdout.decode("utf-8")
    assert any(0x2800 < ord(char) < 0x2900 for char in rich)
    assert "\x1b" not in rich
    written(folder, "é", losses=[2.0, 1.0])
    for encoding in ("ascii", "latin-1"):
        poor = outside(folder, RUN="é", PYTHONIOENCODING=encoding, PYTHONUTF8="1").stdout.decode(encoding)
        assert poor.splitlines()[1].startswith("       2 +a")
        assert ("é" in poor) == (encoding == "latin-1")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def colored(folder: Path, monkeypatch, **variables: str) -> str:
    for name in ("NO_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def action(stream: io.TextIOBase) -> None:
        monkeypatch.setattr(sys, "stdout", stream)
        runs = with_parents([folder / "runs" / name for name in ("a1", "b1")], pytest.fail)
        draw_terminal(runs)
        monkeypatch.undo()

    return on_a_terminal(action)


def test_a_terminal_gets_colors_unless_turned_off(folder, monkeypatch):
    text = colored(folder, monkeypatch, TERM="xterm", COLUMNS="100")
    assert "\x1b[36m⠉" in text
    assert "\x1b[33m" in text
    assert text.rstrip().endswith("\x1b[0m")
    for poor in ({"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}):
        plain = colored(folder, monkeypatch, **poor)
        assert "\x1b" not in plain
        assert "3 ┤a" in plain or "3 ┤b" in plain


def test_a_name_cannot_control_the_terminal(folder, monkeypatch):
    written(folder, "a1\x1b[2J", losses=[1.0])
    text = drawn(folder, RUN="a1\x1b[2J").out
    assert "\x1b" not in text


@pytest.mark.parametrize("columns", [1, 40, 80, 110, 500])
def test_no_line_is_wider_than_the_terminal(columns, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    charts = drawn(folder, RUN="a1").out.split("\n\n")[:-1]
    widest = max(len(line) for one in charts for line in one.splitlines())
    assert widest <= max(40, columns)
    assert len(charts) == (2 if columns >= 70 else 3)


@pytest.mark.parametrize(("rows", "most"), [(24, 24), (50, 50), (10, 20)])
def test_a_run_fits_the_window(rows: int, most: int, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", str(rows))
    monkeypatch.setattr(terminal, "stdout_columns", lambda: 80)
    out = drawn(folder, RUN="a1").out
    assert len(out.splitlines()) < most
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("count", [1, 99, 100, 101, 350, 1000])
def test_a_long_curve_is_smoothed_by_the_mean_of_the_values_around_each(count):
    values = [3.0 + (at * 7919 % 101) / 101 for at in range(count)]
    values[count // 3] = 1e20  # one step that went wrong spoils only what is near
    reach = count // 100
    around = [values[max(0, at - reach) : at + reach + 1] for at in range(count)]
    assert smoothed(values) == pytest.approx([sum(window) / len(window) for window in around], rel=1e-12)


def test_overfitting_is_visible(folder):
    """Validation rises while training falls, in the same chart."""
    place = folder / "runs" / "a1" / "metrics.jsonl"
    lines = [{"step": n, "time": n, "split": "train", "loss": 3 - n / 50} for n in range(1, 100)]
    lines += [{"step": n, "time": n, "split": "validation", "loss": 1 + n / 50} for n in (10, 50, 90)]
    place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = drawn(folder, RUN="a1").out.split("\n\n")[0].splitlines()[1:-2]
    rows = {line.index("o"): at for at, line in enumerate(chart) if "o" in line}
    assert len(rows) == 3
    assert [rows[column] for column in sorted(rows)] == sorted(rows.values(), reverse=True)
    first, last = ([at for at, char in enumerate(line) if "⠀" < char < "⣿"] for line in (chart[0], chart[-1]))
    assert max(first) < min(last)


def test_runs_are_told_apart_by_the_settings_that_differ(folder):
    for name, rate in (("a1", "1e-3"), ("b1", "0.01")):
        (folder / "runs" / name / "config.env").write_text(f"LEARNING_RATE={rate}\nDROPOUT=0.1\nSEED=1\n")
    said = drawn(folder, RUN="a1,b1").out.rstrip().splitlines()
    assert [line.split()[-1] for line in said[-2:]] == ["LEARNING_RATE=0.001", "LEARNING_RATE=0.01"]
    assert "DROPOUT" not in "".join(said)
    assert "LEARNING_RATE" not in drawn(folder, RUN="a1").out  # nothing to tell it apart from


def test_without_matplotlib_only_a_file_is_refused(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert drawn(folder).code == 0
    path = folder / "curves.png"
    said = drawn(folder, OUTPUT=str(path))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: OUTPUT={path}: ")
    assert "pip install matplotlib" in said.err


@pytest.mark.parametrize("name", ["curves", "curves.txt", "runs", "nowhere/curves.png", ".png"])
def test_an_impossible_output_is_refused(name, folder):
    said = drawn(folder, OUTPUT=str(folder / name))
    assert (said.code, said.out) == (2, "")
    assert "expected a file name that ends in .html, .png, .svg or .pdf, in an existing folder" in said.err


def test_as_a_user_runs_it(tmp_path):
    assert train(tmp_path)[0] == 0
    done = command("scripts/plot_run.py", tmp_path, **NOTHING_OF_TRAINING)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("loss (nats per token), validation as o\n")
    assert done.stdout.count("└") == 3
    line = '{ "$0" "$1"; echo $? >&3; } 3>"$2/code" | true'
    words = [sys.executable, str(ROOT / "scripts" / "plot_run.py"), str(tmp_path)]
    env = programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1", "RUNS_DIR": str(tmp_path / "runs")}
    piped = subprocess.run(["bash", "-c", line, *words], env=env, capture_output=True, text=True, check=False)
    assert ((tmp_path / "code").read_text().strip(), piped.stderr) == ("0", "")
