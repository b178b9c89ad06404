"""An address in a mirror where it may mean several checkpoints, and a mirror that changes while it is read."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from mirrors import in_folder, known, no_pause, path_of, send
from records import save
from test_mirror_reading import cache_in

from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.tensors import digest
from milepost.mirror import Mirrored, Store, runs_in
from milepost.mirror.contents import LATEST, Save
from milepost.mirror.following import Following
from milepost.mirror.naming import at_step, candidates, find
from milepost.mirror.opening import bring, bring_all, listed
from milepost.remote import headers


def run_in(mirror: Path, folder: Path, run_id: str, *steps: int) -> Mirrored:
    """A run with checkpoints of these steps in the mirror."""
    own, here = known(in_folder(mirror), folder, run_id=run_id), folder / f"checkpoints of {run_id}"
    for step in steps:
        send(own, save(here, step, run_id=run_id), here)
    return own


def first(address: str) -> Save:
    return next(candidates(find(address, pause=no_pause), say=print, pause=no_pause))


def brought(address: str, folder: Path, *, certain: bool = False) -> Path:
    return bring(find(address, pause=no_pause), cache_in(folder), certain=certain, say=print, pause=no_pause)


# ---------------------------------------------------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize("called", ["2026", "best", "latest", "x.bin", "a[1]"])
@pytest.mark.parametrize(
    ("name", "step"), [("", 2), ("/latest", 2), ("/1", 1), ("/one", 2), ("/one/1", 1), ("/*step0001*", 1)]
)
def test_a_mirror_that_is_called_as_a_checkpoint_is_opened(tmp_path, called, name, step):
    run_in(tmp_path / called, tmp_path, "one", 1, 2)
    assert first(f"file://{tmp_path}/{called}{name}").found.step == step


def test_a_step_is_that_of_the_run_that_saved_last(tmp_path):
    run_in(tmp_path / "mirror", tmp_path, "one", 1, 2)
    run_in(tmp_path / "mirror", tmp_path, "two", 2, 3)
    assert first(f"file://{tmp_path}/mirror/2").run_id == "two"


@pytest.mark.parametrize("certain", [False, True])
def test_a_step_of_other_runs_only_is_refused_with_their_names(tmp_path, certain):
    for run_id, steps in (("one", (1, 2)), ("two", (1,)), ("three", (3,))):
        run_in(tmp_path / "mirror", tmp_path, run_id, *steps)
    with pytest.raises(CheckpointError) as caught:
        brought(f"file://{tmp_path}/mirror/1", tmp_path, certain=certain)
    assert caught.value.kind == "not found"
    problem = "step 1 is not in run three, which saved last, but in two, one"
    assert str(caught.value).endswith(f"mirror/1: {problem}: put the run's name before the step, as in two/1")


def test_a_step_beside_a_latest_checkpoint_stays_in_its_run(tmp_path):
    run_in(tmp_path / "mirror", tmp_path, "one", 1, 2)
    named = at_step(find(f"file://{tmp_path}/mirror/latest", pause=no_pause), 1, say=print, pause=no_pause)
    assert (named.run_id, named.name) == ("one", "1")


def test_a_latest_json_that_is_too_deep_is_passed_over(tmp_path):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    path_of(own.store, LATEST).write_bytes(b"[" * 60000)
    assert [len(names) for names in runs_in(own.store, pause=no_pause).values()] == [1]


# ---------------------------------------------------------------------------------------------------------------------
# Bases.


@pytest.fixture
def bases(tmp_path) -> dict[str, Path]:
    """Bases of three runs in a mirror, all called step_000100; that of `three` was saved last."""
    return {run_id: base(tmp_path, run_id, size=8 * size) for size, run_id in enumerate(("one", "two", "three"), 1)}


def base(folder: Path, run_id: str, *, size: int) -> Path:
    own, here = known(in_folder(folder / "mirror"), folder, run_id=run_id), folder / "checkpoints"
    path = save(here, 100, run_id=run_id, size=size, layout="stepfiles")
    send(own, path, here)
    return path


def beside_adapters(folder: Path, source: str, sha256: str) -> list[str]:
    """The runs of the bases that come from the mirror with adapters that record this base."""
    own, here = known(in_folder(folder / "mirror"), folder, run_id="adapters"), folder / "checkpoints"
    over = {"source": source, "sha256": sha256, "step": 100}
    send(own, save(here, 5, run_id="adapters", base=over, parts=["model", "adapters"]), here)
    path = brought(f"file://{folder}/mirror/latest", folder)
    return [found.parent.name for found in path.parent.rglob("step_000100.safetensors")]


@pytest.mark.parametrize("run_id", ["one", "two", "three"])
@pytest.mark.parametrize(
    "source", ["/x/{}/{}.safetensors", "C:\\x\\{}\\{}.safetensors", "s3://***@b/{}/{}.safetensors?***"]
)
def test_a_base_of_a_repeating_name_is_that_of_the_recorded_run(bases, tmp_path, source, run_id):
    assert beside_adapters(tmp_path, source.format(run_id, "step_000100"), "0" * 64) == [run_id]


@pytest.mark.parametrize("run_id", ["one", "two", "three"])
def test_a_base_whose_recorded_place_tells_no_run_is_that_of_the_recorded_sha256(bases, tmp_path, run_id):
    sha256 = digest(ckpt.load(bases[run_id], optimizer=False).model_state)
    assert beside_adapters(tmp_path, "/moved/step_000100.safetensors", sha256) == [run_id]


def test_a_base_that_no_sha256_proves_is_the_one_that_was_saved_last(bases, tmp_path):
    assert beside_adapters(tmp_path, "/moved/step_000100.safetensors", "0" * 64) == ["three"]


# ---------------------------------------------------------------------------------------------------------------------
# A mirror that changes while it is read.


def delete(own: Mirrored, *steps: int) -> None:
    """Delete saves of the run as retention does, the manifest first."""
    for each in [each for each in own.saves.values() if each.found.step in steps]:
        for name in (each.manifest, *(part.object for part in each.checkpoint_parts)):
            own.store.delete(name)


@pytest.fixture
def at_download(monkeypatch) -> Callable[[Callable[[], object]], None]:
    """Sets what happens just before the first file is downloaded."""
    get = Store.get

    def set_event(event: Callable[[], object]) -> None:
        events = [event]

        def after_it(store: Store, name: str, target: Path):
            if events:
                events.pop()()
            return get(store, name, target)

        monkeypatch.setattr(Store, "get", after_it)

    return set_event


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("name", ["", "latest", "best", "one/*"])
def test_a_reader_that_retention_overtakes_takes_the_newest(tmp_path, at_download, name, certain):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    at_download(lambda: (run_in(tmp_path / "mirror", tmp_path, "one", 2), delete(own, 1)))
    path = brought(f"file://{tmp_path}/mirror/{name}".rstrip("/"), tmp_path, certain=certain)
    assert ckpt.load(path, verify=True).step == 2


@pytest.mark.parametrize("certain", [False, True])
def test_a_manifest_that_is_deleted_after_the_listing_is_no_damage(tmp_path, certain):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    named = find(f"file://{tmp_path}/mirror/latest", pause=no_pause)
    run_in(tmp_path / "mirror", tmp_path, "one", 2)
    delete(own, 1)
    path = bring(named, cache_in(tmp_path), certain=certain, say=print, pause=no_pause)
    assert ckpt.load(path, verify=True).step == 2


@pytest.mark.parametrize("name", ["latest", "1"])
@pytest.mark.parametrize("certain", [False, True])
def test_a_checkpoint_that_is_deleted_meanwhile_is_not_found(tmp_path, at_download, name, certain):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    at_download(lambda: delete(own, 1))
    with pytest.raises(CheckpointError) as caught:
        brought(f"file://{tmp_path}/mirror/{name}", tmp_path, certain=certain)
    assert caught.value.kind == "not found"


def test_a_step_that_is_deleted_meanwhile_is_not_replaced_by_another(tmp_path, at_download):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    at_download(lambda: (run_in(tmp_path / "mirror", tmp_path, "one", 2), delete(own, 1)))
    with pytest.raises(CheckpointError) as caught:
        brought(f"file://{tmp_path}/mirror/1", tmp_path)
    assert caught.value.kind == "not found"
    assert Path(first(f"file://{tmp_path}/mirror/2").checkpoint).name in str(caught.value)


@pytest.mark.parametrize("certain", [False, True])
def test_one_that_comes_while_all_others_turn_out_damaged_is_taken_unless_it_must_be_certain(
    tmp_path, at_download, certain
):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    (part,) = next(iter(own.saves.values())).checkpoint_parts
    path_of(own.store, part.object).write_bytes(b"damaged")
    at_download(lambda: run_in(tmp_path / "mirror", tmp_path, "one", 2))
    if certain:
        with pytest.raises(CheckpointError) as caught:
            brought(f"file://{tmp_path}/mirror/latest", tmp_path, certain=True)
        assert caught.value.kind == "damaged"
    else:
        assert ckpt.load(brought(f"file://{tmp_path}/mirror/latest", tmp_path)).step == 2


@pytest.mark.parametrize("name", ["latest", "1"])
def test_a_file_that_is_missing_below_its_manifest_is_damage(tmp_path, name):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    (part,) = next(iter(own.saves.values())).checkpoint_parts
    own.store.delete(part.object)
    with pytest.raises(CheckpointError) as caught:
        brought(f"file://{tmp_path}/mirror/{name}", tmp_path)
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize(("deleted", "expected"), [((1,), [2]), ((1, 2), [3])])
def test_a_whole_mirror_is_brought_without_what_is_deleted_meanwhile(tmp_path, at_download, deleted, expected):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1, 2)
    at_download(lambda: (run_in(tmp_path / "mirror", tmp_path, "one", 3), delete(own, *deleted)))
    named, said = find(f"file://{tmp_path}/mirror", pause=no_pause), []
    paths = bring_all(named, cache_in(tmp_path), certain=True, say=said.append, pause=no_pause)
    assert [ckpt.load(path).step for path in paths] == expected
    assert [line for line in said if "deleted" in line]


def test_a_follower_that_retention_overtakes_at_its_first_look_takes_the_newest(tmp_path, at_download):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    at_download(lambda: (run_in(tmp_path / "mirror", tmp_path, "one", 2), delete(own, 1)))
    named = find(f"file://{tmp_path}/mirror/latest", pause=no_pause)
    followed = Following(named, cache_in(tmp_path), say=print, pause=no_pause)
    assert ckpt.load(followed.find()).step == 2


@pytest.fixture
def before_call(monkeypatch) -> Callable[[str, Callable[[], object]], None]:
    """Sets what happens just before a method of Store is first called for a file of a checkpoint."""

    def set_event(method: str, event: Callable[[], object]) -> None:
        plain, events = getattr(Store, method), [event]

        def after_it(store: Store, name: str, *rest: object, **words: object) -> object:
            if events and name.endswith(".pt"):
                events.pop()()
            return plain(store, name, *rest, **words)

        monkeypatch.setattr(Store, method, after_it)

    return set_event


@pytest.mark.parametrize(("name", "step"), [("latest", 2), ("best", 2), ("one/*", 2), ("1", None)])
def test_who_looks_at_a_checkpoint_where_it_is_is_told_of_no_damage_when_retention_overtakes(
    tmp_path, before_call, name, step
):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1)
    before_call("read", lambda: (run_in(tmp_path / "mirror", tmp_path, "one", 2), delete(own, 1)))
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        look = functools.partial(headers, f"file://{tmp_path}/mirror/{name}", said.append)
        if step is None:
            with pytest.raises(CheckpointError) as caught:
                stack.enter_context(look())
            assert caught.value.kind == "not found"
        else:
            path, where = stack.enter_context(look())
            assert (ckpt.find(path.parent)[0].step, Path(where).name) == (step, path.name)
    assert not [line for line in said if "damaged" in line or "missing" in line]


def test_a_list_leaves_out_what_is_deleted_while_it_is_made(tmp_path, before_call, monkeypatch):
    own = run_in(tmp_path / "mirror", tmp_path, "one", 1, 2, 3, 4)
    named = find(f"file://{tmp_path}/mirror", pause=no_pause)
    (part,) = next(each for each in own.saves.values() if each.found.step == 2).checkpoint_parts
    own.store.delete(part.object)  # a control: its manifest stays
    monkeypatch.setattr(Store, "sizes", lambda store: {})  # as of a store that lists late: each object is asked for
    before_call("size", lambda: delete(own, 4, 1))  # after the manifest of the newest, and before that of the oldest
    assert [(each.step, each.kind) for each in listed(named, pause=no_pause)] == [(2, "damaged"), (3, None)]
