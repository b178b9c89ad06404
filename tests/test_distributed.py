"""Several processes under torchrun: the same training as one, exact resumes, one log,
and no process left over when another dies.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import programs
import pytest
import torch
from drive import ROOT, command, environment, logged, newest, tensor_bytes, train
from work import HANGING

from milepost import ckpt, config
from milepost.cli import prepare_processes
from milepost.locks import RunLock
from milepost.runtime.distributed import SINGLE, World
from milepost.runtime.progress import Log, read_metrics

WORKER, LAUNCHER = Path(__file__).with_name("worker.py"), Path(__file__).with_name("launcher.py")


def start(
    folder: Path, processes: int, *, script: Path = ROOT / "training.py", restarts: int = 0, **changes: str
) -> subprocess.Popen[str]:
    """Starts a script under torchrun, in a process group of its own."""
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "OMP_WAIT_POLICY")
    env = {name: os.environ[name] for name in kept if name in os.environ} | {
        "OMP_NUM_THREADS": "2" if processes == 1 else "1"
    }
    torchrun = [sys.executable, str(LAUNCHER), "--standalone", f"--nproc_per_node={processes}"]
    return programs.start(
        [*torchrun, f"--max-restarts={restarts}", str(script)], env=env | environment(folder, **changes), cwd=ROOT,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, starts_others=True,
    )  # fmt: skip


def torchrun(folder: Path, processes: int, **changes: object) -> subprocess.CompletedProcess[str]:
    """The same to its end."""
    process = start(folder, processes, **changes)  # type: ignore[arg-type]
    try:
        out, err = process.communicate(timeout=HANGING)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(folder: Path, split: str) -> dict[int, float]:
    """The losses of the one run in `folder`, by step."""
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return {line["step"]: line["loss"] for line in read_metrics(path) if line["split"] == split}


def said_once(done: subprocess.CompletedProcess[str], text: str) -> bool:
    return (done.stdout + done.stderr).count(text) == 1


# ---------------------------------------------------------------------------------------------------------------------
# One process of torchrun is the plain run.


def test_one_process_of_torchrun_is_the_plain_run_bit_for_bit(tmp_path):
    plain, under = tmp_path / "plain", tmp_path / "torchrun"
    plain.mkdir(), under.mkdir()
    assert command("training.py", plain, OMP_NUM_THREADS="2").returncode == 0
    done = torchrun(under, 1)
    assert done.returncode == 0, done.stderr
    assert tensor_bytes(newest(under)) == tensor_bytes(newest(plain))
    assert logged(under) == logged(plain)


# ---------------------------------------------------------------------------------------------------------------------
# The same training by more.

LEARNS = {
    "TRAINING_STEPS": "200", "DROPOUT": "0", "DTYPE": "float32", "OPTIMIZER": "adamw", "BATCH_SIZE": "12",
    "EVAL_STEPS": "3", "EVAL_INTERVAL": "100",
    "LEARNING_RATE": "3e-3", "SAMPLE_INTERVAL": "0", "LOG_INTERVAL": "20", "ENABLE_CHECKPOINTS": "false",
}  # fmt: skip


def alike(folder: Path, counts: list[int], **changes: str) -> dict[int, Path]:
    """One training of LEARNS by each number of processes; the loss of every logged step is the same to 1e-3."""
    places = {count: folder / str(count) for count in counts}
    for count, place in places.items():
        place.mkdir()
        done = torchrun(place, count, **LEARNS, **changes)
        assert done.returncode == 0, done.stderr
    first = losses(places[counts[0]], "train")
    assert first[200] < first[20] - 0.1  # it learns
    for place in places.values():
        assert losses(place, "train") == pytest.approx(first, abs=1e-3)
        # At step 0 all have the very same weights: what evaluation shares out comes together to the same figure.
        assert losses(place, "validation")[0] == pytest.approx(losses(places[counts[0]], "validation")[0], abs=1e-6)
    return places


def test_two_processes_learn_what_one_does(tmp_path):
    places = alike(tmp_path, [1, 2])
    assert losses(places[2], "validation")[200] == pytest.approx(losses(places[1], "validation")[200], abs=1e-3)


def test_control_processes_with_equal_sequences_learn_something_else(tmp_path, monkeypatch):
    """Control for the test above: if both processes had the first half of the batch, the loss would differ."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    for place in (whole, half):
        place.mkdir()
    assert train(whole, **LEARNS)[0] == 0
    monkeypatch.setattr(World, "share", lambda self, count: slice(0, count // 2))
    assert train(half, **LEARNS)[0] == 0
    assert losses(half, "train")[200] != pytest.approx(losses(whole, "train")[200], abs=1e-3)


@pytest.mark.soak
def test_four_processes_learn_what_one_does(tmp_path):
    alike(tmp_path, [1, 2, 4], GRADIENT_ACCUMULATION_STEPS="2")


@pytest.mark.soak
def test_four_processes_with_sharded_weights_learn_what_one_does(tmp_path):
    alike(tmp_path, [1, 4], DISTRIBUTED="fsdp", GRADIENT_ACCUMULATION_STEPS="2")


# ---------------------------------------------------------------------------------------------------------------------
# Going on.


def without_last(folder: Path, target: Path, step: int) -> None:
    """Put into `target` what a run killed soon after `step` would have left of the run in `folder`."""
    shutil.copytree(folder, target)
    checkpoints = target / "checkpoints"
    for found in [*ckpt.find(checkpoints), *ckpt.find(checkpoints / ckpt.BEST_FOLDER)]:
        if found.step > step:
            shutil.rmtree(found.path) if found.path.is_dir() else found.path.unlink()


def exactly_on(tmp_path: Path, count: int, **changes: str) -> Path:
    """Train with `count` processes, resume a second run from its middle, and compare all bytes; return the first run's
    folder.
    """
    straight, again = tmp_path / "straight", tmp_path / "again"
    straight.mkdir()
    done = torchrun(straight, count, **changes)
    assert done.returncode == 0, done.stderr
    without_last(straight, again, 4)
    assert newest(again).step == 4
    done = torchrun(again, count, RESUME="auto", **changes)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^bit-exact +yes", done.stdout, re.MULTILINE)
    assert "not bit-exact" not in done.stderr
    assert tensor_bytes(newest(again)) == tensor_bytes(newest(straight))
    assert logged(again) == logged(straight)
    return straight


def test_two_processes_resume_exactly_and_one_resumes_inexactly(tmp_path):
    straight = exactly_on(tmp_path, 2, GRADIENT_ACCUMULATION_STEPS="2")
    alone = tmp_path / "alone"
    without_last(straight, alone, 4)
    done = command("training.py", alone, RESUME="auto", GRADIENT_ACCUMULATION_STEPS="2", OMP_NUM_THREADS="1")
    assert done.returncode == 0
    assert "not bit-exact: 1 process, was 2\n" in done.stderr
    record, whole = newest(alone), newest(straight)
    assert record.run_id == whole.run_id
    assert record.windows_seen == whole.windows_seen  # the same rows, in the same order
    assert tensor_bytes(record) != tensor_bytes(whole)  # dropout is drawn by process: the control for the exact resume


def test_sharded_weights_resume_exactly_and_one_process_resumes_from_them(tmp_path):
    straight = exactly_on(tmp_path, 2, DISTRIBUTED="fsdp", OPTIMIZER="muon", GRADIENT_ACCUMULATION_STEPS="2")
    assert newest(straight).layout == "sharded"
    alone = tmp_path / "alone"
    without_last(straight, alone, 4)
    done = command("training.py", alone, RESUME="auto", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "not bit-exact: 1 process, was 2\n" in done.stderr
    assert newest(alone).layout == "sharded"
    assert newest(alone).step == 8


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_four_processes_resume_exactly_and_two_resume_inexactly(tmp_path, engine):
    straight = exactly_on(tmp_path, 4, DISTRIBUTED=engine)
    fewer = tmp_path / "fewer"
    without_last(straight, fewer, 4)
    done = torchrun(fewer, 2, RESUME="auto")
    assert done.returncode == 0, done.stderr
    assert "not bit-exact: 2 processes, was 4\n" in done.stderr
    assert newest(fewer).windows_seen == newest(straight).windows_seen


def test_unsharded_layouts_are_saved_by_one_process_from_sharded_weights(tmp_path):
    """Every update is gathered: the weights equal those of two processes with the whole model, but for rounding."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for place, engine in ((parts, "fsdp"), (whole, "ddp")):
        place.mkdir()
        done = torchrun(place, 2, DISTRIBUTED=engine, CHECKPOINT_LAYOUT="unified", DTYPE="float32", OPTIMIZER="muon")
        assert done.returncode == 0, done.stderr
    one, other = newest(parts), newest(whole)
    assert one.layout == other.layout == "unified"
    assert one.runtime["distributed"] == "fsdp"
    assert tensor_bytes(one).keys() == tensor_bytes(other).keys()
    for name, tensor in one.model_state.items():
        torch.testing.assert_close(tensor, other.model_state[name], atol=2e-4, rtol=1e-3)


def test_a_model_that_does_not_fit_is_sharded(tmp_path):
    fits, parted = tmp_path / "fits", tmp_path / "parted"
    for place, memory in ((fits, 10**9), (parted, 10**5)):
        place.mkdir()
        done = torchrun(place, 2, script=WORKER, WORKER_MEMORY=str(memory), TRAINING_STEPS="2")
        assert done.returncode == 0, done.stderr
    assert newest(fits).runtime["distributed"] == "ddp"
    assert newest(parted).runtime["distributed"] == "fsdp"


# ---------------------------------------------------------------------------------------------------------------------
# Killed, restarted, stopped.


def test_a_killed_process_ends_all_and_the_restart_ends_bit_identical(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    assert torchrun(straight, 2).returncode == 0
    done = torchrun(killed, 2, script=WORKER, restarts=1, RESUME="auto", WORKER_FAULT="1:6")
    assert done.returncode == 0, done.stderr
    # The process that was left saved the last whole step before it ended.
    assert re.search(r"^step +restored +6; 2 more, to 8$", done.stdout, re.MULTILINE)
    assert tensor_bytes(newest(killed)) == tensor_bytes(newest(straight))
    assert logged(killed) == logged(straight)


def test_a_half_done_update_is_not_saved(tmp_path):
    """Processes wait for the directions of the others in the middle of Muon's update."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    assert torchrun(straight, 2, OPTIMIZER="muon").returncode == 0
    done = torchrun(killed, 2, script=WORKER, restarts=1, RESUME="auto", WORKER_FAULT="1:6:update", OPTIMIZER="muon")
    assert done.returncode == 0, done.stderr
    assert "stopped after step 6: step 4 is saved" in done.stderr
    assert tensor_bytes(newest(killed)) == tensor_bytes(newest(straight))
    assert logged(killed) == logged(straight)


@pytest.mark.parametrize(("rank", "left"), [(0, 4), (1, 6)])  # the first saves before it ends; without it nobody does
def test_without_restarts_all_end_and_the_latest_checkpoint_opens(tmp_path, rank, left):
    # Not in the background, where the save of step 4 may not be done when the first process is killed.
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_FAULT=f"{rank}:6", CHECKPOINT_ASYNC="false")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's own
    assert "another process of this training is gone" in done.stderr
    if rank == 1:
        assert "torch.distributed.run --nproc_per_node=2 training.py" in done.stderr  # how to go on
    assert newest(tmp_path).step == left


@pytest.mark.parametrize("late", ["lock", "report"])
def test_a_signal_that_comes_while_a_process_ends_changes_nothing(tmp_path, late):
    """torchrun signals all remaining processes; on a slow computer they have not ended by then."""
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_FAULT="1:6", WORKER_LATE=late)
    assert done.stderr.count("Traceback") == 1, done.stderr  # torchrun's own
    assert done.stderr.count("another process of this training is gone") == 1
    assert newest(tmp_path).step == 6


ENDLESS = {"TRAINING_STEPS": "1000000", "EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0"}


def killed(folder: Path, count: int, random: Random, **changes: str) -> tuple[int, bool]:
    """One of `count` processes that save every step is killed at a random moment;
    returns the step of the newest checkpoint, which is whole, and whether all others noticed the death.
    """
    pids = folder / "pids"
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir()
    before = max((found.step for found in ckpt.find(folder / "checkpoints")), default=0)
    process = start(
        folder,
        count,
        script=WORKER,
        WORKER_PIDS=str(pids),
        RESUME="auto",
        CHECKPOINT_INTERVAL="1",
        **ENDLESS,
        **changes,
    )
    wait_for_step(folder, process, before + 3)
    time.sleep(random.uniform(0, 0.5))  # not to wait for anything: the moment is to be no particular one
    told = max(losses(folder, "train"))
    os.kill(int((pids / str(random.randrange(count))).read_text()), signal.SIGKILL)
    _, err = process.communicate(timeout=HANGING)
    assert process.returncode == 1
    assert all(gone(int(pid.read_text())) for pid in pids.glob("?"))
    noticed = len([*pids.glob("?.code")]) == count - 1  # what torchrun has to kill leaves no exit code
    assert noticed or "forcefully exiting" in err
    record = newest(folder)
    assert record.step >= told - 2  # one save was under way when the next step was told, and the other waits for it
    return record.step, noticed


def killed_in_turn(folder: Path, kills: int, *, count: int, engine: str) -> None:
    """Each of `kills` trainings of `count` processes goes on where the one before was killed."""
    random = Random(engine)
    steps, noticed = zip(*(killed(folder, count, random, DISTRIBUTED=engine) for _ in range(kills)), strict=True)
    assert [*steps] == sorted(set(steps))
    # gloo tells nobody of a death in the moment of a send (CONTROL_TIMEOUT in milepost/runtime/distributed.py): seen
    # once in some thousand kills. Processes that never noticed would fail here each time.
    assert noticed.count(False) <= 1


def gone(pid: int) -> bool:
    """Return whether the process has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_kill_at_any_moment_leaves_a_valid_checkpoint_and_ends_all(tmp_path, engine):
    killed_in_turn(tmp_path, 2, count=2, engine=engine)
    (run,) = (tmp_path / "runs").iterdir()
    trained = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
    assert trained == list(range(1, len(trained) + 1))  # no step twice, none left out


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_kill_of_one_of_four_at_any_moment_leaves_a_valid_checkpoint_and_ends_all(tmp_path, engine):
    killed_in_turn(tmp_path, 12, count=4, engine=engine)


@pytest.mark.parametrize("whom", ["all", "one"])
def test_a_signal_stops_all_after_the_same_step_and_saves_it(tmp_path, whom):
    pids = tmp_path / "pids"
    pids.mkdir()
    process = start(tmp_path, 2, script=WORKER, WORKER_PIDS=str(pids), CHECKPOINT_INTERVAL="0", **ENDLESS)
    wait_for_step(tmp_path, process, 20)
    if whom == "all":
        process.send_signal(signal.SIGTERM)  # torchrun hands it on
    else:
        os.kill(int((pids / "1").read_text()), signal.SIGTERM)
    _, err = process.communicate(timeout=HANGING)
    stopped = re.findall(r"^interrupted after step (\d+): step (\d+) is saved", err, re.MULTILINE)
    assert len(stopped) == 1, err
    assert newest(tmp_path).step == int(stopped[0][0]) == int(stopped[0][1]) >= 20
    assert all(gone(int(pid.read_text())) for pid in pids.glob("?"))
    assert len([*pids.glob("?.code")]) == 2, err  # none had to be killed


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Return when the metrics have reached `step`."""
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):  # not in vain: reading on and on would slow the processes down
            process.wait(0.05)
        for path in (folder / "runs").glob("*/metrics.jsonl"):
            if any(line["step"] >= step for line in read_metrics(path)):
                return
    raise AssertionError(process.communicate()[1])


