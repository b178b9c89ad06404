"""The data of the page: metrics read as they grow, series of bounded size, what became of a run, and one HTML file."""

import base64
import hashlib
import json
import math
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from drive import command, train
from page_runs import BASE, CHILD, CUT, FAST, XSS, family, line, save, write_run
from script import NOTHING_OF_TRAINING, call, script

from milepost.locks import hold_run
from milepost.page import columns, html, series
from milepost.page import library as page_library
from milepost.page.columns import Followed, as_columns
from milepost.page.library import Library, id_of
from milepost.page.series import curves

plot = script("plot_run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs; read only."""
    return family(tmp_path_factory.mktemp("page"))


def library_of(folder: Path) -> Library:
    """The library of a folder, which looks at the disk each time."""
    library = Library(folder / "runs", folder / "checkpoints")
    looked(library)
    return library


def test_a_look_without_time_reads_one_run_and_leaves_the_others_to_the_next(runs: Path, monkeypatch) -> None:
    """However long finding the runs and checkpoints takes, each look must bring one nearer to the end."""
    monkeypatch.setattr(page_library, "BUDGET", -1.0)
    library = Library(runs / "runs", runs / "checkpoints")
    left, steps = [], []
    for _ in range(4):
        library.look()
        left.append(library.unread)
        steps.append(sorted(run["step"] or 0 for run in library.summaries()["runs"]))
    assert left == [3, 2, 1, 0]
    assert steps == [[0, 0, 0, 300], [0, 0, 300, 900], [0, 300, 600, 900], [300, 600, 600, 900]]


def looked(library: Library) -> dict[str, dict[str, object]]:
    """The figures of all runs by name, after a look."""
    library._due, library.unread = 0, 1
    while library.unread:  # on a slow machine, a look may leave runs to the next
        library.look()
    return {run["name"]: run for run in library.summaries()["runs"]}


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def steps(file: Followed) -> list[float]:
    return list(file.splits["train"].fields["step"]) if file.splits else []


def test_only_what_was_added_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, "a", range(1, 50)) / "metrics.jsonl"
    read: list[int] = []
    plain = columns.parsed
    monkeypatch.setattr(columns, "parsed", lambda data: read.append(len(data)) or plain(data))
    file = Followed(path)
    file.read_on()
    assert sum(read) == path.stat().st_size
    assert not file.has_changed()
    added = line(50, "train", 2.5, since=0)
    with open(path, "a", encoding="utf-8") as out:
        out.write(added[:20])
    file.read_on()
    assert steps(file)[-1] == 49  # the line is not complete
    with open(path, "a", encoding="utf-8") as out:
        out.write(added[20:])
    assert file.has_changed()
    file.read_on()
    assert steps(file) == list(range(1, 51))
    assert read[1:] == [len(added)]


@pytest.mark.parametrize("in_place", [True, False])
def test_lines_that_a_resume_took_back_are_forgotten(in_place: bool, tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", range(1, 50)) / "metrics.jsonl"
    file = Followed(path)
    file.read_on()
    other = "".join(line(step, "train", 9.0 + step, since=0) for step in range(1, 60))  # longer than before
    if in_place:
        path.write_text(other, encoding="utf-8")
    else:
        (tmp_path / "new").write_text(other, encoding="utf-8")
        os.replace(tmp_path / "new", path)
    file.read_on()
    assert steps(file) == list(range(1, 60))
    assert file.splits["train"].fields["loss"][0] == 10.0
    assert "validation" not in file.splits


NONSENSE = ["", "null", "[]", "{", "1", '{"step": "x", "time": 1}', '{"step": 1, "time": null}', "[" * 100_000, "\ufffd\x00",
            '{"step": 7, "time": 1, "split": ["train"]}', '{"step": 8, "time": 1, "split": "train", "loss": "low", "odd": [1]}']  # fmt: skip


def test_nonsense_in_a_file_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path, "a", [1, 2]) / "metrics.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join([*NONSENSE, '{"step": 3, "time": 1, "split": "train", "loss": NaN}', ""]))
        file.write('{"step": 4, "time": 1, "split": "train", "loss": 1e999, "lr": ' + "9" * 400 + ', "tok_s": true}\n')
    followed = Followed(path)
    followed.read_on()
    assert steps(followed) == [1, 2, 8, 3, 4]
    assert followed.splits["train"].last("loss") == pytest.approx(2 + 2 * math.exp(-0.01) + 0.05 * math.sin(2))
    assert all(math.isnan(followed.splits["train"].fields[name][-1]) for name in ("loss", "lr", "tok_s"))
    json.dumps(curves(followed.splits), allow_nan=False)


