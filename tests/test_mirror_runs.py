"""Whole runs with a mirror: a lost disk, settings that differ, and addresses that are refused."""

import os

import pytest
from drive import logged, newest, tensor_bytes, train
from mirrors import SECRETS, SMALL, Faulty, halves, in_folder, in_memory, lose, path_of, saves_of

from milepost import ckpt, config
from milepost.config import ConfigError
from milepost.mirror import Store, StoreError, contents


def test_a_run_resumes_on_an_empty_disk_past_a_damaged_checkpoint(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    code, said = train(tmp_path, **variables)
    assert code == 0, said
    whole, lines = tensor_bytes(newest(tmp_path)), logged(tmp_path)
    store = in_folder(tmp_path / "mirror")
    last = saves_of(store, (run_id := os.listdir(tmp_path / "runs")[0]))[0]
    path_of(store, last.checkpoint_parts[0].object).write_bytes(b"damaged")
    lose(tmp_path)
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0, said
    assert f"skipped: {store.shown}/{last.checkpoint_parts[0].object}" in said
    assert (tensor_bytes(newest(tmp_path)), logged(tmp_path)) == (whole, lines)
    assert os.listdir(tmp_path / "runs") == [run_id]
    assert halves(store) != []  # the damaged one is left for its owner to look at


def test_a_disk_that_is_as_new_as_the_mirror_reads_no_checkpoint_from_it(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'my mirror'}"}
    assert train(tmp_path, **variables)[0] == 0
    code, said = train(tmp_path, **variables, RESUME="auto")
    assert code == 0
    assert "from the mirror" not in said


def test_another_model_in_the_mirror_is_left_there(tmp_path):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    assert train(tmp_path, **variables)[0] == 0
    lose(tmp_path)
    code, said = train(tmp_path, **variables | {"BLOCK_SIZE": "8"}, RESUME="auto")
    assert code == 0
    assert "from the mirror" not in said
    assert {found.step for found in ckpt.find(tmp_path / "checkpoints")} == {6}


def test_a_mirror_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR=f"file://{tmp_path / 'file' / 'mirror'}")
    assert code == 2
    assert "error: CHECKPOINT_MIRROR=" in said
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


def test_a_mirror_that_refuses_later_neither_stops_training_nor_is_passed_over(tmp_path):
    (tmp_path / "mirror" / contents.LATEST).mkdir(parents=True)  # a folder where a file should be
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    code, said = train(tmp_path, **variables)
    assert code == 8
    assert "1 checkpoint not yet mirrored" in said
    assert newest(tmp_path).step == 6


def test_a_mirror_that_does_not_answer_starts_no_run_anew(tmp_path, monkeypatch):
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    assert train(tmp_path, **variables)[0] == 0

    def fail(store: Store, under: str = "") -> list[str]:
        raise StoreError("there", "down", "refused")

    monkeypatch.setattr(Store, "names", fail)
    code, said = train(tmp_path, **variables, RESUME="auto")  # the disk has it
    assert code == 2  # the run is finished, and nobody knows whether the mirror has its last checkpoint
    assert "warning: the mirror could not be read (there: down)" in said
    lose(tmp_path)
    assert train(tmp_path, **variables, RESUME="auto")[0] == 2
    assert not (tmp_path / "checkpoints").exists()


def test_secrets_of_an_address_are_stored_and_shown_nowhere():
    settings = config.read({"CHECKPOINT_MIRROR": "sftp://me:pass-word@host/mirror?token=a-secret"})
    assert config.public(settings, "CHECKPOINT_MIRROR") == "sftp://***@host/mirror?***"
    store = in_memory(fs := Faulty())
    fs.faults.append(PermissionError("me:pass-word@host refused token=a-secret"))
    with pytest.raises(StoreError) as caught:
        store.put("x", b"")
    assert not any(word in str(caught.value) for word in SECRETS)
    assert caught.value.kind == "refused"


@pytest.mark.parametrize(
    ("address", "named"), [("nowhere://bucket/run", "s3://"), ("gs://bucket/run", "gcsfs"), ("file:///", "folder")]
)
def test_an_address_that_cannot_be_a_mirror_is_refused_before_the_first_step(tmp_path, address, named):
    code, said = train(tmp_path, **SMALL | {"CHECKPOINT_MIRROR": address})
    assert code == 2
    assert named in said
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("value", ["bucket/run", "s3:/bucket", "s3://a b", "s3://a,b"])
def test_what_is_no_address_is_refused(value):
    with pytest.raises(ConfigError):
        config.read({"CHECKPOINT_MIRROR": value})
