"""VALIDATION_DATA: a text of its own to validate on, of any form, known by its hash."""

import json
import shutil
from pathlib import Path

import pytest
from drive import ROOT, at_step, newest, small_text, tensor_bytes, train
from exactly import resumes_exactly
from script import call, script
from talks import rows, talks_file

from milepost import ckpt, config
from milepost.run import text as run_text

BUNDLED = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache" / "tokens")


def held_out(folder: Path, name: str = "held_out.txt", *, text: str = BUNDLED[8000:10000]) -> Path:
    path = folder / name
    path.write_text(text if path.suffix == ".txt" else json.dumps([{"text": text}]), encoding="utf-8")
    return path


def test_the_training_text_is_whole_and_the_other_is_validated_on(tmp_path: Path) -> None:
    """The loss is that of the text as evaluate_checkpoint.py finds it; the record has its hash."""
    path = held_out(tmp_path, "held_out.json")
    record, said = resumes_exactly(
        tmp_path, TRAINING_DATA_SOURCE=str(small_text(tmp_path)), VALIDATION_DATA=str(path), EVAL_STEPS="0", DROPOUT="0", EVAL_INTERVAL="2"
    )  # fmt: skip
    assert record.data["validation_fraction"] == 0
    assert record.data["validation_source"] == str(path)
    assert "6000 tokens to train on, 2000 to validate on" in said
    assert record.validation_loss is not None
    assert "is the training text" not in said
    assert list((tmp_path / "again" / "checkpoints").glob("best/*"))
    evaluated = evaluate(tmp_path / "straight")
    assert evaluated == evaluate(tmp_path / "straight", EVAL_DATA=str(path))
    assert evaluated["bytes"] == len(BUNDLED[8000:10000].encode())


def evaluate(folder: Path, **changes: str) -> dict[str, object]:
    """The figures of the last checkpoint."""
    place = {"CHECKPOINT_DIR": str(folder / "checkpoints"), "CHECKPOINT_PATH": "latest", "FORMAT": "json"}
    done = call(script("evaluate_checkpoint"), folder, **place, **changes)
    assert done.code == 0, done.err
    return json.loads(done.out)["checkpoints"][0]["standard"]


def test_the_training_text_as_the_validation_text_is_told(tmp_path: Path) -> None:
    path = small_text(tmp_path, name="copy.txt")
    code, said = train(tmp_path, VALIDATION_DATA=str(path))
    assert (code, f"{path} is the training text: the validation loss does not show overfitting" in said) == (0, True), (
        said
    )


def test_files_that_are_trained_on_too_are_told(tmp_path: Path) -> None:
    """Also a copy of one under another name; a file of the same size with another text is no copy."""
    texts = [held_out(tmp_path, f"{name}.txt", text=BUNDLED[at : at + 6000]) for name, at in (("a", 0), ("b", 6000))]
    copy = shutil.copy(texts[1], held_out(tmp_path, "other.txt"))
    for validation, told in (
        (texts[1], True),
        (copy, True),
        (held_out(tmp_path, "c.txt", text=BUNDLED[12000:18000]), False),
    ):
        code, said = train(tmp_path, TRAINING_DATA_SOURCE=",".join(map(str, texts)), VALIDATION_DATA=str(validation))
        line = f"{validation}: in the training text too: {validation}: the validation loss does not show overfitting of them"
        assert (code, line in said) == (0, told), said


def test_conversations_are_validated_on_others(tmp_path: Path) -> None:
    path = rows(tmp_path / "held_out.jsonl", [{"prompt": "Which bird?", "completion": "the lark"}] * 3)
    record, _ = resumes_exactly(
        tmp_path, TRAINING_DATA_SOURCE=str(talks_file(tmp_path)), VALIDATION_DATA=str(path), BLOCK_SIZE="64"
    )
    (samples,) = (tmp_path / "straight" / "runs").glob("*/samples/*0008*")
    assert "Which bird?" in samples.read_text(encoding="utf-8")  # a question that is not trained on
    assert record.validation_loss is not None


def test_a_vocabulary_has_the_characters_of_both(tmp_path: Path) -> None:
    path = held_out(tmp_path, text="\u00e9" + BUNDLED[:500])
    code, said = train(tmp_path, VALIDATION_DATA=str(path))
    assert code == 0, said
    assert "\u00e9" in newest(tmp_path).tokenizer["chars"]  # type: ignore[index]
    assert "\u00e9" not in (tmp_path / "letters.txt").read_text(encoding="utf-8")


