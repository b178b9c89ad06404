"""`import milepost`: the Python interface of docs/python.md."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from drive import ROOT, TINY, small_text, tensor_bytes, train
from records import FULL, record

import milepost
from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.config import VARIABLES, ConfigError
from milepost.locks import RunLock

SETTINGS = {name.lower(): value for name, value in TINY.items()}


def settings(folder: Path, **changes):
    places = {"checkpoint_dir": folder / "checkpoints", "runs_dir": folder / "runs", "enable_checkpoints": True}
    return SETTINGS | places | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return folder, milepost.train(**settings(folder, training_data_source=small_text(folder)))


def test_importing_the_package_imports_neither_torch_nor_the_settings():
    code = (
        "import sys, milepost; print([name for name in ('torch', 'dotenv', 'milepost.config') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_interface_is_what_the_page_lists():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert {name.split("(")[0] for name in re.findall(r"^\| `(\w+\()", page, re.MULTILINE)} == set(milepost.__all__)
    assert set(milepost.__all__) <= set(dir(milepost))
    with pytest.raises(AttributeError):
        _ = milepost.no_such_name


def test_a_training_is_the_one_of_the_script(trained, tmp_path):
    """The same settings as keywords and as variables give the same tensors."""
    folder, run = trained
    assert train(tmp_path)[0] == 0
    here, there = (
        milepost.load("latest", folder=folder / "checkpoints"),
        ckpt.load(milepost.latest(tmp_path / "checkpoints")),
    )
    assert tensor_bytes(here) == tensor_bytes(there)
    assert run.state.step == here.step == int(TINY["TRAINING_STEPS"])
    other = milepost.load("latest", folder=folder / "checkpoints")
    other.model_state = {name: tensor + 1 for name, tensor in other.model_state.items()}
    assert tensor_bytes(other) != tensor_bytes(there)  # the control


def test_every_mistake_is_raised_at_once():
    with pytest.raises(ConfigError) as caught:
        milepost.train(model_tpye="gpt2", batch_size=0, TRAINING_STEPS=3)
    problems = caught.value.problems
    assert len(problems) == 3
    assert any("model_tpye" in problem and "model_type" in problem for problem in problems)
    assert any("BATCH_SIZE" in problem for problem in problems)


def test_every_variable_is_a_keyword_and_the_environment_is_not_read(monkeypatch):
    from milepost.api import settings_of

    monkeypatch.setenv("SEED", "4")
    assert settings_of().seed == VARIABLES["SEED"].default
    assert settings_of(seed=5, stop=["a", "b"], prompt=None, dropout=0.5).stop == ("a", "b")


def test_a_setting_without_effect_is_not_passed_over(trained, capsys, tmp_path):
    """train() logs it, as the script does; generate() refuses it, as it does one that the checkpoint contradicts."""
    folder, _ = trained
    place = {"checkpoint_dir": folder / "checkpoints", "max_new_tokens": 3}
    with pytest.raises(ConfigError, match="checkpoint_path, training_steps: generate does not use this: leave it out"):
        milepost.generate("latest", checkpoint_path="x", training_steps=3, **place)
    with pytest.raises(ConfigError, match=r"N_HEAD=3 \(argument\): the checkpoint has \d; unset N_HEAD"):
        milepost.generate("latest", n_head=3, **place)
    assert len(milepost.generate("latest", sample_seed=1, training_steps=None, **place)) > 0
    capsys.readouterr()
    milepost.train(training_steps=1, runs_dir=tmp_path, mode="resume", max_new_tokens=3)
    said = " ".join(capsys.readouterr().err.split())
    assert "not used by training.py: MODE=resume (argument), MAX_NEW_TOKENS=3 (argument); RESUME=auto resumes" in said


def test_a_mistake_names_the_argument(tmp_path):
    from milepost.api import DataError, settings_of

    with pytest.raises(ConfigError, match=r"BATCH_SIZE='0' \(argument\): expected a whole number at least 1"):
        settings_of(batch_size=0)
    for value in (["a.txt", "b.txt"], b"a.txt", {"a": 1}):
        with pytest.raises(
            ConfigError, match=r"training_data_source: expected text.*; several values are one text, joined"
        ):
            settings_of(training_data_source=value)
    with pytest.raises(DataError, match="does not exist"):
        milepost.train(training_data_source=tmp_path / "none.txt", runs_dir=tmp_path)


def test_values_of_python_mean_what_they_are_in_python():
    """A string to stop at is no JSON and has no escapes of a shell; a number may be one of numpy or torch."""
    from milepost.api import settings_of

    for text in ("[", '["a"]', "a\\nb", "\n", "[INST]"):
        assert settings_of(stop=text).stop == (text,)
    assert settings_of(stop="").stop == settings_of(stop=None).stop == settings_of(stop=[]).stop == ()
    numbers = settings_of(seed=np.int64(5), dropout=np.float32(0.5), top_k=torch.tensor(3), stream=np.bool_(False))
    assert (numbers.seed, numbers.dropout, numbers.top_k, numbers.stream) == (5, 0.5, 3, False)
    with pytest.raises(ConfigError, match="SEED"):
        settings_of(seed=np.float64(1.5))


def test_checkpoints_are_looked_for_where_train_saves_them(trained, monkeypatch, tmp_path):
    from milepost.api import settings_of

    monkeypatch.chdir(tmp_path)
    assert settings_of().checkpoint_dir == str(ROOT / "checkpoints")
    monkeypatch.setattr("milepost.config.resolve.base_folder", lambda: trained[0])
    assert milepost.load("latest").step == milepost.find()[-1].step == int(TINY["TRAINING_STEPS"])


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_paths_are_strings_or_path_objects(kind, trained):
    folder = trained[0] / "checkpoints"
    path = milepost.latest(kind(folder))
    assert milepost.load(kind(path), optimizer=False).optimizer_state is None
    assert milepost.verify(kind(path)) == []
    assert [found.step for found in milepost.find(kind(folder))][-1] == milepost.load(path).step


def test_what_find_lists_is_a_checkpoint(trained):
    found = milepost.find(trained[0] / "checkpoints")[-1]
    assert milepost.load(found).step == found.step
    assert milepost.verify(found) == []


WRONG = {
    "none": None, "number": 3, "boolean": True, "bytes": b"x", "list": [], "dictionary": {}, "object": object(),
    "array": np.arange(2),
}  # fmt: skip
NO_PATH = WRONG | {"empty": "", "null": "a\0b"}


@pytest.mark.parametrize("kind", NO_PATH)
def test_a_path_of_the_wrong_kind_is_refused_by_the_name_of_its_argument(kind, trained):
    value, path, made = NO_PATH[kind], milepost.latest(trained[0] / "checkpoints"), record(3, **FULL)
    for call in (milepost.load, milepost.verify, milepost.generate, milepost.convert, milepost.save):
        with pytest.raises(ConfigError, match="checkpoint: expected "):
            call(value, **{"layout": "directory"} if call is milepost.convert else {})
    in_folder = [
        milepost.find,
        milepost.latest,
        milepost.best,
        lambda folder: milepost.prune(folder, keep_last=1),
        lambda folder: milepost.load("latest", folder=folder),
        lambda folder: milepost.save(made, folder),
        lambda folder: milepost.convert(path, "directory", folder=folder),
    ]
    for call in in_folder if kind != "none" else []:  # None is the default
        with pytest.raises(ConfigError, match="folder: expected a path"):
            call(value)
    assert not list(path.parent.glob("*/manifest.json"))


@pytest.mark.parametrize("kind", WRONG)
def test_a_value_of_the_wrong_kind_is_refused_by_the_name_of_its_argument(kind, trained, tmp_path):
    value, path = WRONG[kind], milepost.latest(trained[0] / "checkpoints")
    with pytest.raises(ConfigError, match="prompt: expected text, not"):
        milepost.generate(path, value)
    for call in (lambda: milepost.train(seed=value), lambda: milepost.prune(tmp_path, keep_last=value)):
        if kind not in ("none", "number"):
            with pytest.raises(ConfigError, match=r"(?i)seed|keep_last"):
                call()


@pytest.mark.parametrize("layout", [None, [], {}, 3, "zip"], ids=repr)
def test_a_layout_of_any_kind_is_refused(layout, trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"layout.*expected one of unified"):
        milepost.save(record(3, **FULL), tmp_path, layout=layout)
    with pytest.raises(ConfigError, match=r"layout.*expected one of unified"):
        milepost.convert(milepost.latest(trained[0] / "checkpoints"), layout, folder=tmp_path)


def test_a_run_that_is_trained_is_left_alone_and_the_others_are_pruned(tmp_path, capsys):
    runs = ("a-first", "b-second", "c-third")
    for run_id in runs:
        for step in (1, 2):
            made = record(step, **FULL)
            made.run_id = run_id
            milepost.save(made, tmp_path)
    lock = RunLock(tmp_path, "b-second")
    lock.acquire()
    try:
        deleted = milepost.prune(tmp_path, keep_last=1)
    finally:
        lock.release()
    assert len(deleted) == 2
    left = [(found.run_id, found.step) for found in milepost.find(tmp_path)]
    assert sorted(left) == [("a-first", 2), ("b-second", 1), ("b-second", 2), ("c-third", 2)]
    assert "left alone: " in capsys.readouterr().err


def test_a_policy_takes_what_its_variables_take(tmp_path):
    for step in (1, 2, 3, 4):
        milepost.save(record(step, **FULL), tmp_path)
    deleted = milepost.prune(tmp_path, keep_last="2", keep_every="2")
    assert [int(re.search(r"step(\d+)", path.name)[1]) for path in deleted] == [1]
    for values in ({"keep_last": 1.5}, {"keep_last": 1, "keep_every": -1}, {"keep_last": None}):
        with pytest.raises(ConfigError):
            milepost.prune(tmp_path, **values)
    assert [found.step for found in milepost.find(tmp_path)] == [2, 3, 4]


def test_texts_to_stop_at_are_texts():
    from milepost.api import settings_of

    for value in (b"x", [b"x"], {"a": 1}, {"a"}, object()):
        with pytest.raises(ConfigError, match="stop: expected text or a list of texts, not"):
            settings_of(stop=value)


def test_a_training_in_a_thread_is_that_of_the_main_thread(trained, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        text = small_text(tmp_path)
        run = pool.submit(milepost.train, **settings(tmp_path, training_data_source=text)).result()
    assert run.state.validation_loss == trained[1].state.validation_loss
    there, here = (milepost.load("latest", folder=folder / "checkpoints") for folder in (trained[0], tmp_path))
    assert tensor_bytes(there) == tensor_bytes(here)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_is_no_address_and_may_lie_in_the_home_folder(trained, monkeypatch, tmp_path):
    """An address made a folder called `file:` in the current one, as `~` made one called `~`; a search there found nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made, address = record(3, **FULL), f"file://{tmp_path}/mirror"
    calls = [milepost.find, milepost.latest, milepost.best, lambda folder: milepost.save(made, folder)]
    for call in [*calls, lambda folder: milepost.prune(folder, keep_last=1)]:
        with pytest.raises(ConfigError, match="expected a folder here, not a mirror"):
            call(address)
    with pytest.raises(ConfigError, match="folder: needed for a checkpoint of a mirror"):
        milepost.convert(f"{address}/latest", "directory")
    assert list(tmp_path.iterdir()) == []
    path = milepost.save(made, "~/mine")
    assert path.parent == tmp_path / "home" / "mine"
    assert milepost.latest("~/mine") == milepost.find("~/mine")[0].path == path


