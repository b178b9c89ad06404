"""A name in a mirror that is followed: by itself, and by a server whose mirror grows, has damage, and is away for a while."""

import threading
from collections import Counter
from pathlib import Path

import pytest
from drive import train
from mirrors import in_folder, known, send
from model_server import QUICK, serving, until
from records import record, save
from test_mirror import no_pause, path_of
from test_mirror_reading import cache_in, damage, save_of

from milepost import ckpt, remote
from milepost.ckpt import CheckpointError
from milepost.files import TEMPORARY
from milepost.mirror import Mirrored, Store, StoreError
from milepost.mirror.cache import Cache, make_room
from milepost.mirror.following import Following, Source
from milepost.mirror.naming import find
from milepost.serving import catalogue


@pytest.fixture
def mirror(tmp_path) -> Mirrored:
    """A mirror of a run with a checkpoint at step 1."""
    mirrored = known(in_folder(tmp_path / "mirror"), tmp_path)
    add(mirrored, tmp_path, 1)
    return mirrored


def add(mirrored: Mirrored, folder: Path, step: int, **changes) -> None:
    send(mirrored, save(folder / "checkpoints", step, **changes), folder / "checkpoints")


@pytest.fixture
def downloads(monkeypatch) -> Counter[str]:
    """How often each object was downloaded."""
    get, counts = Store.get, Counter()

    def counted(store: Store, name: str, target: Path):
        counts[Path(name).name] += 1
        return get(store, name, target)

    monkeypatch.setattr(Store, "get", counted)
    return counts


def following(mirror: Mirrored, cache: Cache, name: str = "latest") -> tuple[Following, list[str]]:
    said: list[str] = []
    named = find(f"{mirror.store.address}/{name}".rstrip("/"), pause=no_pause)
    return Following(named, cache, say=said.append, pause=no_pause), said


def step_of(path: Path) -> int:
    return ckpt.load(path, verify=True).step


# ---------------------------------------------------------------------------------------------------------------------
# By itself.


@pytest.mark.parametrize(
    ("name", "expected"),
    [("latest", [1, 2, 3, 9]), ("", [1, 2, 3, 9]), ("one/latest", [1, 2, 3, 3]), ("one", [1, 2, 3, 3]), ("*", [1, 2, 3, 9]),
     ("one/best", [1, 2, 2, 2])],
)  # fmt: skip
def test_what_is_newer_is_taken_and_each_is_downloaded_once(mirror, tmp_path, name, expected, downloads):
    """Steps 2 and 3 come, then another run; a look in between finds nothing new."""
    followed, _ = following(mirror, cache_in(tmp_path), name)
    found = [step_of(followed.find())]
    for step, run_id, loss in ((2, "one", 1.0), (3, "one", 2.0), (9, "two", 3.0)):
        own = known(mirror.store, tmp_path, run_id=run_id)
        add(own, tmp_path, step, run_id=run_id, validation_loss=loss)
        found.append(step_of(followed.find()))
        assert step_of(followed.find()) == found[-1]
    assert found == expected
    assert set(downloads.values()) == {1}
    assert len(downloads) == len(set(expected))


def test_a_look_that_finds_nothing_new_reads_no_checkpoint_and_no_manifest(mirror, tmp_path, monkeypatch):
    followed, _ = following(mirror, cache_in(tmp_path))
    path, read, seen = followed.find(), Store.read, []
    monkeypatch.setattr(Store, "read", lambda store, name, **named: (seen.append(name), read(store, name, **named))[1])
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("the copy is read again"))
    assert followed.find() == path
    assert seen == ["latest.json"]


def test_a_damaged_one_is_downloaded_and_reported_once_however_often_the_mirror_grows(mirror, tmp_path, downloads):
    followed, said = following(mirror, cache_in(tmp_path))
    assert step_of(followed.find()) == 1
    add(mirror, tmp_path, 2)
    bad = damage(mirror, 2)
    for _ in range(3):
        assert step_of(followed.find()) == 1
    add(mirror, tmp_path, 3)
    damage(mirror, 3)
    for _ in range(3):
        assert step_of(followed.find()) == 1
    assert set(downloads.values()) == {1}
    assert sum(str(bad) in line for line in said if line.startswith("skipped: ")) == 1
    add(mirror, tmp_path, 4)
    assert step_of(followed.find()) == 4


def test_one_whose_file_comes_later_than_its_manifest_is_taken_then(mirror, tmp_path, downloads):
    """As where another program copies the folder of the mirror. It is not downloaded before all of it is there."""
    followed, said = following(mirror, cache_in(tmp_path))
    assert step_of(followed.find()) == 1
    add(mirror, tmp_path, 2)
    file = path_of(mirror.store, save_of(mirror, 2).checkpoint_parts[0].object)
    content = file.read_bytes()
    for part in (b"", content[:-1]):
        file.write_bytes(part)
        for _ in range(2):
            assert step_of(followed.find()) == 1
    assert len(downloads) == 1
    assert len([line for line in said if line.startswith("skipped: ")]) == 2  # no bytes, and too few
    file.write_bytes(content)
    assert step_of(followed.find()) == 2


def test_a_download_that_breaks_off_is_tried_again(mirror, tmp_path, monkeypatch):
    followed, _ = following(mirror, cache_in(tmp_path))
    path, get = followed.find(), Store.get
    add(mirror, tmp_path, 2)

    def broken(store: Store, name: str, target: Path):
        target.write_bytes(b"a half")
        raise StoreError(name, "is away", "passing")

    monkeypatch.setattr(Store, "get", broken)
    with pytest.raises(CheckpointError) as caught:
        followed.find()
    assert caught.value.kind == "unreachable"
    monkeypatch.setattr(Store, "get", get)
    assert (step_of(path), step_of(followed.find())) == (1, 2)
    assert not list((tmp_path / "cache").rglob(f"{TEMPORARY}*"))