def test_a_vocabulary_has_the_line_feed_between_the_documents_of_the_validation_text(tmp_path: Path) -> None:
    """No line feed is in either text; the training text is one document."""
    flat = BUNDLED.replace("\n", " ")
    (tmp_path / "flat.txt").write_text(flat[:6000], encoding="utf-8")
    path = rows(tmp_path / "held_out.jsonl", [{"text": flat[8000:9000]}, {"text": flat[9000:10000]}])
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "flat.txt"), VALIDATION_DATA=str(path))
    assert code == 0, said
    assert "\n" in newest(tmp_path).tokenizer["chars"]  # type: ignore[index]


def test_texts_of_two_kinds_are_refused(tmp_path: Path) -> None:
    code, said = train(tmp_path, VALIDATION_DATA=str(talks_file(tmp_path)))
    assert (code, "holds conversations" in said) == (4, True)
    code, said = train(
        tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "talks.jsonl"), VALIDATION_DATA=str(small_text(tmp_path))
    )
    assert (code, "holds conversations" in said) == (4, True)
    code, said = train(tmp_path, VALIDATION_DATA=str(held_out(tmp_path, text="short")))
    assert (code, "BLOCK_SIZE" in said) == (4, True)


def test_a_fraction_beside_it_is_refused() -> None:
    given = {"VALIDATION_DATA": "a.txt", "VALIDATION_FRACTION": "0.2", "PYTHON_DOTENV_DISABLED": "1"}
    with pytest.raises(config.ConfigError, match="unset one"):
        config.read(given)
    config.read(given | {"VALIDATION_FRACTION": "0.1"})  # as an env file with every default has it


def test_another_validation_text_is_told(tmp_path: Path) -> None:
    """RESUME refuses it and names both; MODE=resume trains a child run on, from the next window, with its own best/."""
    one, two = held_out(tmp_path), held_out(tmp_path, "two.txt", text=BUNDLED[10000:11000])
    assert train(tmp_path, VALIDATION_DATA=str(one), CHECKPOINT_INTERVAL="1")[0] == 0
    last = newest(tmp_path)
    for changes in ({"VALIDATION_DATA": str(two)}, {"VALIDATION_DATA": None, "VALIDATION_FRACTION": "0.5"}):
        code, said = train(tmp_path, RESUME="auto", **changes)  # type: ignore[arg-type]
        assert code == 2
        if "VALIDATION_FRACTION" not in changes:
            assert str(one) in said
            assert str(two) in said
    one.write_text(one.read_text(encoding="utf-8").replace("e", "o", 1), encoding="utf-8")
    code, said = train(tmp_path, RESUME="auto")
    assert (code, f"was another {one}" in said) == (2, True)
    moved = shutil.copy(held_out(tmp_path), tmp_path / "moved.txt")
    one.unlink()
    code, said = train(tmp_path, RESUME="auto", VALIDATION_DATA=str(moved))
    assert code == 0, said  # known by its hash, wherever it is
    place = {name: str(tmp_path / folder) for name, folder in (("CHECKPOINT_DIR", "checkpoints"), ("RUNS_DIR", "runs"))}
    done = call(
        script("load_checkpoint"), tmp_path, **place, CHECKPOINT_PATH=str(at_step(tmp_path, 8)), MODE="resume", RESUME_TRAINING_STEPS="2",
        VALIDATION_DATA=str(two), DEVICE="cpu"
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"validation is on {two}, before it was on {one}" in done.err
    child = newest(tmp_path)
    assert (child.step, child.run_id != last.run_id) == (10, True)
    assert child.windows_seen == last.windows_seen + 2 * 4
    assert child.data["validation_source"] == str(two)


def test_the_weights_do_not_depend_on_it(tmp_path: Path) -> None:
    one, two = held_out(tmp_path), held_out(tmp_path, "two.txt", text=BUNDLED[10000:11000])
    for name, path in (("a", one), ("b", two)):
        (tmp_path / name).mkdir()
        code, said = train(tmp_path / name, VALIDATION_DATA=str(path), TOKENIZER="byte")
        assert code == 0, said
    assert tensor_bytes(newest(tmp_path / "a")) == tensor_bytes(newest(tmp_path / "b"))
    assert newest(tmp_path / "a").validation_loss != newest(tmp_path / "b").validation_loss


def test_a_record_names_no_home_folder_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train(tmp_path, VALIDATION_DATA=str(held_out(tmp_path)))[0] == 0
    path = at_step(tmp_path, 8)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert ckpt.load(path).data["validation_source"] == str(tmp_path / "held_out.txt")
