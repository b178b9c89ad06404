"""Which of several checkpoints RESUME=auto takes, what it says of those that it passes over, and the commands it prints."""

import io
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import programs
import pytest
from drive import ROOT, TINY, environment, newest, tensor_bytes, train
from test_resume_mode import load_checkpoint

import training
from milepost import ckpt, config
from milepost.ckpt.index import Found
from milepost.ckpt.ordering import exact_first, in_order
from milepost.runtime.progress import Log


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """Run A of 8 steps, then run B with another seed and rate; each saved at 4 and 8."""
    folder = tmp_path_factory.mktemp("once")
    assert train(folder)[0] == 0
    assert train(folder, SEED="2", LEARNING_RATE="2e-3")[0] == 0
    return folder


@pytest.fixture
def stopped(once, tmp_path):
    """Both as a crash after step 4 leaves them."""
    folder = tmp_path / "run"
    shutil.copytree(once, folder)
    shutil.rmtree(folder / "checkpoints" / "best")
    for found in ckpt.find(folder / "checkpoints"):
        if found.step == 8:
            found.path.unlink()
    return folder


def of_seed(folder: Path, seed: int, step: int) -> ckpt.Checkpoint:
    """Return the checkpoint of a step of the run with this seed."""
    found = ckpt.find(folder / "checkpoints")
    (path,) = (each.path for each in found if (each.metadata["hyperparameters"]["SEED"], each.step) == (seed, step))
    return ckpt.load(path)


def stopping(monkeypatch, at: int) -> None:
    """Let a signal arrive in the step after `at`."""
    learn = training.training_step

    def step(run, lr):
        if run.state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(run, lr)

    monkeypatch.setattr(training, "training_step", step)


def hint(said: str) -> dict[str, str]:
    """Return the variables of the command that the last line tells to resume with."""
    command = said.splitlines()[-1].partition("resume with: ")[2]
    return dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs.


def test_each_of_several_runs_in_a_folder_is_resumed_by_its_own_command(stopped, once):
    """Run B is newer, and is no beginning for a run of other settings."""
    code, said = train(stopped, RESUME="auto", SEED="1337", LEARNING_RATE="1e-3")
    assert code == 0, said
    first, second = of_seed(once, 1337, 8), of_seed(once, 2, 8)
    assert newest(stopped).run_id == first.run_id
    assert tensor_bytes(newest(stopped)) == tensor_bytes(first)
    (line,) = (line for line in said.splitlines() if line.startswith("taking run "))
    assert f"taking run {first.run_id}" in line
    assert f"run {second.run_id} with LEARNING_RATE=0.002, SEED=2" in line

    code, said = train(stopped, RESUME="auto", SEED="2", LEARNING_RATE="2e-3")
    assert code == 0, said
    assert newest(stopped).run_id == second.run_id
    assert tensor_bytes(newest(stopped)) == tensor_bytes(second)


def test_without_a_run_of_these_settings_the_newest_begins_a_child(stopped, once):
    code, said = train(stopped, RESUME="auto", SEED="3", LEARNING_RATE="1e-3")
    assert code == 0, said
    assert newest(stopped).parent["run_id"] == of_seed(once, 2, 8).run_id
    assert "taking run" not in said