def test_of_a_followed_name_only_the_last_is_kept_from_the_cache_s_bound(mirror, tmp_path):
    """Else a server would fill the disk. Another that has taken the same still holds it."""
    cache = cache_in(tmp_path)
    (first, _), (other, _) = following(mirror, cache), following(mirror, cache)
    paths = [first.find(), other.find()]
    add(mirror, tmp_path, 2)
    paths.append(first.find())
    make_room(cache, need=cache.limit)
    assert [path.exists() for path in paths] == [True, True, True]
    other.find()
    make_room(cache, need=cache.limit)
    assert [path.exists() for path in paths] == [False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# By a server.


@pytest.fixture
def trained(tmp_path, monkeypatch) -> tuple[Mirrored, Path]:
    """A mirror with the checkpoint of step 2 of a run, and that of step 4, which was not copied yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(remote, "ASK_EVERY", 0.02)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    code, said = train(tmp_path, **QUICK | {"CHECKPOINT_INTERVAL": "2"}, TRAINING_STEPS="4")
    assert code == 0, said
    first, second = sorted(ckpt.find(tmp_path / "checkpoints"), key=lambda found: found.step)
    mirrored = Mirrored(
        in_folder(tmp_path / "mirror"), first.run_id, tmp_path / "runs" / first.run_id, tmp_path / "checkpoints"
    )
    send(mirrored, first.path, tmp_path / "checkpoints")
    return mirrored, second.path


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_a_server_follows_a_mirror_and_serves_on_while_that_is_away(trained, tmp_path, how, downloads, monkeypatch):
    mirrored, newer = trained
    said, looks = [], threading.Semaphore(0)
    renew = catalogue.Catalogue._renew
    folder, aside = tmp_path / "mirror", tmp_path / "aside"

    def noted(self, name: str) -> None:
        looks.release()
        renew(self, name)

    def silent(store: Store, *_: object) -> list[str]:
        raise StoreError(store.shown, "does not answer", "passing")

    def looked(times: int) -> None:
        for _ in range(times):
            looks.acquire()

    monkeypatch.setattr(catalogue.Catalogue, "_renew", noted)
    with serving(tmp_path, CHECKPOINT_PATH=f"file://{folder}/latest", log=said.append) as running:
        before = running.complete("Dear", seed=1, max_tokens=20).value
        assert (before["model"], before["system_fingerprint"][-6:]) == ("latest", "-step2")
        looked(3)
        with pytest.MonkeyPatch.context() as away:
            folder.rename(aside) if how == "gone" else away.setattr(Store, "names", silent)
            until(lambda: any("stays at" in line for line in said))
            looked(4)
            again = running.complete("Dear", seed=1, max_tokens=20).value
            assert again["choices"] == before["choices"]
            if how == "gone":
                aside.rename(folder)
        send(mirrored, newer, tmp_path / "checkpoints")
        until(lambda: running.server.catalogue.models["latest"].loaded.record.step == 4)
        after = running.complete("Dear", seed=1, max_tokens=20).value
        looked(3)
    assert after["system_fingerprint"][-6:] == "-step4"
    assert len([line for line in said if "stays at" in line]) == 1
    assert len([line for line in said if line.startswith("serving latest")]) == 2
    assert [count for name, count in downloads.items() if name.endswith(".pt")] == [1, 1]


def test_names_of_addresses_and_which_of_them_are_followed(trained, tmp_path):
    mirrored, _ = trained
    there = f"file://{tmp_path / 'mirror'}"
    paths = f"{there}/latest,{there}/best,mine={there}/{mirrored.run_id},{there},2={there}/2,{there}/2"
    with serving(tmp_path, CHECKPOINT_PATH=paths) as running:
        names = list(running.server.catalogue.models)
        (cached,) = (tmp_path / "caches").rglob("*.pt")
        assert names == ["latest", "best", "mine", "mirror", "2", cached.stem]
        followed = sorted(thread.name for thread in running.server.catalogue.threads)
        assert followed == ["follows best", "follows latest", "follows mine", "follows mirror"]


def test_an_error_of_any_kind_does_not_end_the_following(tmp_path):
    """The thread would end unseen, and the model stay for ever."""
    said, errors = [], [RuntimeError("no memory"), RuntimeError("no memory"), OSError(28, "No space left")]
    paths = iter([tmp_path / "1", *errors, tmp_path / "2"])

    def find_next() -> Path:
        if isinstance(found := next(paths), Exception):
            raise found
        return found

    opened = []

    def open_one(name, bases):
        opened.append(name)
        return FakeLoaded

    models = catalogue.Catalogue({"a": Source("first", find_next, 1.0)}, open_one=open_one, rows=1, log=said.append)
    waits = [models.look("a") for _ in range(4)]
    assert opened == ["first", str(tmp_path / "2")]
    assert [line.rpartition(": ")[2] for line in said[1:-1]] == ["no memory", "[Errno 28] No space left"]
    assert waits[:3] == [2.0, 4.0, 8.0]
    assert waits[3] >= 1


class FakeLoaded:
    """What a catalogue asks of a checkpoint that was opened."""

    record, base, generator, lookup, dtype = record(2), None, None, False, "float32"
