"""Texts of several checkpoints side by side: equal to the texts generated from each checkpoint."""

import json
import re
from pathlib import Path

import pytest
from script import Said, call, copied, family, script, train_family

from milepost import config

compare, load = script("compare_samples"), script("load_checkpoint")
SETTINGS = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "40", "SAMPLE_SEED": "7"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return copied(trained, tmp_path)


def compared(folder: Path, *steps: int, **changes: str) -> Said:
    paths = ",".join(str(family(folder)[step]) for step in steps)
    return call(compare, folder, **SETTINGS | {"CHECKPOINT_PATH": paths} | changes)


def columns_of(text: str) -> list[list[str]]:
    """The lines of each column of a side-by-side text."""
    rows = [re.split(r" \| ?", line) for line in text.splitlines()]
    return [[row[number].rstrip() if number < len(row) else "" for row in rows] for number in range(len(rows[0]))]


@pytest.mark.parametrize("changes", [{}, {"TEMPERATURE": "0"}, {"NUM_SAMPLES": "3"}, {"PROMPT": None}])
def test_the_texts_are_those_of_generating_from_each(changes, folder):
    output = folder / "compared.json"
    assert compared(folder, 2, 8, OUTPUT=str(output), **changes).code == 0
    values = json.loads(output.read_text(encoding="utf-8"))
    assert [one["step"] for one in values["checkpoints"]] == [2, 8]
    for one in values["checkpoints"]:
        alone = call(load, folder, **SETTINGS | {"CHECKPOINT_PATH": one["path"]} | changes)
        assert "".join(text + "\n" for text in one["texts"]) == alone.out
        assert len(one["texts"]) == int(changes.get("NUM_SAMPLES", 1))
    assert values["checkpoints"][0]["texts"] != values["checkpoints"][1]["texts"]
    assert (values["prompt"], values["sample_seed"], values["max_new_tokens"]) == (
        changes.get("PROMPT", "Dear") or "",
        7,
        40,
    )


def test_side_by_side_where_there_is_room(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "163")
    said = compared(folder, 2, 4, NUM_SAMPLES="2")
    assert said.code == 0
    assert {len(line) <= 163 for line in said.out.splitlines()} == {True}
    left, right = columns_of(said.out)
    assert (left[0], right[0].split(",")[0]) == ("gpt2 at step 2", "gpt2 at step 4")
    rules = [number for number, line in enumerate(left) if line == "-" * 80]
    assert len(rules) == 2  # each text begins at the same height in every column
    assert all(right[number] == "-" * 80 and right[number + 1].startswith("Dear") for number in rules)


def test_one_after_another_where_columns_would_be_narrow(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = compared(folder, 2, 4).out
    assert " | " not in out
    assert [line for line in out.splitlines() if line.startswith("gpt2 at step")] == [
        "gpt2 at step 2",
        "gpt2 at step 4, validation loss " + re.search(r"loss (\S+)", out)[1],
    ]
    assert max(map(len, out.splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "1")
    assert compared(folder, 2, 4).code == 0


def test_an_unset_seed_is_drawn_once_for_all(folder):
    said = compared(folder, 2, 4, SAMPLE_SEED=None)
    seeds = re.findall(r"SAMPLE_SEED=(\d+)", said.err)
    assert len(seeds) == 2
    assert len(set(seeds)) == 1
    assert compared(folder, 2, 4, SAMPLE_SEED=seeds[0]).out == said.out


def test_a_folder_a_glob_and_latest(folder):
    checkpoints = folder / "checkpoints"
    whole = call(compare, folder, **SETTINGS, CHECKPOINT_PATH=checkpoints, OUTPUT=folder / "x.json")
    assert whole.code == 0
    assert len(json.loads((folder / "x.json").read_text())["checkpoints"]) == 6
    assert (
        call(compare, folder, **SETTINGS, CHECKPOINT_PATH=f"{checkpoints}/*step000[24]*").out.count("gpt2 at step") == 2
    )
    assert call(compare, folder, **SETTINGS).out.count("gpt2 at step") == 1


def test_markdown_holds_every_character(folder):
    output = folder / "compared.md"
    assert compared(folder, 2, 4, OUTPUT=str(output), NUM_SAMPLES="2").code == 0
    text = output.read_text(encoding="utf-8")
    assert compared(folder, 2, 4, OUTPUT=str(folder / "x.json"), NUM_SAMPLES="2").code == 0
    for one in json.loads((folder / "x.json").read_text())["checkpoints"]:
        assert f"## gpt2 at step {one['step']}" in text
        for each in one["texts"]:
            assert f"```text\n{each}\n```" in text


def test_the_files_name_every_setting_of_the_texts(folder):
    """A setting is a word of the environment, as it can be set again."""
    changed = {"RAW_PROMPT": "true", "STOP": '["x", "\\n\\n"]', "DTYPE": "float32", "UNKNOWN_CHARACTERS": "skip"}
    read = {word for word in compare.READS if word in config.VARIABLES}
    generation = {name for name in read if config.VARIABLES[name].metadata["group"] == "Generation"}
    named_elsewhere = {
        "CHECKPOINT_PATH",
        "PROMPT",
        "PROMPT_FILE",
        "SAMPLE_SEED",
        "NUM_SAMPLES",
        "SPECULATE",
    }  # the last changes no text
    wanted = generation - named_elsewhere | {"DTYPE", "UNKNOWN_CHARACTERS"}
    assert {name.upper() for name in compare.SAMPLING_SETTINGS} == wanted
    assert compared(folder, 2, OUTPUT=str(folder / "texts.md"), **changed).code == 0
    line = (folder / "texts.md").read_text(encoding="utf-8").splitlines()[2]
    assert all(f"{name}={value}" in line for name, value in changed.items()), line
    assert compared(folder, 2, OUTPUT=str(folder / "plain.md")).code == 0
    assert "STOP" not in (folder / "plain.md").read_text(encoding="utf-8").splitlines()[2]  # it is not set


def test_a_fence_is_longer_than_any_in_the_text():
    assert compare.fenced("a ```` b") == "`````text\na ```` b\n`````"
    assert compare.fenced("plain") == "```text\nplain\n```"


def test_control_characters_are_replaced():
    assert compare.wrapped("a\x1b[2Jb\rc\td", 40) == [r"a\x1b[2Jb\rc    d"]


def test_refusals(folder):
    said = compared(folder, 2, 4, PROMPT="Ω")
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[-1].startswith("error: PROMPT: ")
    for name in ("compared.txt", "checkpoints", "nowhere/x.json"):
        said = compared(folder, 2, OUTPUT=str(folder / name))
        assert (said.code, said.out) == (2, "")
        assert "expected a file name that ends in .json or .md, in an existing folder" in said.err
    said = call(compare, folder, CHECKPOINT_PATH=f"latest,{folder}/missing.pt")
    assert said.code == 3
    assert "missing.pt" in said.err
    damaged = family(folder)[2]
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert call(compare, folder, CHECKPOINT_PATH=f"latest,{damaged}").code == 3
    said = call(compare, folder, **SETTINGS, CHECKPOINT_PATH=folder / "checkpoints")
    assert said.code == 0
    assert f"skipped: {damaged}" in said.err