def test_step_and_time_are_read_also_behind_many_fields(tmp_path: Path) -> None:
    more = {f"metric_{n}": 0.5 for n in range(columns.MOST_FIELDS + 10)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(more | json.loads(line(3, "train", 2.0, since=5.0))) + "\n")
    file = Followed(tmp_path / "metrics.jsonl")
    file.read_on()
    assert steps(file) == [3]
    assert file.splits["train"].last("time") == 8.0


def test_a_pipe_in_the_place_of_metrics_is_not_opened(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "a"
    place.mkdir(parents=True)
    os.mkfifo(place / "metrics.jsonl")
    Followed(place / "metrics.jsonl").read_on()
    assert looked(library_of(tmp_path)) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Series


def splits_of(values: list[float], **more: float) -> columns.Splits:
    rows = [
        {"step": at, "time": 5.0 + at, "split": "train", "loss": y, "tokens": at * 8} | more
        for at, y in enumerate(values)
    ]
    return as_columns(rows)


def test_a_short_series_is_whole_and_a_long_one_keeps_its_extremes_and_its_mean() -> None:
    short = curves(splits_of([3.0, 2.0, 1.0]))["train"]["loss"]
    assert short == {
        "shown": {
            "step": [0, 1, 2],
            "tokens": [0, 8, 16],
            "time": [0, pytest.approx(1 / 3600), pytest.approx(2 / 3600)],
            "y": [3, 2, 1],
        }
    }
    values = np.sin(np.arange(100_003)).tolist()
    values[77_777] = 99.0
    long = curves(splits_of(values))["train"]["loss"]
    shown = dict(zip(long["shown"]["step"], long["shown"]["y"], strict=True))
    assert len(shown) <= series.LOSS_POINTS + 2
    assert shown[77_777] == 99
    assert {0, 100_002} <= shown.keys()
    assert all(values[step] == pytest.approx(y, abs=1e-6) for step, y in shown.items())
    assert len(long["mean"]["y"]) == series.LOSS_POINTS // 2
    assert np.mean(long["mean"]["y"]) == pytest.approx(np.mean(values), abs=1e-4)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 12, 13, 99, 100, 101, 1009])
def test_every_bucket_keeps_its_lowest_and_highest_value(count: int) -> None:
    y = np.random.default_rng(count).normal(size=count)
    chosen = series.extremes(y, 5)
    assert (np.diff(chosen) > 0).all()
    for part in np.split(np.arange(count), series.bucket_starts(count, 5)[1:]) if count > 10 else [np.arange(count)]:
        assert {part[y[part].argmin()], part[y[part].argmax()]} <= set(chosen)


def test_a_window_shows_more_points_of_less() -> None:
    splits = splits_of(np.arange(100_000.0).tolist())
    part = curves(splits, ("step", 50.0, 69.0))["train"]["loss"]
    assert part["shown"]["step"] == list(range(50, 70))
    assert "mean" not in part
    assert curves(splits, ("tokens", 8.0, 16.0))["train"]["loss"]["shown"]["step"] == [1, 2]
    assert curves(splits, ("step", -5.0, -1.0)) == {"train": {}}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_what_became_of_each_run(runs: Path) -> None:
    found = looked(library_of(runs))
    assert {name: run["state"] for name, run in found.items()} == {
        BASE: "finished",
        FAST: "finished",
        CHILD: "finished",
        CUT: "interrupted",
    }
    assert {name: run["checkpoints"] for name, run in found.items()} == {BASE: 3, FAST: 1, CHILD: 2, CUT: 2}
    assert (found[CHILD]["parent"]["id"], found[CHILD]["parent"]["step"], found[CHILD]["parent"]["anew"]) == (
        found[BASE]["id"],
        400,
        False,
    )
    assert found[CHILD]["parent"]["changed"] == ["LEARNING_RATE 0.001 -> 0.0003"]
    assert found[FAST]["note"] == "four times the rate"
    assert (found[CUT]["step"], found[CUT]["steps"]) == (300, 5000)