# ---------------------------------------------------------------------------------------------------------------------
# One voice, and clear refusals.


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_save_that_one_process_gets_makes_all_save_and_continue(tmp_path, rank):
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_SAVE=f"{rank}:5")  # while the sixth step is taken
    assert done.returncode == 0, done.stderr
    assert sorted({each.step for each in ckpt.find(tmp_path / "checkpoints")}) == [4, 6, 8]


def test_only_rank_0_logs_and_threads_are_shared(tmp_path):
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    torchrun_alone = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "training.py",
    ]
    done = subprocess.run(
        torchrun_alone, env=env | environment(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=HANGING
    )
    assert done.returncode == 0, done.stderr
    threads = (
        max(1, len(os.sched_getaffinity(0)) // 2)
        if hasattr(os, "sched_getaffinity")
        else max(1, (os.cpu_count() or 1) // 2)
    )
    assert said_once(done, f"using {threads} threads for each of the 2 processes here")
    for text in ("run 2", "2 processes by ddp, each", "plan: 8 steps", "done: 8 steps", "next: "):
        assert said_once(done, text), text
    assert newest(tmp_path).runtime["threads"] == threads
    (run,) = (tmp_path / "runs").iterdir()
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "restarts would begin at step 0"),
        ({"RESUME": "auto"}, ""),
        ({"RESUME": "latest"}, ""),
        ({"RESUME": "best"}, "restarts would begin at the checkpoint that RESUME names again"),
        ({"RESUME": "auto", "RESUME_STEP": "4"}, "restarts would begin at the checkpoint that RESUME_STEP names again"),
    ],
)
def test_where_torchruns_restarts_would_begin_is_logged_unless_it_is_the_latest(changes, said, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    lines = io.StringIO()
    prepare_processes(config.read(environment(tmp_path, **changes)), Log(lines), World(size=2))
    assert said in lines.getvalue()
    assert ("restarts" in lines.getvalue()) == bool(said)


@pytest.mark.parametrize(("processes", "shares"), [(1, False), (2, True)])
def test_one_thread_is_torchruns_choice_only_for_several_processes(processes, shares, tmp_path, monkeypatch):
    """For a single process torchrun sets no number, so that it is the user's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before, lines = torch.get_num_threads(), io.StringIO()
    try:
        torch.set_num_threads(1)
        world = World(size=2, local_size=processes)
        prepare_processes(config.read(environment(tmp_path)), Log(lines), world)
        share = max(1, len(os.sched_getaffinity(0)) // processes) if shares else 1
        assert torch.get_num_threads() == share
    finally:
        torch.set_num_threads(before)
    assert ("OMP_THREAD_LIMIT=1 keeps it at 1" in lines.getvalue()) == shares


@pytest.mark.parametrize(
    ("changes", "said", "code"),
    [
        (
            {"BATCH_SIZE": "3"},
            "BATCH_SIZE=3 cannot be split evenly between 2 processes: set a multiple of 2, for example 4, or start 1",
            2,
        ),
        ({"MODEL_TYPE": "gtp2"}, "MODEL_TYPE='gtp2' (environment): expected one of bigram, gpt2", 2),
        ({"BLOCK_SIZE": "100000"}, "BLOCK_SIZE=100000 is too long for this text", 4),
    ],
)
def test_a_mistake_is_reported_once(tmp_path, changes, said, code):
    done = torchrun(tmp_path, 2, **changes)
    assert done.returncode == 1  # torchrun's own
    assert said_once(done, said), done.stderr
    assert f"exitcode  : {code}" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_that_another_process_trains_is_refused_once_by_all(tmp_path):
    assert torchrun(tmp_path, 2).returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    lock = RunLock(run, run.name)
    lock.acquire()
    try:
        done = torchrun(tmp_path, 2, RESUME="auto", RESUME_STEP="4")
    finally:
        lock.release()
    assert said_once(done, f"run {run.name} is being trained by process {os.getpid()}"), done.stderr


def test_processes_with_different_settings_do_not_start(tmp_path):
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_OTHER="BATCH_SIZE=8")
    assert done.returncode == 1
    assert re.search(r"rank +: 1 .*\n +exitcode +: 2 ", done.stderr), done.stderr  # a bad configuration there
    assert not (tmp_path / "runs").exists()
    text = tmp_path / "other.txt"
    text.write_text("another text, of another machine\n" * 100)
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_OTHER=f"TRAINING_DATA_SOURCE={text}")
    assert done.returncode == 1
    assert said_once(done, "differs between machines"), done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_incomplete_torchrun_environment_is_refused(tmp_path):
    done = command("training.py", tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    missing = "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
    assert done.stderr == f"error: WORLD_SIZE=2 without a valid {missing}: start with torchrun, or unset WORLD_SIZE\n"


LOAD = ROOT / "scripts" / "load_checkpoint.py"


def test_two_processes_resume_the_run_of_one_and_inference_takes_one_process(tmp_path):
    assert train(tmp_path)[0] == 0
    more = {"MODE": "resume", "RESUME_TRAINING_STEPS": "4", "TRAINING_STEPS": None, "LEARNING_RATE": None}
    done = torchrun(tmp_path, 2, script=LOAD, **more)
    assert done.returncode == 0, done.stderr
    assert newest(tmp_path).step == 12
    assert newest(tmp_path).runtime["processes"] == 2
    done = torchrun(tmp_path, 2, script=LOAD)
    assert said_once(done, "MODE=inference runs in one process: start it without torchrun")


# ---------------------------------------------------------------------------------------------------------------------
# Without any process.


@pytest.mark.parametrize("count", [0, 1, 4, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_shares_make_up_the_whole_in_order_and_differ_by_at_most_one(count, size):
    rows = list(range(count))
    shares = [rows[World(rank=rank, size=size).share(count)] for rank in range(size)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_gets_every_answer_at_once():
    assert SINGLE.is_rank0
    assert SINGLE.any(True)
    assert not SINGLE.any(False)
    assert SINGLE.sum(1.5, 2) == [1.5, 2]
    assert SINGLE.broadcast("word") == "word"
    assert SINGLE.all_gather(3) == [3]
    value = torch.tensor(2.0)
    assert SINGLE.mean(value) is value
    assert SINGLE.on_rank0(lambda: 7) == SINGLE.local_rank0_first(lambda: 7) == 7
    with pytest.raises(KeyError):
        SINGLE.on_rank0(lambda: {}["nothing"])
