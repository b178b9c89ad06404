"""docs/data.md: every command as it is written, in a folder with the files that it names."""

import re
from collections.abc import Callable
from pathlib import Path

import pages
import pytest
from drive import ROOT, newest, small_text
from talks import rows
from test_columnar import packed, table_file
from test_guides import called, parsed
from test_hub_datasets import FIRST, data_hub, train
from test_prepared import gpt2_ids, of_characters, of_llm_c

from milepost.run import text as run_text

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
LETTER = "The wren sings at dawn, and the lark follows it.\n"


def stories(folder: Path) -> None:
    small_text(folder, name="stories.txt")


def held_out(folder: Path) -> None:
    rows(folder / "held_out.jsonl", [{"text": LETTER * 20}])


def letters(folder: Path) -> None:
    rows(folder / "letters.jsonl", [{"text": LETTER * 20}] * 5)


def project(folder: Path) -> None:
    (folder / "project").mkdir()
    (folder / "project" / "wren.py").write_text("def sing():\n    return 'tseep'\n" * 200, encoding="utf-8")


def stories_table(folder: Path) -> None:
    table_file(folder / "stories.parquet", [{"story": f"{n}: {LETTER}"} for n in range(200)])


def characters(folder: Path) -> None:
    of_characters(folder / "shakespeare_char")


def shards(folder: Path) -> None:
    (folder / "fineweb10B").mkdir()
    of_llm_c(folder / "fineweb10B" / "fineweb_train_000001.bin", gpt2_ids([LETTER * 100], before=True))


def pages_table(folder: Path) -> None:
    table_file(folder / "pages.arrow", [{"text": f"{n}: {LETTER}"} for n in range(200)])


def diary(folder: Path) -> None:
    small_text(folder, name="diary.txt")
    packed(folder / "diary.txt.zst", (folder / "diary.txt").read_bytes())


# A file that a command names -> what makes it; those that need a package are run by `make test-exchange`.
FILES: dict[str, Callable[[Path], None]] = {
    "stories.txt": stories,
    "held_out.jsonl": held_out,
    "letters.jsonl": letters,
    "project": project,
    "stories.parquet": stories_table,
    "pages.arrow": pages_table,
    "diary.txt.zst": diary,
    "shakespeare_char/train.bin": characters,
    "fineweb10B/fineweb_train_": shards,
}
PACKAGES = ("stories.parquet", "pages.arrow")
OURS = [line for line in pages.commands(PAGE) if re.search(r"\bpython3 \S+\.py$", line)]
COMMANDS = [line for line in OURS if "hf://" not in line]


def needed(line: str) -> list[str]:
    """The files that a command names."""
    return [name for name in FILES if re.search(rf"[=,:']{re.escape(name)}", line)]


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=[pytest.mark.exchange] * bool({*needed(line)} & {*PACKAGES})) for line in COMMANDS],
)
def test_every_command_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache" / "tokens")
    assert needed(line)
    for name in needed(line):
        FILES[name](tmp_path)
    done = called(line, tmp_path)
    assert done.code == 0, f"{done.out}\n{done.err}"


def test_the_data_set_of_the_hub_is_trained_on(tmp_path: Path) -> None:
    """With the variables of the command, on a hub of this computer."""
    (line,) = set(OURS) - set(COMMANDS)
    variables, _ = parsed(line)
    with data_hub(tmp_path, "roneneldan/TinyStories") as hub:
        (hub.top / FIRST / "data" / "test-00000-of-00001.jsonl").rename(hub.top / FIRST / "data" / "validation-0.jsonl")
        code, said = train(tmp_path / "run", hub, TRAINING_STEPS="2", **variables)
    assert code == 0, said
    assert newest(tmp_path / "run").data["source"] == f"hf://datasets/roneneldan/TinyStories@{FIRST}/train"