def test_a_run_whose_process_holds_its_lock_is_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", range(1, 9), TRAINING_STEPS="20")
    library = library_of(tmp_path)
    before = library.version
    with hold_run(folder, "a"):
        assert looked(library)["a"]["state"] == "training"
        assert library.version > before
    assert looked(library)["a"]["state"] == "interrupted"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_nothing_changes_while_nothing_changes(tmp_path: Path) -> None:
    write_run(tmp_path, "a", range(1, 9))
    save(tmp_path, "a", 4)
    library = library_of(tmp_path)
    before = library.version
    looked(library)
    assert (library.version, library.summaries(before)["runs"]) == (before, [])
    save(tmp_path, "a", 8)
    assert looked(library)["a"]["checkpoints"] == 2
    assert [run["name"] for run in library.summaries(before)["runs"]] == ["a"]


def test_a_new_run_appears_and_a_deleted_one_goes(tmp_path: Path) -> None:
    first = write_run(tmp_path, "a", [1])
    library = library_of(tmp_path)
    write_run(tmp_path, "b", [1])
    assert set(looked(library)) == {"a", "b"}
    first.rename(tmp_path / "gone")
    assert set(looked(library)) == {"b"}


def test_a_run_whose_folder_was_renamed_keeps_its_checkpoints_and_its_children(tmp_path: Path) -> None:
    family(tmp_path)
    before = looked(library_of(tmp_path))
    for name in (BASE, CUT):
        (tmp_path / "runs" / name).rename(tmp_path / "runs" / f"the {name}")
    found = looked(library_of(tmp_path))
    assert found[f"the {BASE}"]["checkpoints"] == 3
    assert found[CHILD]["parent"]["id"] == found[f"the {BASE}"]["id"]
    assert found[f"the {CUT}"]["resume"] == before[CUT]["resume"]
    assert before[CUT]["resume"]


def test_a_copy_beside_a_run_has_none_of_its_checkpoints(tmp_path: Path) -> None:
    family(tmp_path)
    shutil.copytree(tmp_path / "runs" / CUT, tmp_path / "runs" / "copy")
    found = looked(library_of(tmp_path))
    assert (found[CUT]["checkpoints"], found["copy"]["checkpoints"], found["copy"]["resume"]) == (2, 0, None)


@pytest.mark.parametrize("run_id", [None, 3, "", "..", "a/b", "\ud800", "x" * 5000])
def test_a_garbled_id_in_run_json_counts_for_none(run_id: object, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "a", [1, 2])
    save(tmp_path, "a", 2)
    (folder / "run.json").write_text(json.dumps({"run_id": run_id, "parent": None}), encoding="utf-8")
    assert looked(library_of(tmp_path))["a"]["checkpoints"] == 1


@pytest.mark.parametrize("name", ["", ".", "/", "\ud800"])
def test_a_parent_whose_name_no_folder_can_have_has_no_id(name: str, tmp_path: Path) -> None:
    """A garbled run.json must cost neither its own figures nor those of the other runs."""
    write_run(tmp_path, "a", [1])
    write_run(tmp_path, "b", [3, 4], parent={"run_id": name, "step": 2})
    found = looked(library_of(tmp_path))
    assert {run: figures["step"] for run, figures in found.items()} == {"a": 1, "b": 4}
    assert (found["b"]["parent"]["id"], found["b"]["parent"]["step"]) == (None, 2)
    (drawn,) = held(report(tmp_path, RUN="b"))["runs"]["runs"]
    assert (drawn["name"], drawn["parent"]) == ("b", found["b"]["parent"])


