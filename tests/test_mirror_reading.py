"""Checkpoints of a mirror by an address: which one a name stands for, the cache, and what is read without downloading tensors."""

import os
import signal
from pathlib import Path

import pytest
import torch
from mirrors import in_folder, known, no_pause, path_of, send
from records import WEIGHT, assert_same, save, snapshot

from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.layouts import known_layout
from milepost.mirror import Mirrored, Store
from milepost.mirror import cache as caching
from milepost.mirror.cache import Cache, CacheFullError, lock_of, make_room
from milepost.mirror.contents import Save
from milepost.mirror.headers import joined, write_headers
from milepost.mirror.naming import below, candidates, find, split
from milepost.mirror.opening import bring, bring_all, listed

GB = 10**9
PLENTY = GB


@pytest.fixture
def mirror(tmp_path) -> Mirrored:
    """A mirror with two runs: `one` with steps 1 to 3, the loss of step 2 the lowest, then `two` with step 4."""
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        send(mirrored, save(folder, step, validation_loss=loss), folder)
    other, folder = known(mirrored.store, tmp_path, run_id="two"), tmp_path / "elsewhere"
    send(other, save(folder, 4, run_id="two"), folder)
    return mirrored


def named(mirror: Mirrored, name: str = ""):
    return find(f"{mirror.store.address}/{name}".rstrip("/"), pause=no_pause)


def steps(mirror: Mirrored, name: str) -> list[int]:
    return [each.found.step for each in candidates(named(mirror, name), say=print, pause=no_pause)]


def brought(mirror: Mirrored, name: str, cache: Cache, *, certain: bool = False) -> tuple[Path, list[str]]:
    said: list[str] = []
    return bring(named(mirror, name), cache, certain=certain, say=said.append, pause=no_pause), said


def save_of(mirror: Mirrored, step: int) -> Save:
    every = candidates(named(mirror), say=print, pause=no_pause)
    return next(each for each in every if each.found.step == step)


def damage(mirror: Mirrored, step: int) -> Path:
    """Change one byte of a checkpoint in the mirror."""
    path = path_of(mirror.store, save_of(mirror, step).checkpoint_parts[0].object)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def cache_in(folder: Path, limit: int = PLENTY) -> Cache:
    return Cache(folder / "cache", limit)


# ---------------------------------------------------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("latest", [4, 3, 2, 1]), ("", [4, 3, 2, 1]), ("one/latest", [3, 2, 1]), ("one", [3, 2, 1]), ("best", [4]), ("one/best", [2, 3, 1]),
        ("one/2", [2]), ("4", [4]), ("*step0002*", [2]), ("*", [4, 3, 2, 1]), ("two/*", [4]),
    ],
)  # fmt: skip
def test_a_name_stands_for_checkpoints_the_preferred_first(mirror, name, expected):
    assert steps(mirror, name) == expected


def test_the_name_of_a_file_stands_for_it_with_and_without_its_ending(mirror):
    name = Path(save_of(mirror, 2).checkpoint).name
    assert [steps(mirror, each) for each in (name, name.removesuffix(".pt"), f"one/{name}")] == [[2]] * 3


@pytest.mark.parametrize("name", ["7", "absent.pt", "nothing", "two/3", "*step0009*"])
def test_a_name_that_nothing_has_is_not_found_and_lists_what_is_there(mirror, name):
    with pytest.raises(CheckpointError) as caught:
        steps(mirror, name)
    assert caught.value.kind == "not found"
    assert Path(save_of(mirror, 4).checkpoint).name in str(caught.value)


