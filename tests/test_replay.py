"""A step taken twice finds faults of a device, and a save finds what changed in memory since the step."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_faults import KINDS, flip, nothing, product
from drive import environment, logged, newest, tensor_bytes, train
from test_distributed import WORKER, torchrun

import training
from milepost import ckpt, config
from milepost.ckpt.record import named_tensors
from milepost.ckpt.tensors import digest
from milepost.ckpt.writer import Writer
from milepost.run import Run, checked, fresh
from milepost.runtime import digests as digests_file
from milepost.runtime import hardware
from milepost.runtime.digests import differing, digests
from milepost.runtime.errors import DeviceFaultError
from milepost.runtime.progress import Log

FAULT = 7
SETTINGS: dict[str, dict[str, str]] = {
    "adamw": {"OPTIMIZER": "adamw"},
    "muon": {"OPTIMIZER": "muon"},
    "bfloat16, two micro-batches": {"DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "2"},
    "TTT": {"TTT_LAYERS": "0"},
    "bigram": {"MODEL_TYPE": "bigram", "N_LAYER": "", "N_HEAD": "", "N_EMBD": "", "OPTIMIZER": "adamw", "DROPOUT": ""},
}


def new_run(folder: Path, **changes: str) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    values = environment(folder, ENABLE_CHECKPOINTS="false", REPLAY_CHECK_INTERVAL="1", **changes)
    return fresh(config.read({name: value for name, value in values.items() if value}), Log())


def bits(run: Run) -> str:
    """The sha256 of everything that a resume needs, by other means than the replay's own digests."""
    return digest(run.tensors()) + str(run.state.step)


class Passes:
    """A step that has a fault in one of its passes, and remembers what each pass left."""

    def __init__(self, run: Run, kind: Any, *, odd: int, rng: random.Random) -> None:
        self.run, self.kind, self.odd, self.rng, self.left = run, kind, odd, rng, []

    def __call__(self) -> dict[str, torch.Tensor]:
        number = len(self.left) + 1
        self.left.append("none")
        if number == self.odd:
            with self.kind(self.run, self.rng):
                metrics = training.training_step(self.run, 1e-3)
        else:
            metrics = training.training_step(self.run, 1e-3)
        self.left[-1] = bits(self.run) + digest(metrics)
        return metrics


def outcome(run: Run, kind: Any, rng: random.Random) -> str:
    """Put a fault into a pass of the run's next step; return whether it was caught, or had no effect on any bit."""
    before, step = bits(run), Passes(run, kind, odd=rng.choice((1, 2)), rng=rng)
    try:
        checked(run, step)
    except DeviceFaultError as error:
        found = error.odd_pass, len(step.left), bits(run)
    else:
        found = None
    if found:
        assert found == (step.odd, 3, before)  # a third pass tells which was odd, and the step was not taken
        return "caught"
    assert step.left[0] == step.left[1], f"{kind.__name__} was not caught"
    return "without effect"


def faults(folder: Path, count: int, *, seed: int = 0) -> Counter[tuple[str, str]]:
    """Put `count` faults into as many steps of short trainings; return how they went, by kind."""
    rng, runs = random.Random(seed), [new_run(folder / name, **changes) for name, changes in SETTINGS.items()]
    found: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        run = rng.choice(runs[:-1] if kind in (product, nothing) else runs)  # a bigram computes no products
        for _ in range(rng.randrange(3)):
            checked(run, partial(training.training_step, run, 1e-3))
        found[kind.__name__, outcome(run, kind, rng)] += 1
    return found


def clean_steps(folder: Path, count: int) -> int:
    """Take `count` steps twice, of short trainings; return how many there were. Raises if one is called unequal."""
    runs = [new_run(folder / name, **changes) for name, changes in SETTINGS.items()]
    for number in range(count):
        checked(runs[number % len(runs)], partial(training.training_step, runs[number % len(runs)], 1e-3))
    return sum(run.state.step for run in runs)


def test_faults_in_one_pass_are_caught(tmp_path):
    found = faults(tmp_path, 28)
    for kind in KINDS:
        assert found[kind.__name__, "caught"], kind.__name__
    # A flipped bit may vanish in a rounding, a dropped activation or another token's place; no wrong product may.
    for kind in ("weight", "product", "nothing", "moment"):
        assert not found[kind, "without effect"]


def test_steps_without_a_fault_are_never_called_unequal(tmp_path):
    assert clean_steps(tmp_path, 50) == 50