def test_on_a_new_machine_the_run_of_these_settings_comes_from_the_mirror(tmp_path):
    mirror = {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    for seed in ("1337", "2"):
        assert train(tmp_path, SEED=seed, **mirror)[0] == 0
    first = of_seed(tmp_path, 1337, 8)
    for name in ("checkpoints", "runs"):
        shutil.rmtree(tmp_path / name)
    code, said = train(tmp_path, RESUME="auto", SEED="1337", **mirror)
    assert code == 0, said
    assert f"run {first.run_id} is finished" in said
    assert newest(tmp_path).run_id == first.run_id


def test_a_step_is_taken_from_the_run_of_these_settings(stopped, once):
    code, said = train(stopped, RESUME="auto", RESUME_STEP="4", SEED="1337", LEARNING_RATE="1e-3")
    assert code == 0, said
    assert newest(stopped).run_id == of_seed(once, 1337, 8).run_id


def test_other_programs_checkpoints_are_not_preferred():
    """They record no settings, so that none differs."""
    foreign, own = found("theirs.pt", run=None), found("ours.pt", run="A")
    assert exact_first([own, foreign], lambda each: each.run_id is None) == [own, foreign]
    assert exact_first([foreign, own], lambda each: True) == [own, foreign]


# ---------------------------------------------------------------------------------------------------------------------
# What is passed over.


def test_a_newer_checkpoint_without_an_optimizer_is_named(tmp_path):
    code, said = train(tmp_path, CHECKPOINT_LAYOUT="separated", CHECKPOINT_INTERVAL="2")
    assert code == 0, said
    for path in (tmp_path / "checkpoints").rglob("*step0008*-optimizer.pt"):
        path.unlink()
    code, said = train(tmp_path, RESUME="auto")
    assert code == 0, said
    (line,) = (line for line in said.splitlines() if "holds no optimizer state" in line)
    assert "step 8, holds no optimizer state: taking step 6" in line
    assert "holds no optimizer state" not in train(tmp_path, RESUME="auto")[1]  # control: step 8 is whole again


def test_weights_to_start_from_that_a_resume_does_not_use_are_named(stopped, once):
    base = of_seed(once, 1337, 4).path
    code, said = train(stopped, RESUME="auto", INIT_FROM=str(base))
    assert code == 0, said
    expected = f"INIT_FROM is not used: RESUME=auto resumes run {of_seed(once, 1337, 8).run_id}, which began with random weights"
    assert expected in said


def test_they_are_named_too_where_a_path_is_resumed(stopped, once):
    base = of_seed(once, 1337, 4).path
    code, said = train(stopped, RESUME="latest", INIT_FROM=str(base))
    assert code == 0, said
    assert "INIT_FROM is not used: RESUME=latest resumes run " in said
    assert "which began with random weights; RESUME=never starts a new run from it" in said
    assert "INIT_FROM" not in train(stopped, RESUME="latest")[1]


def test_a_run_that_began_from_them_says_so(once, tmp_path, monkeypatch):
    base = of_seed(once, 1337, 4).path
    with monkeypatch.context() as patch:
        stopping(patch, at=4)
        assert train(tmp_path, INIT_FROM=str(base), RESUME="auto")[0] == 130
    code, said = train(tmp_path, INIT_FROM=str(base), RESUME="auto")
    assert code == 0, said
    assert f"which began from {base.name}" in said
    assert newest(tmp_path).step == 8


@pytest.mark.parametrize("whole", ["original", "copy", "best"])
@pytest.mark.parametrize("name", ["auto", "latest"])
def test_a_damaged_name_of_a_save_hides_no_whole_one(name, whole, stopped, once):
    """A list has one of several copies. The copy in best/ is a file of its own, as where there are no hard links."""
    original = of_seed(stopped, 2, 4).path
    copies = {
        "original": original,
        "copy": original.with_name("zz_my_copy.pt"),
        "best": original.parent / "best" / "mine.pt",
    }
    copies["best"].parent.mkdir()
    for path in (copies["copy"], copies["best"]):
        shutil.copy(original, path)
    content = original.read_bytes()
    bad = [path for place, path in copies.items() if place != whole]
    for path in bad:
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    code, said = train(stopped, RESUME=name, SEED="2", LEARNING_RATE="2e-3")
    assert code == 0, said
    assert tensor_bytes(newest(stopped)) == tensor_bytes(of_seed(once, 2, 8))
    assert newest(stopped).run_id == of_seed(once, 2, 8).run_id
    assert all(path.exists() for path in copies.values())


# ---------------------------------------------------------------------------------------------------------------------
# The fallback folder.


def found(name: str, *, run: str | None, number: int | None = None, saved_at: str = "") -> Found:
    """Return a checkpoint that only records its order."""
    values = {"run_id": run, "save_number": number, "saved_at": saved_at, "parts": ["model", "optimizer"]}
    return Found(Path(name), values)


def test_save_numbers_order_a_run_over_two_folders_whatever_the_clock_said():
    """The clock was an hour ahead until step 4 was saved."""
    usual = [
        found("a2", run="A", number=1, saved_at="2026-01-01T13:00"),
        found("a4", run="A", number=2, saved_at="2026-01-01T13:01"),
    ]
    elsewhere = [found("a6", run="A", number=3, saved_at="2026-01-01T12:02")]
    assert [str(each.path) for each in in_order(usual, elsewhere)] == ["a2", "a4", "a6"]
    assert [str(each.path) for each in in_order(elsewhere, usual)] == ["a2", "a4", "a6"]


def test_between_runs_of_two_folders_the_clock_decides_and_within_a_folder_it_does_not():
    usual = [
        found("a", run="A", number=1, saved_at="2026-01-01T13:00"),
        found("b", run="B", number=2, saved_at="2026-01-01T12:10"),
    ]
    elsewhere = [found("c", run="C", number=9, saved_at="2026-01-01T12:00")]
    assert [str(each.path) for each in in_order(usual, elsewhere)] == ["c", "a", "b"]
    assert in_order(usual, []) == usual
    assert in_order([], usual) == usual


@pytest.fixture
def fallen_back(once, tmp_path):
    """Run A whose last step is in the fallback folder, saved after the clock went back, and not in CHECKPOINT_DIR."""
    folder, elsewhere = tmp_path / "run", tmp_path / "fallback"
    shutil.copytree(once, folder)
    shutil.rmtree(folder / "checkpoints" / "best")
    last = of_seed(folder, 1337, 8)
    last.path.unlink()
    elsewhere.mkdir()
    ckpt.save(last, elsewhere, after=last.save_number - 1)
    (path,) = elsewhere.glob("*.pt")
    again = ckpt.load(path)
    path.unlink()
    again.saved_at = "2020-01-01T00:00:00.000000+00:00"
    return folder, ckpt.WRITERS["unified"].write(again, elsewhere, path.stem)


@pytest.mark.parametrize("gone", [False, True])
def test_the_last_step_in_the_fallback_folder_is_copied_where_latest_and_best_look(gone, fallen_back):
    folder, path = fallen_back
    content = path.read_bytes()
    if gone:
        shutil.rmtree(folder / "checkpoints")
    fallback = {"CHECKPOINT_FALLBACK_DIR": str(path.parent)}
    code, said = train(folder, RESUME="auto", SEED="1337", LEARNING_RATE="1e-3", **fallback)
    assert code == 0, said
    assert "is finished: 8 of 8 steps are done" in said
    copy, best = folder / "checkpoints" / path.name, folder / "checkpoints" / "best" / path.name
    assert copy.read_bytes() == best.read_bytes() == path.read_bytes() == content
    code, said = train(folder, RESUME="auto", SEED="1337", LEARNING_RATE="1e-3", **fallback)  # nothing is copied twice
    assert (code, len(list((folder / "checkpoints").rglob(path.name)))) == (0, 2), said


@pytest.mark.parametrize("layout", ["unified", "stepfiles", "directory"])
def test_a_step_in_the_fallback_folder_is_copied_before_training_continues(layout, once, tmp_path):
    elsewhere = tmp_path / "fallback"
    ckpt.save(of_seed(once, 1337, 4), elsewhere, layout=layout)
    fallback = {"CHECKPOINT_FALLBACK_DIR": str(elsewhere), "TRAINING_DATA_SOURCE": None, "CHECKPOINT_INTERVAL": "0"}
    code, said = train(tmp_path, RESUME="auto", **fallback)
    assert code == 0, said
    steps = {each.step for each in ckpt.find(tmp_path / "checkpoints")}
    assert steps == {4, 8}
    assert tensor_bytes(newest(tmp_path)) == tensor_bytes(of_seed(once, 1337, 8))


def test_a_disk_without_room_for_the_next_save_too_gets_no_copy(once, tmp_path, monkeypatch):
    """Room for one checkpoint is that of the next save. There is more once training has begun."""
    elsewhere, free = tmp_path / "fallback", [150_000]
    ckpt.save(of_seed(once, 1337, 4), elsewhere)
    learn = training.training_step

    def step(run, lr):
        free[0] = 10**9
        return learn(run, lr)

    monkeypatch.setattr("milepost.ckpt.saving.free_space", lambda folder: free[0])
    monkeypatch.setattr(training, "training_step", step)
    fallback = {"CHECKPOINT_FALLBACK_DIR": str(elsewhere), "TRAINING_DATA_SOURCE": None}
    code, said = train(tmp_path, RESUME="auto", **fallback)
    assert code == 0, said
    assert "is not copied to" in said
    assert "the disk is full" in said
    assert [each.step for each in ckpt.find(tmp_path / "checkpoints")] == [8]


def test_a_name_that_is_taken_is_left_alone(fallen_back):
    folder, path = fallen_back
    mine = folder / "checkpoints" / path.name
    mine.write_bytes(b"a note of mine")
    code, said = train(
        folder, RESUME="auto", SEED="1337", LEARNING_RATE="1e-3", CHECKPOINT_FALLBACK_DIR=str(path.parent)
    )
    assert code == 0, said
    assert mine.read_bytes() == b"a note of mine"


# ---------------------------------------------------------------------------------------------------------------------
# Printed commands.


def test_the_command_resumes_a_child_beside_an_env_file_of_other_plans(once, tmp_path, monkeypatch):
    """The env file has the plan of the first run, which MODE=resume does not follow, and a step to resume from."""
    plan = {"TRAINING_STEPS": "8", "LEARNING_RATE": "1e-3", "WARMUP_STEPS": "2", "LR_SCHEDULE": "linear"}
    start = of_seed(once, 1337, 8).path
    wanted = {
        "MODE": "resume",
        "CHECKPOINT_PATH": str(start),
        "RESUME_TRAINING_STEPS": "6",
        "RESUME_LEARNING_RATE": "1e-4",
    }
    settings = config.read(environment(tmp_path, **plan | wanted | {"TRAINING_DATA_SOURCE": None}))
    said = io.StringIO()
    with monkeypatch.context() as patch:
        stopping(patch, at=10)
        assert training.guarded(load_checkpoint.main, settings, log=Log(said)) == 130
    child = newest(tmp_path)
    assert child.step == 11
    variables = hint(said.getvalue())
    code, said = train(tmp_path, **plan | {"TRAINING_DATA_SOURCE": None} | variables)
    assert code == 0, said
    assert (newest(tmp_path).step, newest(tmp_path).run_id) == (14, child.run_id)


def test_the_command_repeats_what_was_set_instead_of_the_env_files_values(tmp_path, monkeypatch):
    """The values of the process environment are gone when the command is pasted, and those of the env file are not."""
    file = {"TRAINING_STEPS": "5", "BATCH_SIZE": "2", "EVAL_INTERVAL": "4", "LEARNING_RATE": "1e-3", "N_LAYER": "1"}
    (tmp_path / "my.env").write_text("".join(f"{name}={value}\n" for name, value in file.items()))
    kept = {"EVAL_INTERVAL": None, "ENV_FILE": str(tmp_path / "my.env"), "PYTHON_DOTENV_DISABLED": None}
    with monkeypatch.context() as patch:
        stopping(patch, at=6)
        code, said = train(tmp_path, **kept)
    assert code == 130, said
    variables = hint(said)
    assert variables.items() >= {"TRAINING_STEPS": "8", "BATCH_SIZE": "4", "N_LAYER": "2", "DEVICE": "cpu"}.items()
    assert not {"EVAL_INTERVAL", "LEARNING_RATE", "DROPOUT"} & variables.keys()  # the file has no other value
    bare = dict.fromkeys([*TINY, "TRAINING_DATA_SOURCE"])
    code, said = train(tmp_path, **bare | kept | variables)
    assert code == 0, said
    assert newest(tmp_path).step == 8
    assert newest(tmp_path).parent is None  # no child


def test_the_command_names_the_step_where_one_is_set(once, tmp_path, monkeypatch):
    shutil.copytree(once, tmp_path / "run")
    own = {"SEED": "1337", "LEARNING_RATE": "1e-3", "RESUME_STEP": "4"}
    with monkeypatch.context() as patch:
        stopping(patch, at=6)
        code, said = train(tmp_path / "run", RESUME="auto", **own)
    assert code == 130
    variables = hint(said)
    assert (variables["RESUME_STEP"], variables["DEVICE"]) == ("7", "cpu")
    code, said = train(tmp_path / "run", **own | variables)
    assert code == 0, said
    assert newest(tmp_path / "run").step == 8
    assert tensor_bytes(newest(tmp_path / "run")) == tensor_bytes(of_seed(once, 1337, 8))


def test_a_run_that_stops_before_it_saves_names_the_checkpoint_that_it_resumed_from(once, tmp_path, monkeypatch):
    """A checkpoint in another folder, and an earlier step than the latest."""
    shutil.copytree(once, tmp_path / "run")
    start = of_seed(tmp_path / "run", 1337, 4).path

    def fails(run, lr):
        raise MemoryError("none left")

    monkeypatch.setattr(training, "training_step", fails)
    for folder in (tmp_path, tmp_path / "run"):
        code, said = train(folder, RESUME=str(start), CHECKPOINT_KEEP_BEST="0")
        assert code == 1
        (line,) = (line for line in said.splitlines() if line.startswith("stopped after step 4"))
        assert f"RESUME={shlex.quote(str(start))} " in line


def test_a_finished_run_names_the_folder_of_its_files(once):
    code, said = train(once, RESUME="auto", SEED="2", LEARNING_RATE="2e-3")  # writes nothing: it is finished
    assert code == 0
    command = said.partition("To train more: ")[2]
    assert f"RUNS_DIR={shlex.quote(str(once / 'runs'))} " in command


def test_the_command_for_another_text_names_its_column(tmp_path):
    rows = [{"text": f"line {number} of many words", "body": f"words {number}, many"} for number in range(200)]
    rows[0]["text"] += ", all"
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"TRAINING_DATA_SOURCE": str(text)}
    assert train(tmp_path, **source)[0] == 0
    code, said = train(tmp_path, RESUME="auto", TEXT_FIELD="body", **source)
    assert code == 2
    command = said.split("as a run of its own: ")[1].strip()
    assert "TEXT_FIELD=body" in shlex.split(command)
    env = programs.LEAST | {"PYTHON_DOTENV_DISABLED": "1", "RESUME_TRAINING_STEPS": "0"}
    done = programs.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^data position +reset", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("script", ["training.py", "load_checkpoint.py"])