def test_a_place_without_a_mirror_is_not_found_and_its_password_not_shown(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        find(f"file://{tmp_path}/nothing?token=a-secret", pause=no_pause)
    assert (caught.value.kind, "a-secret" in str(caught.value)) == ("not found", False)


def test_an_address_is_split_and_joined_before_its_query():
    assert split("s3://b/run/latest?token=1") == ("s3://b/run?token=1", "latest")
    assert below("s3://b/run/?token=1", "latest") == "s3://b/run/latest?token=1"


# ---------------------------------------------------------------------------------------------------------------------
# Brought into the cache.


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_every_layout_is_brought_as_it_was_and_read_from_the_store_once(tmp_path, layout, monkeypatch):
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout)
    send(mirrored, path, folder)
    original = ckpt.load(path, verify=True)
    first, _ = brought(mirrored, "latest", cache_in(tmp_path))
    assert_same(ckpt.load(first, verify=True), original, but=set())
    monkeypatch.setattr(Store, "get", lambda *_: pytest.fail("it is in the cache already"))
    assert brought(mirrored, "3", cache_in(tmp_path))[0] == first


@pytest.mark.parametrize("name", ["latest", "one/latest", "one/best", "one/*"])
def test_a_damaged_checkpoint_is_skipped_and_reported_where_the_name_leaves_a_choice(mirror, tmp_path, name):
    preferred, following = steps(mirror, name)[:2]
    bad = damage(mirror, preferred)
    path, said = brought(mirror, name, cache_in(tmp_path))
    assert ckpt.load(path, verify=True).step == following
    assert any(line.startswith("skipped: ") and str(bad) in line for line in said)
    with pytest.raises(CheckpointError) as caught:
        brought(mirror, name, cache_in(tmp_path), certain=True)
    assert caught.value.kind == "damaged"


def test_a_damaged_checkpoint_that_is_named_is_refused(mirror, tmp_path):
    damage(mirror, 3)
    with pytest.raises(CheckpointError) as caught:
        brought(mirror, "one/3", cache_in(tmp_path))
    assert caught.value.kind == "damaged"
    assert snapshot(tmp_path / "cache") == {}


@pytest.mark.parametrize("certain", [False, True])
def test_a_half_manifest_is_skipped_and_refused_if_it_must_be_certain(mirror, tmp_path, certain):
    manifest = path_of(mirror.store, save_of(mirror, 4).manifest)
    manifest.write_bytes(manifest.read_bytes()[:-50])
    if certain:
        with pytest.raises(CheckpointError):
            brought(mirror, "latest", cache_in(tmp_path), certain=True)
    else:
        assert ckpt.load(brought(mirror, "latest", cache_in(tmp_path))[0]).step == 3


def test_a_whole_mirror_is_brought_without_its_damaged_checkpoints(mirror, tmp_path):
    damage(mirror, 2)
    said: list[str] = []
    paths = bring_all(named(mirror), cache_in(tmp_path), certain=False, say=said.append, pause=no_pause)
    assert sorted(ckpt.load(path).step for path in paths) == [1, 3, 4]
    assert sum(line.startswith("skipped: ") for line in said) == 1
    with pytest.raises(CheckpointError):
        bring_all(named(mirror), cache_in(tmp_path), certain=True, say=said.append, pause=no_pause)


def test_the_base_of_adapters_comes_with_them(tmp_path):
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    base = save(folder, 1)
    send(mirrored, base, folder)
    over = {"sha256": "0" * 64, "source": str(base), "step": 1}
    adapters = save(folder, 2, base=over, parts=["model", "adapters"])
    send(mirrored, adapters, folder)
    path, _ = brought(mirrored, "2", cache_in(tmp_path))
    assert {each.name for each in path.parent.glob("*.pt")} == {base.name, adapters.name}


# ---------------------------------------------------------------------------------------------------------------------
# The cache.


def test_a_copy_that_was_altered_is_downloaded_again(mirror, tmp_path):
    cache = cache_in(tmp_path)
    path, _ = brought(mirror, "one/3", cache)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again, said = brought(mirror, "one/3", cache)
    assert (again, again.read_bytes()) == (path, content)
    assert any("damaged" in line for line in said)


