"""What a folder's file system lacks, found by trying each operation once, and the free space that it reports.

Network folders and buckets that are mounted often lack something: rename, append, locks, fsync. The other modules of
this package have another way for each.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from milepost.files.mounting import check_mounted, forget_mounts
from milepost.files.reaching import entries, is_unreachable, steadily
from milepost.paths import is_real_folder

TEMPORARY = ".tmp-"  # names that begin so are never read; leftovers of a crash are removed under the folder's lock

RENAME, RENAME_FOLDERS, RENAME_ONTO = "rename", "rename of folders", "rename onto a name"
APPEND, LINKS, LOCKS, SPACE = "append", "hard links", "locks", "free space"
FSYNC, FSYNC_FOLDERS = "fsync", "fsync of folders"

# What is done instead, for people.
INSTEAD = {
    RENAME: "files are written under their final names and count once they are complete",
    RENAME_FOLDERS: "they are written under their final names and count once they are complete",
    RENAME_ONTO: "a file that changes is written over, with a copy beside it meanwhile",
    APPEND: "training.log and metrics.jsonl are written at each checkpoint and at the end",
    LINKS: "best/ holds copies",
    LOCKS: "a file names the process that writes; start a run only once",
    FSYNC: "whether a checkpoint survives a power cut rests on the file system",
    FSYNC_FOLDERS: "whether a checkpoint survives a power cut rests on the file system",
    SPACE: "a full disk shows at a save",
}
# Errors that are no answer to the question, because the disk is full or read-only.
NO_ANSWER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What a call answers that the file system does not have.
NOT_OFFERED = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
# What cannot be tried, because timing decides: rclone may lose the files of a renamed folder until they are uploaded.
LACKED_BY: dict[str, frozenset[str]] = {"fuse.rclone": frozenset({RENAME_FOLDERS})}
FAT_LIMIT = 2**32 - 1  # bytes of a file
FAT = ("vfat", "msdos", "fat32")
# How the types of file systems begin whose files may not answer any more: network folders, and those that a process serves.
AWAY = ("fuse", "nfs", "cifs", "smb", "9p", "virtiofs", "ceph", "lustre", "gpfs", "afs", "beegfs")
STAYS = ("fuse.fuse-overlayfs", "fuseblk")  # a container's own disk, a disk of this computer

_known: dict[int, frozenset[str]] = {}  # by device: a look is kept for the life of the process


def lacks(folder: Path) -> frozenset[str]:
    """Return what the file system of `folder` lacks; nothing where that cannot be found out."""
    try:
        return look(folder)
    except OSError:
        return frozenset()


def look(folder: Path) -> frozenset[str]:
    """Return what the file system of an existing `folder` lacks, tried once for a process.

    Raise OSError if nothing can be written in it or what is written cannot be read back.
    """
    device = os.stat(folder).st_dev
    if device not in _known:
        _known[device] = _tried(folder)
    return _known[device]


def forget() -> None:
    """Forget every look: another file system may have got the number of an earlier one."""
    _known.clear()
    forget_mounts()


def instead(lacking: Collection[str]) -> str:
    """Return what a file system lacks, and what is done instead, as one line of text."""
    ways: dict[str, list[str]] = {}
    for lack in (lack for lack in INSTEAD if lack in lacking):
        ways.setdefault(INSTEAD[lack], []).append(lack)
    return "; ".join(f"no {', '.join(names)}: {way}" for way, names in ways.items())


def not_offered(error: OSError) -> bool:
    """Whether the error of an fsync says that the file system has none."""
    return error.errno in NOT_OFFERED


def free_space(folder: Path) -> int | None:
    """Return the free bytes on the disk of `folder`; None if its file system does not report them."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return None
    return usage.free if usage.total else None


def largest_file(folder: Path) -> int | None:
    """Return the largest size of a file on the disk of `folder`, in bytes, where it is small; None where it is not."""
    return FAT_LIMIT if kind_of(folder) in FAT else None


def kind_of(folder: Path) -> str | None:
    """Return the type of the file system of `folder` as Linux names it, such as ext4; None elsewhere."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        device = os.stat(folder).st_dev
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        return _kind_in(mounts, f"{os.major(device)}:{os.minor(device)}")
    return None


def may_go_away(path: Path) -> bool:
    """Whether a file or folder is on a file system that may stop answering while the process runs, as far as Linux says."""
    kind = kind_of(path) or ""
    return kind.startswith(AWAY) and kind not in STAYS


def _kind_in(mounts: str, device: str) -> str | None:
    lines = (line.split() for line in mounts.splitlines())
    return {words[2]: words[words.index("-") + 1] for words in lines if "-" in words}.get(device)


# ---------------------------------------------------------------------------------------------------------------------
# The trials. Each works on names of its own.


def hidden_name(path: Path) -> Path:
    """Return a new temporary name beside `path`: its name, the process id and eight random digits."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{os.urandom(4).hex()}")


