"""Resuming on an empty disk from a mirror that refuses, does not answer or lists late."""

import pytest
from drive import newest, train
from mirrors import SMALL, halves, in_folder, lose, taken
from test_last_step import stop, trained

import training
from milepost import ckpt
from milepost.mirror import Store, StoreError, retrying
from milepost.mirror.contents import LATEST


@pytest.fixture
def lost(tmp_path) -> dict[str, str]:
    """The variables of a run that is in a mirror only, and is to be resumed."""
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}"}
    assert train(tmp_path, **variables)[0] == 0
    lose(tmp_path)
    return variables | {"RESUME": "auto"}


@pytest.mark.parametrize("method", ["names", "create"])
@pytest.mark.parametrize(("kind", "code"), [("refused", 2), ("missing", 2), ("passing", 3)])
def test_a_mirror_that_refuses_is_a_setting_that_is_wrong_and_one_that_is_away_is_not(
    lost, tmp_path, monkeypatch, method, kind, code
):
    def fail(*_: object) -> None:
        raise StoreError("there", "down", kind)

    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(Store, method, fail)
    ended, said = train(tmp_path, **lost)
    assert (ended, "a new run starts" in said) == (code, code == 3)
    assert ("error: CHECKPOINT_MIRROR=" in said) == (code == 2)
    assert ckpt.find(tmp_path / "checkpoints") == []


def test_a_second_listing_that_lacks_the_run_does_not_stop_a_resume(lost, tmp_path, monkeypatch):
    names, listings = Store.names, []

    def late(store: Store, below: str = "") -> list[str]:
        listings.append(below)
        return [] if listings.count("") == 2 and below == "" else names(store, below)

    in_folder(tmp_path / "mirror").delete(LATEST)
    monkeypatch.setattr(Store, "names", late)
    code, said = train(tmp_path, **lost)
    assert code == 0, said
    assert "from the mirror" in said
    assert newest(tmp_path).step == 6


@pytest.fixture
def finished(tmp_path) -> dict[str, str]:
    """The variables of a finished run whose mirror holds steps 3 and 6, and whose folder only 6."""
    variables = SMALL | {"CHECKPOINT_MIRROR": f"file://{tmp_path / 'mirror'}", "MIRROR_KEEP_LAST": "0"}
    assert trained(tmp_path, {3: stop}, **variables)[0] == 130  # the end of a run waits for its mirror
    variables |= {"RESUME": "auto", "CHECKPOINT_KEEP_BEST": "0"}
    assert train(tmp_path, **variables)[0] == 0
    assert newest(tmp_path).step == 6
    return variables


def test_what_a_run_saves_after_an_earlier_step_is_newer_than_what_the_mirror_had(finished, tmp_path, capsys):
    """Else a machine that begins with an empty disk undoes RESUME_STEP, and retention deletes the new saves in the mirror."""
    lose(tmp_path)
    code, said = trained(tmp_path, {4: stop}, **finished, RESUME_STEP="3")
    assert (code, newest(tmp_path).step) == (130, 4), said
    lose(tmp_path)
    code, said = train(tmp_path, **finished | {"MIRROR_KEEP_LAST": "1"})
    assert code == 0, said
    assert "step           restored  4; 2 more, to 6" in capsys.readouterr().out


def test_a_step_that_only_the_mirror_holds_is_brought(finished, tmp_path, capsys):
    code, said = train(tmp_path, **finished, RESUME_STEP="6")
    assert (code, "from the mirror" in said) == (0, False), said
    code, said = train(tmp_path, **finished, RESUME_STEP="3")
    assert (code, "from the mirror" in said) == (0, True), said
    assert "step           restored  3; 3 more, to 6" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["unified", "separated", "sharded"])
def test_a_resume_copies_the_checkpoint_that_the_mirror_lacks_before_the_next_one(layout, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    variables = SMALL | {"CHECKPOINT_LAYOUT": layout, "CHECKPOINT_KEEP_BEST": "0"}
    assert trained(tmp_path, {3: stop}, **variables)[0] == 130  # as while a network was down
    assert not mirror.exists()
    monkeypatch.setattr(training, "seconds_per_step", lambda *_: stop() or 1.0)  # before the first step
    for _ in range(2):
        code, said = train(tmp_path, **variables, RESUME="auto", CHECKPOINT_MIRROR=f"file://{mirror}")
        assert code == 130, said
        assert [save.found.step for save in taken(in_folder(mirror))] == [3]
        assert halves(in_folder(mirror)) == []
    assert "waiting for the upload" not in said  # the control: what is there is not sent again