@pytest.mark.parametrize("layout", ["unified", "separated", "directory"])
def test_a_killed_download_is_never_taken_for_whole(tmp_path, layout):
    """Killed before each file of the checkpoint, and after its last."""
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout)
    sent, cache = send(mirrored, path, folder), cache_in(tmp_path)

    def killed(at: int) -> None:
        get, left = Store.get, iter(range(at))

        def or_die(store: Store, name: str, target: Path):
            if next(left, None) is None:
                target.write_bytes(b"a half")
                os.kill(os.getpid(), signal.SIGKILL)
            return get(store, name, target)

        Store.get = or_die  # type: ignore[method-assign]
        brought(mirrored, "3", cache)

    for at in range(len(sent.checkpoint_parts)):
        if (child := os.fork()) == 0:
            killed(at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert snapshot(cache.folder) == {}
        assert list(cache.folder.rglob(".tmp-*"))  # the control: it had begun
    again, _ = brought(mirrored, "3", cache)
    assert_same(ckpt.load(again, verify=True), ckpt.load(path), but=set())
    assert not list(cache.folder.rglob(".tmp-*"))


def used_by_nobody() -> None:
    """Let go of what this process uses, as its end does."""
    for locks in caching._in_use.values():
        for lock in locks:
            lock.close()
    caching._in_use.clear()


def test_the_least_recently_used_goes_first_and_what_is_used_stays(mirror, tmp_path):
    size = save_of(mirror, 1).size
    cache = cache_in(tmp_path, limit=3 * size + size // 2)
    paths = {step: brought(mirror, f"one/{step}", cache)[0] for step in (1, 2, 3)}
    used_by_nobody()
    for age, step in enumerate((1, 3, 2)):  # the last use of each, oldest first
        os.utime(lock_of(paths[step].parent), (age, age))
    held = brought(mirror, "one/1", cache)[0]  # by this process, and used now
    brought(mirror, "4", cache)
    assert (held.exists(), paths[2].exists(), paths[3].exists()) == (True, True, False)
    make_room(cache, need=cache.limit)  # no entry may stay, but for those in use
    assert sorted(ckpt.load(path).step for path in cache.folder.rglob("*.pt")) == [1, 4]
    used_by_nobody()
    make_room(cache, need=cache.limit)
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


def test_what_another_process_uses_stays(mirror, tmp_path):
    cache, (reading, writing) = cache_in(tmp_path), os.pipe()
    if (child := os.fork()) == 0:
        brought(mirror, "one/3", cache)
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    try:
        make_room(cache, need=cache.limit)
        assert len(list(cache.folder.rglob("*.pt"))) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    make_room(cache, need=cache.limit)
    assert list(cache.folder.rglob("*.pt")) == []


def test_a_base_that_other_adapters_need_stays(mirror, tmp_path):
    cache = cache_in(tmp_path)
    path, _ = brought(mirror, "one/3", cache)
    uses = {"sha256": "0" * 64, "source": str(path), "step": 3}
    assert ckpt.note_use(uses, run_id="adapters", checkpoint_dir=tmp_path / "checkpoints")
    used_by_nobody()
    make_room(cache, need=cache.limit)
    assert path.exists()


def test_more_than_the_bound_is_refused_before_anything_is_deleted(mirror, tmp_path):
    size = save_of(mirror, 1).size
    path, _ = brought(mirror, "one/1", cache_in(tmp_path))
    with pytest.raises(CacheFullError) as caught:
        brought(mirror, "one/2", cache_in(tmp_path, limit=size // 2))
    assert (caught.value.need, path.exists()) == (save_of(mirror, 2).size, True)
    with pytest.raises(CacheFullError):
        bring_all(named(mirror), cache_in(tmp_path, limit=3 * size), certain=False, say=print, pause=no_pause)


def test_processes_that_want_the_same_at_once_download_it_once(mirror, tmp_path):
    """Both begin before either has it; the one that comes second waits for the first."""
    cache, log = cache_in(tmp_path), tmp_path / "downloads"
    get = Store.get

    def noted(store: Store, name: str, target: Path):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
        return get(store, name, target)

    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 9
            try:
                Store.get = noted  # type: ignore[method-assign]
                path, _ = brought(mirror, "one/3", cache)
                code = 0 if ckpt.load(path, verify=True).step == 3 else 8
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(log.read_text(encoding="utf-8").splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Looked at without downloading tensors.


class Counted:
    """Counts the bytes that are read of a store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        for name in ("read", "ranges"):
            monkeypatch.setattr(Store, name, self._counting(getattr(Store, name)))
        monkeypatch.setattr(Store, "get", lambda *_: pytest.fail("a whole file is downloaded"))

    def _counting(self, method):
        def call(*arguments, **named):
            answer = method(*arguments, **named)
            self.read += len(answer) if isinstance(answer, bytes) else sum(len(data) for _, data in answer)
            return answer

        return call


@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_metadata_and_headers_are_those_of_the_whole_file_and_few_bytes_are_read(tmp_path, layout, monkeypatch):
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout, size=1200)  # 17 MB
    sent = send(mirrored, path, folder)
    counted = Counted(monkeypatch)
    seen = write_headers(mirrored.store, sent, tmp_path / "seen", pause=no_pause)
    assert known_layout(seen).read_metadata(seen) == known_layout(path).read_metadata(path)
    assert ckpt.held(seen) == ckpt.held(path)
    assert counted.read < 4e6 < sent.size
    assert (ckpt.verify(path), bool(ckpt.verify(seen))) == ([], True)  # the control: its tensors are missing


@pytest.mark.parametrize("layout", ["unified", "separated"])
def test_headers_of_many_tensors_are_read_one_by_one(tmp_path, layout, monkeypatch):
    """In one request for all of them, and without the tensors between them."""
    weights = {WEIGHT: torch.zeros(8, 8)} | {f"more.{number}": torch.zeros(100_000) for number in range(30)}
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    path = save(folder, 3, layout=layout, model_state=weights, optimizer_state=None)
    sent = send(mirrored, path, folder)
    counted = Counted(monkeypatch)
    seen = write_headers(mirrored.store, sent, tmp_path / "seen", pause=no_pause)
    assert len(ckpt.held(seen)) == 31
    assert ckpt.held(seen) == ckpt.held(path)
    assert counted.read < 2e6 < sent.size


@pytest.mark.parametrize("how", ["missing", "shorter", "of another save"])
def test_damage_that_shows_in_the_headers_is_reported(tmp_path, how):
    mirrored, folder = known(in_folder(tmp_path / "mirror"), tmp_path), tmp_path / "checkpoints"
    sent, other = (send(mirrored, save(folder, step, size=400), folder) for step in (1, 2))
    file = path_of(mirrored.store, sent.checkpoint_parts[0].object)
    if how == "missing":
        file.unlink()
    elif how == "shorter":
        file.write_bytes(file.read_bytes()[:-7])
    else:
        file.write_bytes(path_of(mirrored.store, other.checkpoint_parts[0].object).read_bytes())
    with pytest.raises(CheckpointError) as caught:
        write_headers(mirrored.store, sent, tmp_path / "seen", pause=no_pause)
    assert caught.value.kind == "damaged"
    assert str(tmp_path / "seen") not in str(caught.value)


def test_ranges_with_little_between_them_are_read_as_one():
    assert joined([(500_000, 500_010), (0, 10), (20, 30), (5, 5), (25, 28)]) == [(0, 30), (500_000, 500_010)]


def test_a_list_names_what_is_damaged_without_reading_a_checkpoint(mirror, monkeypatch):
    half, missing = save_of(mirror, 1), save_of(mirror, 2)
    path_of(mirror.store, half.manifest).write_text("{")
    path_of(mirror.store, missing.checkpoint_parts[0].object).unlink()
    monkeypatch.setattr(Store, "get", lambda *_: pytest.fail("a checkpoint is read"))
    found = listed(named(mirror), pause=no_pause)
    assert [(each.kind, each.step) for each in found] == [("damaged", 0), ("damaged", 2), (None, 3), (None, 4)]
    assert half.manifest in str(found[0].problem)


def test_a_store_that_lists_late_is_asked_for_what_its_list_lacks(mirror, monkeypatch):
    monkeypatch.setattr(Store, "sizes", lambda store: {})
    assert [each.problem for each in listed(named(mirror), pause=no_pause)] == [None] * 4