def discard(hidden: Path) -> None:
    """Delete a hidden folder or file without following links. On an error it stays for the next clean-up."""
    with contextlib.suppress(OSError):
        if is_real_folder(hidden):
            shutil.rmtree(hidden, ignore_errors=True)
            if os.path.lexists(hidden):  # it has names that a listing does not show yet
                _delete_below(hidden)
        else:
            hidden.unlink(missing_ok=True)


def _delete_below(folder: Path) -> None:
    for path in entries(folder):
        if is_real_folder(path):
            _delete_below(path)
        else:
            path.unlink(missing_ok=True)
    folder.rmdir()


def _tried(folder: Path) -> frozenset[str]:
    """Try everything below names that no reader looks at; return what failed."""
    name = hidden_name(folder / "look")
    names = [name.with_name(name.name[:-8] + os.urandom(4).hex()) for _ in range(6)]
    file, other, place, moved, linked, lock = names
    try:
        found = {*_write_first(file), *_sync_folder(folder), *LACKED_BY.get(kind_of(folder) or "", ())}
        trials: dict[str, Callable[[], None]] = {
            APPEND: lambda: _append(file),
            LINKS: lambda: os.link(file, linked),
            RENAME: lambda: _rename(file, other),
            RENAME_ONTO: lambda: _rename_onto(file, other),
            RENAME_FOLDERS: lambda: _rename_folder(place, moved),
            LOCKS: lambda: _lock_twice(lock),
            SPACE: lambda: _ask_for_space(folder),
        }
        found |= {lack for lack, trial in trials.items() if lack not in found and not _works(trial, folder)}
        return frozenset(found - ({RENAME_ONTO, RENAME_FOLDERS} if RENAME in found else set()))
    finally:
        for path in names:
            discard(path)


def _works(trial: Callable[[], None], folder: Path) -> bool:
    """Whether the trial ends without an error. Raise OSError where the error is no answer, such as a full disk.

    EIO and its like are an answer if the folder takes another file right afterwards: some systems refuse a link or an
    append with them.
    """
    try:
        trial()
    except NotImplementedError:
        return False
    except OSError as error:
        if error.errno in NO_ANSWER:
            raise
        if is_unreachable(error):
            check_writable(folder)
        return False
    return True


def check_writable(folder: Path) -> None:
    """Raise OSError if the folder is no longer mounted, or does not take a file and give it back."""
    check_mounted(folder)
    file = hidden_name(folder / "look")
    try:
        for _ in _write_first(file):
            pass
    finally:
        discard(file)


def _write_first(file: Path) -> Iterator[str]:
    """Create a file and read it back; yield the fsync that its system lacks. Raise OSError if that fails."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(descriptor, b"one")
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not not_offered(error):
                raise
            yield FSYNC
    finally:
        os.close(descriptor)
    _expect(file, b"one")


def _expect(file: Path, content: bytes) -> None:
    if steadily(file.read_bytes) != content:
        raise OSError(errno.EIO, "what is written cannot be read back", str(file))


def _sync_folder(folder: Path) -> Iterator[str]:
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield FSYNC_FOLDERS
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not not_offered(error):
            raise
        yield FSYNC_FOLDERS
    finally:
        os.close(descriptor)


def _append(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, b"two")
    finally:
        os.close(descriptor)
    _expect(file, b"onetwo")


def _rename(file: Path, other: Path) -> None:
    content = file.read_bytes()
    os.rename(file, other)
    _expect(other, content)


def _rename_onto(file: Path, other: Path) -> None:
    for path, content in ((file, b"three"), (other, b"four")):
        path.unlink(missing_ok=True)  # some systems let nobody write a file again
        path.write_bytes(content)
    os.replace(file, other)
    _expect(other, b"three")


def _rename_folder(place: Path, moved: Path) -> None:
    place.mkdir()
    (place / "file").write_bytes(b"five")
    os.rename(place, moved)
    _expect(moved / "file", b"five")


def _lock_twice(lock: Path) -> None:
    """Lock a file against itself. Windows has locks everywhere."""
    try:
        import fcntl
    except ImportError:
        return
    with open(lock, "wb") as first, open(lock, "wb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise NotImplementedError("two holders at once")


def _ask_for_space(folder: Path) -> None:
    if free_space(folder) is None:
        raise NotImplementedError