def test_the_command_of_an_interrupted_run_resumes_it(tmp_path: Path) -> None:
    assert train(tmp_path)[0] == 0
    for path in (tmp_path / "checkpoints").rglob("*step0008*"):
        path.unlink()  # as if it had been killed
    (run,) = (tmp_path / "runs").iterdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(each for each in lines if json.loads(each)["step"] <= 5))
    (figures,) = looked(library_of(tmp_path)).values()
    assert figures["state"] == "interrupted"
    *variables, python, path = shlex.split(figures["resume"])
    values = dict(each.split("=", 1) for each in variables)
    assert values["RESUME"].endswith(".pt")
    assert (Path(python).name.startswith("python"), path) == (True, "training.py")
    done = command("training.py", tmp_path, **values)
    assert done.returncode == 0, done.stderr
    (figures,) = looked(library_of(tmp_path)).values()
    assert (figures["state"], figures["step"], figures["resume"]) == ("finished", 8, None)


def test_details_of_checkpoints_and_samples(runs: Path) -> None:
    library = library_of(runs)
    details = library.details([id_of(Path(BASE)), id_of(Path(FAST)), "unknown", "../../etc/passwd"])
    ids = [id_of(Path(BASE)), id_of(Path(FAST))]
    assert list(details) == ids
    base, fast = details.values()
    assert [(each["step"], each["resumable"], each["best"], each["latest"]) for each in base["checkpoints"]] == [
        (200, True, False, False), (400, True, False, False), (600, True, True, True)]  # fmt: skip
    assert [each["resumable"] for each in fast["checkpoints"]] == [False]
    assert [each["step"] for each in base["samples"]] == [100, 200, 300, 400, 500, 600]
    assert base["samples"][0]["text"] == "It was I been said so.\nstep 100\n"
    differ = ("LEARNING_RATE=0.001", "LEARNING_RATE=0.004")
    assert library.curves(ids)["labels"] == dict(zip(ids, differ, strict=True))


def test_a_link_in_samples_is_not_followed(tmp_path: Path) -> None:
    place = write_run(tmp_path, "a", [100])
    (tmp_path / "secret").write_text("secret")
    (place / "samples" / "step000200.txt").symlink_to(tmp_path / "secret")
    library = library_of(tmp_path)
    assert [each["step"] for each in library.details([id_of(place)])[id_of(place)]["samples"]] == [100]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a", [1])
    save(tmp_path, "a", 1)
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    path.write_bytes(path.read_bytes()[:-9])
    library = library_of(tmp_path)
    (problem,) = library.summaries()["damaged"]
    assert (problem["kind"], Path(problem["path"]).name) == ("damaged", path.name)


# ---------------------------------------------------------------------------------------------------------------------
# One file


def report(folder: Path, **changes: str) -> str:
    done = call(plot, folder, OUTPUT=str(folder / "report.html"), **changes)
    assert done.code == 0, done.err
    return (folder / "report.html").read_text(encoding="utf-8")


def held(text: str) -> dict[str, object]:
    """The data in a report."""
    return json.loads(re.search(r'<script type="application/json" id="held">(.*?)</script>', text, re.DOTALL)[1])


