"""What the system reports of a folder: every name that changed, or that anything may have."""

import os
import sys
from pathlib import Path

import pytest

from milepost.files import Watch, watching

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports what changes in a folder")


def test_every_name_that_changes_is_reported_once(tmp_path):
    (tmp_path / "before").write_text("one")
    (tmp_path / "inside").mkdir()
    watch = Watch(tmp_path)
    assert watch.changed() == set()
    (tmp_path / "made\nnew").write_text("one")
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "link").symlink_to("after")
    os.link(tmp_path / "after", tmp_path / "second")
    os.mkfifo(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "inside" / "file").write_text("in another folder")
    assert watch.changed() == {"made\nnew", "before", "after", "link", "second", os.fsdecode(b"\xff")}
    assert watch.changed() == set()
    (tmp_path / "second").write_text("written in place")
    (tmp_path / "after").unlink()
    assert watch.changed() == {"second", "after"}


def test_a_folder_under_two_paths_reports_to_both(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    watches = [Watch(folder), Watch(tmp_path / "link"), Watch(folder)]
    del watches[2]
    (folder / "file").touch()
    assert [watch.changed() for watch in watches] == [{"file"}, {"file"}]


def test_a_folder_inside_is_reported_by_its_name(tmp_path):
    (tmp_path / "inside").mkdir()
    watch = Watch(tmp_path)
    assert watch.include("inside")
    assert watch.changed() == {"inside"}  # for what happened before
    assert watch.include("inside")
    assert watch.changed() == set()
    (tmp_path / "inside" / "file").touch()
    assert watch.changed() == {"inside"}
    (tmp_path / "inside").rename(tmp_path / "other")
    (tmp_path / "inside").mkdir()
    assert watch.include("inside")
    assert watch.changed() == {"inside", "other"}
    (tmp_path / "inside" / "file").touch()
    assert watch.changed() == {"inside"}
    (tmp_path / "inside" / "file").unlink()
    (tmp_path / "inside").rmdir()
    assert watch.changed() == {"inside"}
    assert not watch.include("inside")
    assert watch.changed() == set()


def replace(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir()


def make_more_changes_than_are_kept(folder: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(most // 2 + 1):  # each renames reports two names
        os.rename(folder / "a", folder / "b")
        os.rename(folder / "b", folder / "a")


@pytest.mark.parametrize(
    "change", [replace, make_more_changes_than_are_kept, lambda folder: (folder / "a").unlink() or folder.rmdir()]
)
def test_where_what_changed_is_unknown_nothing_is_assumed(tmp_path, change):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").touch()
    watch, other = Watch(folder), Watch(tmp_path)
    change(folder)
    assert watch.changed() is None
    assert other.changed() != set()


def test_a_process_takes_none_of_the_changes_that_its_parent_waits_for(tmp_path):
    watch = Watch(tmp_path)
    (tmp_path / "file").touch()
    child = os.fork()
    if child == 0:
        inside = Watch(tmp_path)
        (tmp_path / "child").touch()
        os._exit(0 if (watch.changed(), inside.changed()) == (None, {"child"}) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert watch.changed() == {"file", "child"}


def test_what_another_computer_may_change_is_not_watched(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="not watched"):
        Watch(Path("/proc"))
    monkeypatch.setattr(watching, "WATCHED", ())
    with pytest.raises(OSError, match="not watched"):
        Watch(tmp_path)