def test_a_step_is_taken_twice_at_the_interval_and_never_at_0(tmp_path, monkeypatch):
    taken: list[int] = []
    plain = training.training_step
    monkeypatch.setattr(
        training, "training_step", lambda run, lr: (taken.append(run.state.step + 1), plain(run, lr))[1]
    )
    for interval, twice in (("0", []), ("3", [3, 6]), ("8", [8]), ("1000", [])):
        (tmp_path / interval).mkdir()
        taken.clear()
        assert train(tmp_path / interval, REPLAY_CHECK_INTERVAL=interval)[0] == 0
        assert taken == sorted([*range(1, 9), *twice])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_interval_changes_no_bit(name, tmp_path):
    """Weights, moments and figures; the default settings of a test have dropout."""
    results = []
    for interval in ("0", "1", "3"):
        folder = tmp_path / interval
        folder.mkdir()
        values = {variable: value or None for variable, value in SETTINGS[name].items()}
        assert train(folder, REPLAY_CHECK_INTERVAL=interval, **values)[0] == 0
        results.append((tensor_bytes(newest(folder)), logged(folder)))
    assert results[0] == results[1] == results[2]


def test_the_interval_changes_no_bit_of_adapters(tmp_path):
    base, results = tmp_path / "base", []
    base.mkdir()
    assert train(base)[0] == 0
    for interval in ("0", "1"):
        folder = tmp_path / interval
        folder.mkdir()
        values = {"INIT_FROM": str(ckpt.latest(ckpt.find(base / "checkpoints")).path), "LORA_RANK": "2"}
        assert train(folder, REPLAY_CHECK_INTERVAL=interval, LORA_DROPOUT="0.1", **values)[0] == 0
        results.append((tensor_bytes(newest(folder)), logged(folder)))
    assert results[0] == results[1]


