"""The checkpoints that a server opens by name, and follows while a run writes newer ones."""

import gc
import shutil
import signal
import sys
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from drive import at_step, train
from model_server import QUICK, alone, serving, settings_for, texts_of, until
from script import family, train_family
from work import HANGING

from milepost import ckpt
from milepost.mirror.following import Source
from milepost.runtime.progress import Log
from milepost.samples import open_named
from milepost.serving.catalogue import Catalogue, on_disk


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of two runs at steps 2, 4, 5, 6 and 8, in one folder."""
    return train_family(tmp_path_factory.mktemp("serve"))


def test_several_models_by_name_and_the_newest_of_a_folder(folder):
    steps = family(folder)
    paths = f"two={steps[2]},latest,{steps[4]}"
    with serving(folder, CHECKPOINT_PATH=paths) as running:
        shown = {model["id"]: model["step"] for model in running.send("GET", "/v1/models").value["data"]}
        assert shown == {"two": 2, "latest": 6, steps[4].stem: 4}
        assert running.send("GET", "/v1/models/two").value["step"] == 2
        assert running.complete("Dear").error == (404, "model_not_found", "model")  # which of them?
        message = running.complete("Dear").value["error"]["message"]
        assert message == f"the request names no model; there are two, latest, {steps[4].stem}"
        first, second = (
            running.complete("Dear", model=name, seed=1, temperature=0, max_tokens=16) for name in ("two", "latest")
        )
        assert first.value["system_fingerprint"] != second.value["system_fingerprint"]


def test_latest_follows_a_run_while_a_request_ends_on_its_weights(tmp_path):
    assert train(tmp_path, **QUICK, TRAINING_STEPS="4")[0] == 0
    with serving(tmp_path, CHECKPOINT_PATH="latest") as running:
        generating = running.server.generating
        before = running.server.catalogue.models["latest"].loaded
        pool = ThreadPoolExecutor(1)
        asked = {"max_tokens": 4000, "seed": 3, "temperature": 1}
        early = pool.submit(running.complete, "Dear", **asked)
        until(lambda: generating.running)
        again = {"RESUME": str(at_step(tmp_path, 4)), "LEARNING_RATE": "0.5", "TRAINING_STEPS": "8"}
        assert train(tmp_path, **QUICK, **again)[0] == 0
        until(lambda: running.server.catalogue.models["latest"].loaded.record.step == 8)
        reply = early.result().value
        assert reply["system_fingerprint"].endswith("-step4")
        assert reply["choices"][0]["text"] == alone(before, "Dear", seed=3, tokens=4000, temperature=1.0)
        late = running.complete("Dear", **asked | {"max_tokens": 50}).value
        assert late["system_fingerprint"].endswith("-step8")
        assert late["choices"][0]["text"] != reply["choices"][0]["text"][:50]


def test_weights_that_a_newer_checkpoint_replaced_are_let_go_once_their_texts_have_ended(folder, tmp_path):
    """Not only when a further text is generated: until then the memory would hold two models."""
    steps, checkpoints = family(folder), tmp_path / "checkpoints"
    checkpoints.mkdir()
    shutil.copy2(steps[2], checkpoints)
    with serving(tmp_path, CHECKPOINT_PATH="latest") as running:
        assert running.complete("Dear", seed=7, max_tokens=5).status == 200
        models = running.server.catalogue.models
        replaced = weakref.ref(models["latest"].loaded.model)
        shutil.copy2(steps[4], checkpoints)
        running.server.catalogue.look("latest")
        assert models["latest"].loaded.record.step == 4
        until(lambda: gc.collect() >= 0 and replaced() is None)


def test_a_newer_checkpoint_that_cannot_be_opened_leaves_the_earlier_one(folder, tmp_path):
    settings, said = settings_for(folder), []
    opened = open_named(str(family(folder)[2]), settings, Log())

    def open_one(name, bases):
        if "step0006" in name:
            raise ckpt.CheckpointError(name, "is damaged", "use another")
        return opened

    catalogue = Catalogue(dict([on_disk("latest", folder / "checkpoints")]), open_one=open_one, rows=1, log=said.append)
    catalogue._seen["latest"] = tmp_path  # as if an earlier one had been the latest
    for _ in range(2):
        catalogue.look("latest")
    assert catalogue.models["latest"].loaded is opened
    assert sum("is damaged" in line for line in said) == 1


def test_no_thread_lives_on_that_has_computed_but_does_not_generate(folder):
    """OpenMP would keep threads for it, and with more of them than cores generation is slower by a third."""
    settings, threads = settings_for(folder), []

    def open_one(name, bases):
        threads.append(threading.current_thread())
        return open_named(name, settings, Log(), bases=bases)

    steps = {f"step{step}": Source(str(path)) for step, path in family(folder).items()}
    Catalogue(steps, open_one=open_one, rows=2, log=lambda line: None)
    assert len(threads) == len(steps)
    assert not any(thread.is_alive() for thread in threads)


def test_a_signal_does_not_wait_for_a_checkpoint_that_is_being_opened():
    """To compile a decoder takes long."""
    released, ended, main = threading.Event(), [], threading.main_thread().ident

    def open_one(name, bases):
        until(lambda: any(call.name == "result" for call in traceback.extract_stack(sys._current_frames()[main])))
        signal.pthread_kill(main, signal.SIGINT)
        ended.append(released.wait(HANGING))
        raise OSError

    with pytest.raises(KeyboardInterrupt):
        Catalogue({"one": Source("one")}, open_one=open_one, rows=2, log=lambda line: None)
    assert ended == []
    released.set()


def test_adapters_share_their_base(tmp_path):
    """The base is read once; its weights that no adapter changes are the same memory."""
    assert train(tmp_path, **QUICK, TRAINING_STEPS="2")[0] == 0
    base = at_step(tmp_path, 2)
    for name, seed in (("one", "1"), ("two", "2")):
        lora = {"LORA_RANK": "2", "INIT_FROM": str(base), "CHECKPOINT_DIR": str(tmp_path / name), "SEED": seed}
        assert train(tmp_path, **QUICK, **lora, TRAINING_STEPS="2", CHECKPOINT_ADAPTERS_ONLY="true")[0] == 0
    paths = f"base={base},one={tmp_path / 'one'},two={tmp_path / 'two'}"
    with serving(tmp_path, CHECKPOINT_PATH=paths) as running:
        models = {name: each.loaded.record.model_state for name, each in running.server.catalogue.models.items()}
        pointers = {state["wte.weight"].data_ptr() for state in models.values()}
        assert len(models) == 3
        assert len(pointers) == 1
        texts = {
            texts_of(running.complete("Dear", model=name, seed=1, max_tokens=40, temperature=1))[0] for name in models
        }
        assert len(texts) >= 2