def test_a_device_that_is_absent_is_an_error_of_the_interface(trained):
    from milepost.api import DeviceError

    if torch.backends.mps.is_available():
        pytest.skip("it has the device")
    with pytest.raises(DeviceError, match="has no mps device"):
        milepost.generate("latest", device="mps", checkpoint_dir=trained[0] / "checkpoints")


def test_generated_text_is_a_function_of_the_seed(trained):
    folder, _ = trained
    path = milepost.best(folder / "checkpoints")
    words = {"max_new_tokens": 20, "device": "cpu"}
    one, same, other = (milepost.generate(path, "a", sample_seed=seed, **words) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) == 20
    assert milepost.generate(milepost.load(path), "a", sample_seed=1, **words) == one


def test_a_conversion_holds_the_same_tensors(trained, tmp_path):
    path = milepost.latest(trained[0] / "checkpoints")
    target = milepost.convert(path, "directory", folder=tmp_path / "converted").target
    assert tensor_bytes(milepost.load(target)) == tensor_bytes(milepost.load(path))
    with pytest.raises(ConfigError, match="unified"):
        milepost.convert(path, "zip")


def test_what_is_saved_can_be_loaded(tmp_path):
    path = milepost.save(record(3, **FULL), tmp_path)
    assert tensor_bytes(milepost.load(path, verify=True)) == tensor_bytes(record(3, **FULL))


