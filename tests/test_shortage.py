"""Too little memory, disk, quota or inodes is reported as that: never as damage, and never as a full disk with gigabytes free."""

import errno
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from records import in_child, record

from milepost import ckpt
from milepost.ckpt import CheckpointError

MARGIN = 24 * 2**20  # bytes of address space beyond those in use: too few for the file


def opened_with_little_memory(path: Path) -> tuple[str, str]:
    """Open the checkpoint with almost no address space left; return the error's kind and remedy."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN, resource.RLIM_INFINITY))
    try:
        ckpt.load(path)
    except CheckpointError as error:
        return error.kind, str(error.remedy)
    return "none", ""


@pytest.mark.parametrize("layout", ["unified", "stepfiles", "directory"])
def test_too_little_memory_to_map_a_file_is_not_damage(tmp_path, layout):
    path = ckpt.save(record(1, size=4096), tmp_path, layout=layout)  # 64 MiB
    kind, remedy = in_child(lambda: opened_with_little_memory(path))
    assert kind == "lacking"
    assert "memory" in remedy
    assert ckpt.load(path).step == 1


@pytest.mark.parametrize(
    ("code", "word"), [(errno.EFBIG, "ulimit -f"), (errno.EDQUOT, "quota"), (errno.ENOSPC, "the disk is full")]
)
def test_each_lack_of_space_has_its_own_words(tmp_path, code, word):
    free = shutil.disk_usage(tmp_path).free
    words = ckpt.why_not_saved(OSError(code, os.strerror(code)), tmp_path, need=123_456)
    assert word in words
    assert "123,456" in words
    assert str(tmp_path) in words
    assert ("the disk is full" in words) == (code == errno.ENOSPC)
    if code == errno.ENOSPC:
        assert "but not for this user" in words  # there is more than that
        assert "but not for this user" not in ckpt.why_not_saved(OSError(code, ""), tmp_path, need=free * 2)


def test_a_file_system_without_inodes_is_not_full(tmp_path):
    mounting = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=20", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    try:
        for number in range(30):
            try:
                (tmp_path / f"{number}").touch()
            except OSError:
                break
        with pytest.raises(OSError, match="No space left") as caught:
            (tmp_path / "one more").touch()
        words = ckpt.why_not_saved(caught.value, tmp_path, need=1000)
        assert words.startswith(f"no inodes are left in {tmp_path}")
        (tmp_path / "0").unlink()
        assert "inodes" not in ckpt.why_not_saved(caught.value, tmp_path, need=1000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
