"""What reaches a screen: no text steers a terminal, and no stream that cannot be written decides how a script ends."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import drive
import programs
import pytest
import torch
from drive import ROOT, at_step, environment, newest, tensor_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from script import NOTHING_OF_TRAINING, script
from work import HANGING

import training
from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.config import ConfigError
from milepost.runtime.progress import Log, command_line, shown
from milepost.runtime.tables import table
from milepost.screen import harmless

STEERING = (
    "\x1b[2J\x1b]0;t\x07\r\x9b3\u202eevil\u2066\udcff"  # escapes, a bidirectional override, half a surrogate pair
)
FILE_NAME = "\x1b[31mred\u202e\x9b"  # that file systems take
RUN = "\x1b[2Jrun\u202e$\\x$"

HARMLESS = [
    ("plain text,\n\ttabs and lines", "plain text,\n\ttabs and lines"),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ("over\rwritten\b\x00\x7f", r"over\rwritten\x08\x00\x7f"),
    ("\x9b2J\x85\u2028", r"\x9b2J\x85\u2028"),
    ("\u202eevil\u2066\u2069\u200f", r"\u202eevil\u2066\u2069\u200f"),
    ("half \udcff", r"half \udcff"),
    ("é\u00a0— 日本 👩\u200d👩\u200d👧 \u05d0", "é\u00a0— 日本 👩\u200d👩\u200d👧 \u05d0"),
]


def is_harmless(text: str) -> bool:
    """Whether nothing in the text steers a terminal: no controls but newline and tab, no overrides, no surrogates."""
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return not any(
        (unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t")
        or unicodedata.bidirectional(char) in bidirectional
        for char in text
    )


@pytest.mark.parametrize(("text", "expected"), HARMLESS, ids=ascii)
def test_harmless(text, expected):
    assert harmless(text) == expected


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_nothing_steers_a_terminal(text):
    assert is_harmless(harmless(text))
    assert harmless(harmless(text)) == harmless(text)
    assert harmless(text, one_line=True).isprintable()
    assert not is_harmless(STEERING)  # negative control


@pytest.mark.parametrize(
    "line",
    [
        str(ConfigError([f"RUN={STEERING}: no such run"])),
        str(CheckpointError(Path(STEERING), STEERING, STEERING)),
        shown(Path(STEERING)),
        table([(STEERING, "step"), ("short", STEERING)]),
        command_line(Path("script.py"), CHECKPOINT_PATH=Path(STEERING)),
    ],
    ids=["ConfigError", "CheckpointError", "shown", "table", "command_line"],
)
def test_names_and_values_are_harmless(line):
    assert is_harmless(line)


def test_log_lines_are_harmless_on_stderr_and_in_training_log(tmp_path, capsys):
    log = Log()
    log(f"early {STEERING}")
    log.open(tmp_path / "training.log")
    log(f"later {STEERING}\nsecond line")
    log.error(f"error: {STEERING}", expected=False)
    log.close()
    written = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert is_harmless(written)
    assert written.count("\n") == 4
    assert capsys.readouterr().err == written


def test_the_command_to_resume_names_any_file(tmp_path):
    """A shell that runs the logged command gets the file's name, whatever bytes it has."""
    path = tmp_path / "a \x1b7\u202e'\\\udcff\n.pt"
    line = command_line(Path("x.py"), CHECKPOINT_PATH=path)
    assert line.endswith(" x.py")
    words = line.split(" ")  # the name of the Python, which depends on how this one was started, comes before x.py
    script = 'python3() { printf %s "$CHECKPOINT_PATH"; }; ' + " ".join([*words[:-2], "python3", "x.py"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout == os.fsencode(path)


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


class Streams(NamedTuple):
    """Where the streams of a program lead, as a shell's redirections do."""

    out: str = os.devnull
    err: str = os.devnull
    closed: tuple[int, ...] = ()

    @contextlib.contextmanager
    def opened(self, folder: Path) -> Iterator[tuple[int, int]]:
        """Open both for the program to write; `GONE` is a pipe whose reader has ended, as in `| true`."""
        reader, pipe = os.pipe()
        os.close(reader)
        with open(pipe, "wb") as gone, contextlib.ExitStack() as stack:
            files = [gone if name == GONE else stack.enter_context(open(folder / name, "wb")) for name in self[:2]]
            yield files[0].fileno(), files[1].fileno()


GONE = "|"
FULL = "/dev/full"
UNHEARD: dict[str, tuple[Streams, dict[str, str]]] = {
    "full": (Streams(out=FULL, err=FULL), {}),
    "closed": (Streams(closed=(0, 1, 2)), {}),
    "ascii": (Streams(out="out"), {"PYTHONIOENCODING": "ascii:strict"}),
}
TRAINED = {"TRAINING_STEPS": "8", "CHECKPOINT_INTERVAL": "4"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of 8 steps, whose names are not ASCII, and adapters of its last checkpoint."""
    folder = tmp_path_factory.mktemp("é")
    code, said = drive.train(folder, **TRAINED)
    assert code == 0, said
    lora = {"LORA_RANK": "2", "INIT_FROM": str(at_step(folder, 8)), "CHECKPOINT_DIR": str(folder / "adapters")}
    code, said = drive.train(folder, TRAINING_STEPS="1", WARMUP_STEPS="0", CHECKPOINT_ADAPTERS_ONLY="true", **lora)
    assert code == 0, said
    return folder


def unheard(name: str, folder: Path, streams: Streams, *, cwd: Path | None = None, **changes: str | None) -> int:
    """Return the exit code of a script with these streams."""
    kept = {each: os.environ[each] for each in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
            if each in os.environ}  # fmt: skip
    values = environment(folder, **(changes if name == "training" else NOTHING_OF_TRAINING | changes))
    path = ROOT / ("training.py" if name == "training" else f"scripts/{name}.py")
    place = cwd or folder
    with streams.opened(place) as (out, err):
        return programs.run(
            [sys.executable, path], cwd=place, env=kept | values, input=b"Dear\n", stdout=out, stderr=err,
            closed=streams.closed,
        ).returncode  # fmt: skip


SCRIPTS = {
    "list_checkpoints": {},
    "inspect_checkpoint": {"CHECKPOINT_PATH": "latest"},
    "verify_checkpoint": {"CHECKPOINT_PATH": "latest"},
    "prune_checkpoints": {"CHECKPOINT_KEEP_LAST": "1"},
    "convert_checkpoint": {"CHECKPOINT_PATH": "latest", "CONVERT_TO": "separated", "OUTPUT": "converted"},
    "merge_adapters": {"CHECKPOINT_PATH": "adapters", "OUTPUT": "merged"},
    "evaluate_checkpoint": {"CHECKPOINT_PATH": "latest"},
    "compare_samples": {"CHECKPOINT_PATH": "best,latest", "MAX_NEW_TOKENS": "4"},
    "plot_run": {},
    "load_checkpoint": {"CHECKPOINT_PATH": "latest", "MAX_NEW_TOKENS": "4"},
    "publish_checkpoint": {"CHECKPOINT_PATH": "latest", "PUSH_TO_HUB": "me/letters"},
    "chat": {"CHECKPOINT_PATH": "latest", "MAX_NEW_TOKENS": "4"},
}


SERVERS = {
    "serve_checkpoint",
    "watch_runs",
}  # until a signal: tests/test_serve_checkpoint.py, tests/test_page_routes.py


def test_every_script_is_tried():
    assert set(SCRIPTS) | SERVERS == {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize("way", UNHEARD)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_nobody_hears_ends_like_any_other(name, way, trained, tmp_path):
    """But a text or a report that a full disk took is lost, and the exit code says so, unless the product is a checkpoint."""
    folder = tmp_path / "é"
    shutil.copytree(trained, folder)
    streams, encoding = UNHEARD[way]
    lost = way == "full" and "OUTPUT" not in SCRIPTS[name]
    assert unheard(name, folder, streams, **SCRIPTS[name] | encoding) == int(lost)
    if output := SCRIPTS[name].get("OUTPUT"):
        (path,) = [found.path for found in ckpt.find(folder / output)]
        assert ckpt.verify(path) == []


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "FORMAT" in script(name).READS])
def test_json_that_was_lost_is_one_sentence_and_exit_code_1(name, trained, tmp_path):
    """On stderr; a reader that closes its pipe, as `| head` does, is none. A checkpoint that is bad has its own code."""
    folder = tmp_path / "é"
    shutil.copytree(trained, folder)
    changes = SCRIPTS[name] | {"FORMAT": "json"}
    assert unheard(name, folder, Streams(out=FULL, err="said"), **changes) == 1
    assert (folder / "said").read_text(encoding="utf-8").count("stdout cannot be written") == 1
    assert unheard(name, folder, Streams(out=GONE, err="said"), **changes) == 0
    assert "stdout" not in (folder / "said").read_text(encoding="utf-8")
    if name == "verify_checkpoint":
        at_step(folder, 8).write_bytes(at_step(folder, 8).read_bytes()[:-9])
        (bad,) = (path for path in (folder / "checkpoints").glob("*step0008*"))
        assert unheard(name, folder, Streams(out=FULL), **changes | {"CHECKPOINT_PATH": str(bad)}) == 3


SOME_CLOSED = {f"{number} closed": (Streams(closed=(number,)), {}) for number in (0, 1, 2)}


@pytest.mark.parametrize("way", UNHEARD | SOME_CLOSED)
def test_a_resume_that_nobody_hears_trains(way, trained, tmp_path):
    streams, encoding = (UNHEARD | SOME_CLOSED)[way]
    for name in ("heard", "unheard"):
        shutil.copytree(trained, tmp_path / name)
    assert unheard("training", tmp_path / "unheard", streams, RESUME="auto", TRAINING_STEPS="10", **encoding) == 0
    assert drive.train(tmp_path / "heard", RESUME="auto", TRAINING_STEPS="10")[0] == 0
    heard, alone = newest(tmp_path / "heard"), newest(tmp_path / "unheard")
    assert (alone.step, tensor_bytes(alone)) == (10, tensor_bytes(heard))


@pytest.mark.parametrize("way", UNHEARD)
@pytest.mark.parametrize(
    ("changes", "code"),
    [({"MODEL_TYPE": "gtp2"}, 2), ({"RESUME": "nowhere.pt"}, 3), ({"TRAINING_DATA_SOURCE": "nowhere.txt"}, 4)],
)
def test_an_error_that_nobody_hears_has_its_exit_code(way, changes, code, tmp_path):
    assert unheard("training", tmp_path, UNHEARD[way][0], **changes) == code


# ---------------------------------------------------------------------------------------------------------------------
# Working folders


@pytest.mark.parametrize("name", ["training", "list_checkpoints", "load_checkpoint"])
def test_a_deleted_working_folder_is_a_sentence(name, tmp_path):
    drive.small_text(tmp_path)
    path = "training.py" if name == "training" else f"scripts/{name}.py"
    line = f'mkdir gone && cd gone && rmdir ../gone && exec "$0" "{ROOT / path}"'
    done = subprocess.run(["bash", "-c", line, sys.executable], cwd=tmp_path, env=environment(tmp_path),
                          capture_output=True, text=True, timeout=HANGING, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 + done.stderr.count("getcwd")  # bash reports the folder, too


def test_training_survives_the_deletion_of_its_working_folder(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)

    def delete_it(run) -> dict[str, torch.Tensor]:
        if gone.exists():
            gone.rmdir()
        return {}

    monkeypatch.setattr(training, "MEASURES", [delete_it])
    code, said = drive.train(tmp_path)
    assert (code, gone.exists()) == (0, False), said
    assert newest(tmp_path).step == 8
    assert shown(tmp_path / "a.pt") == str(tmp_path / "a.pt")


def test_a_working_folder_whose_name_is_no_utf8_is_refused_before_anything_is_saved(tmp_path):
    """What a checkpoint says of its files could not be read again."""
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    assert unheard("training", tmp_path, Streams(), cwd=folder, CHECKPOINT_DIR="checkpoints") == 2
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Names of files and values inside them, through the scripts


@pytest.mark.parametrize(
    "name",
    [
        "list_checkpoints",
        "inspect_checkpoint",
        "verify_checkpoint",
        "evaluate_checkpoint",
        "compare_samples",
        "plot_run",
    ],
)
def test_names_and_values_in_files_steer_no_terminal(name, trained, tmp_path):
    folder = tmp_path / FILE_NAME
    shutil.copytree(trained, folder)
    at_step(folder, 8).rename(folder / "checkpoints" / f"{FILE_NAME}.pt")
    (folder / "checkpoints" / f"bad{FILE_NAME}.pt").write_bytes(b"not a checkpoint")
    (run, *_) = (folder / "runs").iterdir()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 9, "split": "train", "time": 1.0, STEERING: 1.0}) + "\n")
    run.rename(run.with_name(f"\x1b[2J{run.name}\u202e"))
    done = drive.command(str(ROOT / "scripts" / f"{name}.py"), folder, **NOTHING_OF_TRAINING, RUN="*",
                         CHECKPOINT_PATH=str(folder / "checkpoints" / f"{FILE_NAME}.pt")
                         if name in ("inspect_checkpoint", "evaluate_checkpoint") else str(folder / "checkpoints"))  # fmt: skip
    assert done.returncode in (0, 3)  # 3 for the file that is no checkpoint
    assert "\\x1b[" in done.stdout + done.stderr
    assert is_harmless(done.stdout + done.stderr)


@pytest.mark.exchange
def test_a_plot_is_drawn_whatever_the_names(trained, tmp_path):
    """A control character would make the SVG unreadable, and dollar signs would be read as mathematics."""
    (run, *_) = (trained / "runs").iterdir()
    shutil.copytree(run, tmp_path / "runs" / RUN)
    done = drive.command(str(ROOT / "scripts" / "plot_run.py"), tmp_path, **NOTHING_OF_TRAINING,
                         OUTPUT=str(tmp_path / "curves.svg"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    ET.parse(tmp_path / "curves.svg")