def test_a_text_that_was_moved_is_asked_for_and_then_known(script, stopped, once):
    own = {"SEED": "1337", "LEARNING_RATE": "1e-3"}
    (stopped / "letters.txt").rename(stopped / "moved.txt")
    for found in ckpt.find(stopped / "checkpoints"):  # they name the text of `once`
        record = ckpt.load(found.path)
        record.hyperparameters["TRAINING_DATA_SOURCE"] = record.data["source"] = str(stopped / "letters.txt")
        place, stem = found.path.parent, found.path.stem
        found.path.unlink()
        ckpt.WRITERS["unified"].write(record, place, stem)
    gone = {"TRAINING_DATA_SOURCE": None, **(own if script == "training.py" else {})}
    changes = {"RESUME": "auto"} if script == "training.py" else {"MODE": "resume", "RESUME_TRAINING_STEPS": "0"}
    main = training.main if script == "training.py" else load_checkpoint.main

    def call(**more):
        said, values = io.StringIO(), environment(stopped, **dict.fromkeys(TINY) | gone | changes | more)
        (stopped / "letters.txt").unlink(missing_ok=True)  # which `environment` writes
        return training.guarded(main, config.read(values), log=Log(said)), said.getvalue()

    code, said = call()
    assert code == 4
    assert "set TRAINING_DATA_SOURCE to it" in said
    code, said = call(TRAINING_DATA_SOURCE=str(stopped / "moved.txt"))
    assert code == 0, said


def test_weights_whose_optimizers_are_damaged_start_a_new_run_as_told(tmp_path):
    assert train(tmp_path, CHECKPOINT_LAYOUT="separated", CHECKPOINT_KEEP_BEST="0")[0] == 0
    for path in (tmp_path / "checkpoints").glob("*-optimizer.pt"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    code, said = train(tmp_path, RESUME="auto")
    assert code == 3
    assert "RESUME=never INIT_FROM=latest" in said
    code, said = train(tmp_path, RESUME="never", INIT_FROM="latest")
    assert code == 0, said
    assert newest(tmp_path).parent["step"] == 8