def test_a_report_holds_the_runs_with_their_parents(runs: Path, tmp_path: Path) -> None:
    done = call(plot, runs, RUN=f"{CHILD},{CUT}", OUTPUT=str(tmp_path / "report.html"))
    assert done.code == 0, done.err
    data = held((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert {run["name"] for run in data["runs"]["runs"]} == {BASE, CHILD, CUT}
    base = data["curves"]["curves"][id_of(Path(BASE))]
    assert max(base["train"]["loss"]["shown"]["step"]) == 400  # where the child resumed
    assert len(data["details"][id_of(Path(CUT))]["checkpoints"]) == 2


def test_a_report_tells_of_a_parent_what_became_of_it_and_not_where_its_curve_ends(runs: Path, tmp_path: Path) -> None:
    done = call(plot, runs, RUN=CHILD, OUTPUT=str(tmp_path / "report.html"))
    assert done.code == 0, done.err
    told = held((tmp_path / "report.html").read_text(encoding="utf-8"))["runs"]["runs"]
    (base,) = (run for run in told if run["name"] == BASE)
    looked_at = looked(library_of(runs))[BASE]
    assert (base["state"], base["step"], base["resume"]) == ("finished", 600, None)
    assert base == looked_at | {"sampled": base["sampled"]}  # as the page of the server shows it


def hashes(text: str) -> set[str]:
    """The sha256 of each script and style that a page runs, as a policy names them."""
    inline = re.findall(r"<(?:style|script|script type=\"module\")>(.*?)</(?:style|script)>", text, re.DOTALL)
    return {f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inline}


def test_the_policy_allows_the_page_and_nothing_else(runs: Path) -> None:
    for data, connect in ((None, "'self'"), ({"runs": []}, "'none'")):
        text, policy = html.page(data)
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert set(rules["script-src"].split() + rules["style-src"].split()) == hashes(text)
        assert len(hashes(text)) == 4
        assert (rules["default-src"], rules["connect-src"], rules["base-uri"]) == ("'none'", connect, "'none'")
        assert "unsafe" not in policy
        assert not re.search(r"<[^>]+\s(?:on\w+|style)=", re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL))
        assert ("http-equiv" in text) == (data is not None)


def test_the_page_names_no_other_host() -> None:
    own = re.sub(
        r"<script>.*?</script>", "", html.page()[0], count=1, flags=re.DOTALL
    )  # uPlot names its home page in a comment
    assert set(re.findall(r"https?://[^\s\"'`]+", own)) == {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("text", XSS)
def test_no_text_of_a_file_ends_the_script_that_holds_it(text: str) -> None:
    page, _ = html.page({"name": text})
    assert held(page) == {"name": text}
    assert page.count("<script") == html.page({"name": ""})[0].count("<script")


def test_the_modules_join_into_one() -> None:
    """No import or export is left, none names a later module, and no two declare the same name."""
    declared: list[str] = []
    for at, name in enumerate(html.MODULES):
        text = html.read(f"{name}.js")
        assert set(re.findall(r'^import .* from "\./(\w+)\.js";$', text, re.MULTILINE)) <= set(html.MODULES[:at])
        declared += re.findall(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", text, re.MULTILINE)
    assert not re.search(r"^\s*(?:import|export)\b", html.joined(), re.MULTILINE)
    assert sorted(set(declared)) == sorted(declared)
    assert {path.stem for path in html.STATIC.glob("*.js")} == set(html.MODULES)
    assert "</script" not in html.joined()


def test_no_module_writes_html() -> None:
    for name in html.MODULES:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|DOMParser",
            html.read(f"{name}.js"),
        )


def test_the_vendored_files_are_those_of_the_package() -> None:
    folder = html.STATIC / "uplot"
    sums = dict(reversed(row.split()) for row in (folder / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"uPlot.iife.min.js", "uPlot.min.css", "LICENSE"}
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums} == sums
    assert "MIT" in (folder / "LICENSE").read_text()


def test_a_report_of_a_run_outside_the_folder(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    write_run(tmp_path / "elsewhere", "odd", [1, 2])
    text = report(tmp_path, RUN=str(tmp_path / "elsewhere" / "runs" / "odd"))
    assert [run["name"] for run in held(text)["runs"]["runs"]] == ["odd"]


def test_as_a_user_writes_a_report(runs: Path, tmp_path: Path) -> None:
    done = command("scripts/plot_run.py", runs, **NOTHING_OF_TRAINING, RUN="*", OUTPUT=str(tmp_path / "report.html"))
    assert (done.returncode, done.stdout) == (0, "")
    assert len(held((tmp_path / "report.html").read_text(encoding="utf-8"))["runs"]["runs"]) == 4
