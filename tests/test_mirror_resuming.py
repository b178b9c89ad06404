"""Resuming on an empty disk from a mirror that refuses, does not answer or lists late."""

import pytest
from drive import newest, train
from mirrors import SMALL, in_folder, lose

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