def unnamed(optimizer_state):
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in optimizer_state["param_groups"]
    ]
    return optimizer_state | {"param_groups": groups}


def test_an_optimizer_state_without_names_takes_those_of_the_model(tmp_path):
    given, named = record(3, **FULL), record(3, **FULL)
    given.optimizer_state = unnamed(given.optimizer_state)
    assert tensor_bytes(milepost.load(milepost.save(given, tmp_path))) == tensor_bytes(named)


REFUSED = {
    "settings": {"model_settings": {}},
    "sizes": {"model_settings": {"vocab_size": 0, "block_size": 4}},
    "step": {"step": -1},
    "run": {"run_id": "../outside"},
    "object": {"data": {"path": Path("x")}},
    "nan": {"validation_loss": float("nan")},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_loaded_again_is_not_written(case, tmp_path):
    made = record(3, **FULL)
    for name, value in REFUSED[case].items():
        setattr(made, name, value)
    with pytest.raises(CheckpointError) as caught:
        milepost.save(made, tmp_path)
    assert caught.value.kind == "refused"
    assert not list(tmp_path.rglob("*.pt"))


def test_an_optimizer_state_that_fits_no_weight_is_refused(tmp_path):
    made = record(3, **FULL)
    made.optimizer_state = unnamed(made.optimizer_state)
    first = next(iter(made.optimizer_state["state"]))
    made.optimizer_state["state"][first]["exp_avg"] = torch.zeros(999)
    with pytest.raises(CheckpointError) as caught:
        milepost.save(made, tmp_path)
    assert caught.value.kind == "refused"


def test_an_unknown_layout_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="unified"):
        milepost.save(record(3, **FULL), tmp_path, layout="zip")


def test_pruning_deletes_by_the_policy(tmp_path):
    for step in (1, 2, 3):
        milepost.save(record(step, **FULL), tmp_path)
    copy = tmp_path / "mine.pt"
    copy.write_bytes(milepost.find(tmp_path)[0].path.read_bytes())
    deleted = milepost.prune(tmp_path, keep_last=1)
    assert [int(re.search(r"step(\d+)", path.name)[1]) for path in deleted] == [1, 2]
    assert copy.exists()
    with pytest.raises(ConfigError):
        milepost.prune(tmp_path, keep_last=0)


def test_a_checkpoint_is_shown_in_one_line(trained):
    shown = repr(milepost.load("latest", folder=trained[0] / "checkpoints"))
    assert "\n" not in shown
    assert len(shown) < 300
    assert "step 8" in shown or f"step {TINY['TRAINING_STEPS']}" in shown


def test_a_file_for_the_prompt_is_refused_where_it_would_not_be_read(tmp_path):
    with pytest.raises(ConfigError, match="prompt_file: generate reads no file"):
        milepost.generate("latest", prompt_file=str(tmp_path / "prompt.txt"), checkpoint_dir=str(tmp_path))
