"""Mixtures by weight: which source a window comes from is a function, every window is read once, and resumes are exact."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from drive import ROOT, at_step, logged, newest, small_text, tensor_bytes, train
from exactly import resumes_exactly
from script import call, script
from talks import rows, talks_file
from test_distributed import torchrun

from milepost import config
from milepost.run import text as run_text
from milepost.text.batches import Batches
from milepost.text.corpus import open_corpus
from milepost.text.errors import DataError
from milepost.text.mixtures import MixedBatches, cycle_of
from milepost.text.sources import parts_of, with_places

BUNDLED = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")
BLOCK = 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache" / "tokens")


def mixed(
    *, start_step: int = 0, start_window: int = 0, rows: slice = slice(None), cycle: tuple[int, ...] = (3, 1)
) -> MixedBatches:
    """Batches of two texts, of tokens below and from 1000 on."""
    position = {
        "batch_size": 4,
        "accumulation": 2,
        "seed": 7,
        "start_step": start_step,
        "start_window": start_window,
        "rows": rows,
    }
    texts = [np.arange(41), np.arange(1000, 1061)]
    parts = [Batches(text, block_size=BLOCK, **position) for text in texts]  # type: ignore[arg-type]
    return MixedBatches(parts, cycle, **position)  # type: ignore[arg-type]


def sources(batches: MixedBatches, steps: range) -> np.ndarray:
    """The source of each window of the steps."""
    return np.concatenate([(batches.at(step)[0][..., 0] >= 1000).flatten().numpy() for step in steps]).astype(int)


def test_every_cycle_has_the_weights() -> None:
    for cycle in ((3, 1), (1, 1), (700, 301)):
        batches = mixed(cycle=cycle)
        drawn = sources(batches, range(sum(cycle)))  # eight cycles
        assert np.bincount(drawn.reshape(-1, sum(cycle))[0]).tolist() == list(cycle)
        assert np.bincount(drawn).tolist() == [8 * count for count in cycle] == batches.windows_by_source(sum(cycle))
        for step in range(min(5, sum(cycle))):
            assert batches.windows_by_source(step) == np.bincount(drawn[: 8 * step], minlength=2).tolist()
    assert len(set(map(tuple, sources(mixed(), range(40)).reshape(-1, 4)))) == 4  # the rarer one at each of four places


def test_every_window_of_a_source_is_read_once_per_epoch() -> None:
    """As its own batches have them: 9 windows of the first, 14 of the second."""
    batches, alone = mixed(), [Batches(np.arange(41), block_size=BLOCK, batch_size=9, seed=7)]
    x, y = (np.concatenate([batches.at(step)[part].view(-1, BLOCK).numpy() for step in range(30)]) for part in (0, 1))
    first = x[x[:, 0] < 1000]
    for epoch in range(3):
        expected = alone[0].at(epoch)[0].view(-1, BLOCK).numpy()
        assert sorted(map(tuple, first[9 * epoch : 9 * epoch + 9])) == sorted(map(tuple, expected))
    assert (y == x + 1).all()


def test_any_step_is_found_at_once_and_processes_share_it() -> None:
    whole = mixed()
    for step in (0, 5, 10**9):
        resumed = mixed(start_step=step, start_window=8 * step)
        assert (resumed.at(step)[0] == whole.at(step)[0]).all()
        halves = [mixed(rows=rows) for rows in (slice(0, 2), slice(2, 4))]
        for part in (0, 1):
            together = np.concatenate([half.at(step)[part].numpy() for half in halves], axis=1)
            assert (together == whole.at(step)[part].numpy()).all()
        assert whole.divisors(step) == [2, 2] == halves[0].divisors(step)
        assert whole.tokens_in(step) == 8 * BLOCK


def test_weights_become_whole_numbers() -> None:
    assert cycle_of(["*3", "*1"]) == cycle_of(["*0.75", "*0.25"]) == cycle_of(["*6", "*2"]) == (3, 1)
    assert cycle_of(["*0.7", "*1", "*10"]) == (7, 10, 100)
    for weights in (["*0", "*1"], ["*0.0000001", "*1"]):
        with pytest.raises(DataError):
            cycle_of(weights)


def test_a_source_is_taken_apart_and_put_together() -> None:
    source = "/a/b.txt*3,code:/c d/e*0.5,https://h/x?sig=a*3,/g/*.md"
    assert [(part.kind, part.place, part.weight) for part in parts_of(source)] == [
        ("", "/a/b.txt", "*3"), ("code:", "/c d/e", "*0.5"), ("", "https://h/x?sig=a*3", ""), ("", "/g/*.md", ""),
    ]  # fmt: skip
    assert with_places(source, str) == source
    read = config.read({"TRAINING_DATA_SOURCE": "b.txt*3, code:e*1", "PYTHON_DOTENV_DISABLED": "1"}, cwd="/a[1]")
    assert read.training_data_source == "/a[1]/b.txt*3,code:/a[1]/e*1"


def texts(folder: Path) -> str:
    """A mixture of 3 to 1, as it is written."""
    one = small_text(folder, name="one.txt")
    two = rows(folder / "two.jsonl", [{"text": BUNDLED[start : start + 400]} for start in range(8000, 12000, 400)])
    return f"{one}*3,{two}*1"


def test_a_resumed_mixture_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    record, said = resumes_exactly(tmp_path, TRAINING_DATA_SOURCE=texts(tmp_path), GRADIENT_ACCUMULATION_STEPS="2")
    assert record.data["mixture"]["weights"] == ["*3", "*1"]
    assert "mixture of windows: 75.0% from" in said
    assert "windows read: 75.0% from" in said
    assert record.validation_loss is not None


@pytest.mark.parametrize("validation", [None, "held_out.jsonl"])
def test_conversations_are_mixed_with_conversations(tmp_path: Path, validation: str | None) -> None:
    other = rows(tmp_path / "pairs.jsonl", [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(50)])
    source = f"{talks_file(tmp_path)}*2,{other}*1"
    held_out = rows(tmp_path / "held_out.jsonl", [{"prompt": "a?", "completion": "b"}] * 4)
    changes = {"VALIDATION_DATA": str(held_out)} if validation else {}
    record, said = resumes_exactly(tmp_path, TRAINING_DATA_SOURCE=source, BLOCK_SIZE="64", **changes)
    assert "66.7% from" in said
    assert record.validation_loss is not None


def test_two_processes_read_what_one_reads(tmp_path: Path) -> None:
    source, changes = texts(tmp_path), {"DROPOUT": "0", "DTYPE": "float32", "CHECKPOINT_INTERVAL": "4"}
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    one.mkdir()
    assert train(one, TRAINING_DATA_SOURCE=source, **changes)[0] == 0
    two.mkdir()
    done = torchrun(two, 2, TRAINING_DATA_SOURCE=source, **changes)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert ours[2] == pytest.approx(theirs[2], abs=1e-5)  # loss
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(two, 4), again / "checkpoints")
    shutil.copytree(two / "runs", again / "runs")
    assert torchrun(again, 2, TRAINING_DATA_SOURCE=source, RESUME="auto", **changes).returncode == 0
    assert tensor_bytes(newest(again)) == tensor_bytes(newest(two))


def test_other_weights_are_another_text(tmp_path: Path) -> None:
    source = texts(tmp_path)
    assert train(tmp_path, TRAINING_DATA_SOURCE=source, CHECKPOINT_INTERVAL="4")[0] == 0
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=source.replace("*3", "*4"), RESUME="auto")
    assert (code, "is not the text that the checkpoint was trained on" in said) == (2, True)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=source.replace("*3", "").replace("*1", ""), RESUME="auto")
    assert code == 2  # joined one after the other, as without weights


def test_a_list_without_weights_stays_one_text(tmp_path: Path) -> None:
    """The fingerprint of the whole, as before."""
    one, two = small_text(tmp_path, name="a.txt", characters=3000), small_text(tmp_path, name="b.txt", characters=2000)
    assert train(tmp_path, TRAINING_DATA_SOURCE=f"{one},{two}")[0] == 0
    assert "mixture" not in newest(tmp_path).data
    assert newest(tmp_path).data["characters"] == 5000


def test_a_file_that_two_sources_have_is_told(tmp_path: Path) -> None:
    """What one of them holds out, the other trains on."""
    one, two = small_text(tmp_path, name="a.txt"), small_text(tmp_path, name="b.txt")
    mixture = open_corpus(f"{tmp_path / '*.txt'}*2,{one}*1", data_dir=tmp_path)
    assert mixture.skipped == (f"read more than once: {one}",)
    assert open_corpus(f"{one}*2,{two}*1", data_dir=tmp_path).skipped == ()


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    one, two = small_text(tmp_path), talks_file(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("Dear Wren")
    problems = {
        f"{one}*3,{two}*1": "mix texts with texts",
        f"{one}*3,{short}": f"{short} has no weight",
        f"{one}*3": "one source is no mixture",
        f"{one}*3,{one}*0": "leave that source out",
        f"{one}*3,{short}*1": "too long for the smallest source",
    }
    for source, problem in problems.items():
        code, said = train(tmp_path, TRAINING_DATA_SOURCE=source)
        assert (code, problem in said) == (4, True), said


def test_weights_are_for_training_alone(tmp_path: Path) -> None:
    source = texts(tmp_path)
    code, said = train(tmp_path, VALIDATION_DATA=source)
    assert (code, "has weights" in said) == (4, True)
    assert train(tmp_path, TRAINING_DATA_SOURCE=source)[0] == 0
    place = {"CHECKPOINT_DIR": tmp_path / "checkpoints", "CHECKPOINT_PATH": "latest"}
    done = call(script("evaluate_checkpoint"), tmp_path, **place, EVAL_DATA=source)
    assert (done.code, "has weights" in done.err) == (4, True)
    done = call(script("evaluate_checkpoint"), tmp_path, **place)
    assert (done.code, "set EVAL_DATA" in done.err) == (4, True)
    done = call(script("evaluate_checkpoint"), tmp_path, **place, EVAL_DATA=tmp_path / "one.txt")
    assert done.code == 0, done.err


def test_the_record_of_a_mixture_names_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = texts(tmp_path)
    assert train(tmp_path, TRAINING_DATA_SOURCE=source)[0] == 0
    path = at_step(tmp_path, 8)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert newest(tmp_path).data["source"] == source
    assert json.dumps(newest(tmp_path).hyperparameters["TRAINING_DATA_SOURCE"]) == json.dumps(source)