def faulty_once(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the first pass of a step compute wrong products."""
    plain, done = training.training_step, []

    def learn(run: Run, lr: float) -> dict[str, torch.Tensor]:
        if run.state.step + 1 != step or done:
            return plain(run, lr)
        done.append(True)
        with product(run, random.Random(0)):
            return plain(run, lr)

    monkeypatch.setattr(training, "training_step", learn)


def steps_saved(folder: Path) -> list[int]:
    return sorted({found.step for found in ckpt.find(folder / "checkpoints")})


def test_an_unequal_step_ends_the_training_and_names_the_last_checkpoint(tmp_path, monkeypatch):
    faulty_once(monkeypatch, 6)
    code, said = train(tmp_path, REPLAY_CHECK_INTERVAL="2", CHECKPOINT_INTERVAL="1")
    assert code == FAULT
    assert "step 6 was taken twice" in said
    assert "pass 1 was odd" in said
    assert "step 5 is saved in" in said  # with the command that resumes from it
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 5]


def test_control_without_a_replay_the_fault_is_saved(tmp_path, monkeypatch):
    faulty_once(monkeypatch, 6)
    code, _ = train(tmp_path, REPLAY_CHECK_INTERVAL="0", CHECKPOINT_INTERVAL="1")
    assert code == 0
    assert steps_saved(tmp_path) == list(range(1, 9))


def test_the_run_resumes_exactly_after_a_fault(tmp_path, monkeypatch):
    straight, faulty = tmp_path / "straight", tmp_path / "faulty"
    straight.mkdir(), faulty.mkdir()
    assert train(straight)[0] == 0
    with monkeypatch.context() as patch:
        faulty_once(patch, 6)
        assert train(faulty, REPLAY_CHECK_INTERVAL="1")[0] == FAULT
    assert train(faulty, RESUME="auto")[0] == 0
    assert tensor_bytes(newest(faulty)) == tensor_bytes(newest(straight))


def test_equal_steps_that_need_not_be_equal_are_not_compared(tmp_path, monkeypatch):
    faulty_once(monkeypatch, 6)
    code, said = train(tmp_path, REPLAY_CHECK_INTERVAL="1", DETERMINISTIC="false")
    assert code == 0
    assert "no step is taken twice to find faults of the device, because DETERMINISTIC=false" in " ".join(said.split())


def test_without_memory_for_a_copy_no_step_is_taken_twice(tmp_path, monkeypatch):
    run, said, passes = new_run(tmp_path), [], []
    run.log = said.append  # type: ignore[assignment]

    def step() -> dict[str, torch.Tensor]:
        passes.append(run.state.step)
        return training.training_step(run, 1e-3)

    for free in (30_000, 30_000, 300_000_000, None):
        monkeypatch.setattr(hardware, "free_main_memory", lambda free=free: free)
        checked(run, step)
    assert passes == [0, 1, 2, 2, 3, 3]
    assert len(said) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Between a step and its save.


def flipped_in_evaluation(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Flip one bit of a weight or a moment while the run is evaluated."""
    plain = training.evaluate

    def changed(run: Run, stop: Any) -> float | None:
        if run.state.step == step:
            moments = {name: value for name, value in run.tensors().items() if name[0].isdigit()}
            flip(run.model.wte.weight if what == "weight" else moments["0.exp_avg"], random.Random(0))
        return plain(run, stop)

    monkeypatch.setattr(training, "evaluate", changed)


def flipped_in_copy(monkeypatch: pytest.MonkeyPatch, step: int, what: str) -> None:
    """Flip one bit of the copy that is written in the background."""
    plain = Writer.submit

    def submit(self: Writer, record: ckpt.Checkpoint, job: Callable[[ckpt.Checkpoint], None]) -> None:
        def changed(copy: ckpt.Checkpoint) -> None:
            if record.step == step:
                tensors = named_tensors(copy)
                flip(tensors["wte.weight" if what == "weight" else "0.exp_avg"], random.Random(0))
            job(copy)

        plain(self, record, changed)

    monkeypatch.setattr(Writer, "submit", submit)


@pytest.mark.parametrize("place", [flipped_in_evaluation, flipped_in_copy])
@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("layout", ["unified", "separated"])
def test_a_bit_that_flips_before_the_save_is_not_saved(layout, what, place, tmp_path, monkeypatch):
    values = {"OPTIMIZER": "adamw", "CHECKPOINT_LAYOUT": layout, "REPLAY_CHECK_INTERVAL": "0"}
    place(monkeypatch, 8, what)
    code, said = train(tmp_path, **values)
    assert code == FAULT
    assert ("wte.weight" if what == "weight" else "0.exp_avg") + " changed in memory" in said
    assert "step 4 is saved in" in said
    assert steps_saved(tmp_path) == [4]


def test_control_a_bit_that_flips_before_the_step_is_saved(tmp_path, monkeypatch):
    """It is the step's own state then: nothing can tell."""
    plain = training.training_step

    def learn(run: Run, lr: float) -> dict[str, torch.Tensor]:
        if run.state.step == 6:
            flip(run.model.wte.weight, random.Random(0), low=20)
        return plain(run, lr)

    monkeypatch.setattr(training, "training_step", learn)
    assert train(tmp_path, REPLAY_CHECK_INTERVAL="0")[0] == 0
    assert steps_saved(tmp_path) == [4, 8]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: all stop together, whichever of them erred.


@pytest.mark.parametrize(
    ("engine", "fault", "last"),
    [
        ("ddp", "1:6:batch", 4),
        ("fsdp", "1:6:batch", 4),
        ("ddp", "1:5:weight", 4),  # for good, before the step that is taken twice: the processes are compared after it
        ("ddp", "0:8:evaluation", 4),
        ("fsdp", "1:8:evaluation", 4),
    ],
)
def test_a_fault_in_one_process_stops_all_before_anything_is_saved(engine, fault, last, tmp_path):
    values = {"DISTRIBUTED": engine, "REPLAY_CHECK_INTERVAL": "6", "CHECKPOINT_INTERVAL": "4"}
    done = torchrun(tmp_path, 2, script=WORKER, WORKER_FLIP=fault, **values)
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr, done.stderr
    assert f"step {last} is saved in" in done.stderr
    assert steps_saved(tmp_path) == [4]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_interval_changes_no_bit_with_several_processes(engine, tmp_path):
    results = []
    for interval in ("0", "2"):
        folder = tmp_path / interval
        folder.mkdir()
        done = torchrun(folder, 2, DISTRIBUTED=engine, REPLAY_CHECK_INTERVAL=interval)
        assert done.returncode == 0, done.stderr
        results.append((tensor_bytes(newest(folder)), logged(folder)))
    assert results[0] == results[1]


# ---------------------------------------------------------------------------------------------------------------------
# Digests.

SIZES = (0, 1, 2, 3, 1000, 65535, 65536, 2 * 65536, 2 * 65536 + 1, 5 * 65536 + 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_digest_is_the_same_sum_on_a_device(dtype, monkeypatch):
    tensors = {str(size): (torch.randn(size) * 99).to(dtype) for size in SIZES}
    tensors |= {"scalar": torch.tensor(3.0).to(dtype), "turned": torch.randn(300, 70).to(dtype).T}
    tensors["odd start"] = torch.randn(1001).to(dtype)[1:]
    here = digests(tensors)
    monkeypatch.setattr(
        digests_file, "_on_cpu", lambda words: digests_file._on_device(torch.from_numpy(words.view(np.int64)))
    )
    assert digests(tensors) == here


def test_a_digest_changes_with_every_bit_and_with_the_order():
    rng = random.Random(0)
    whole = torch.randn(3 * 65536 + 1)
    before = digests({"a": whole})
    for _ in range(300):
        changed = whole.clone()
        flip(changed, rng)
        assert digests({"a": changed}) != before
    swapped = whole.clone()
    swapped[[5, 70000]] = swapped[[70000, 5]]
    assert digests({"a": swapped}) != before
    assert digests({"a": whole.clone()}) == before  # control


def test_differing_names_what_only_one_has():
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b", "c"]


@pytest.mark.soak
def test_many_faults_and_many_clean_steps(tmp_path):
    found = faults(tmp_path / "faults", 300, seed=1)
    print(dict(sorted(found.items())))
    assert sum(found.values()) == 300
    assert clean_steps(tmp_path / "clean", 500) == 500
