"""The memory limit of a container counts as the machine's memory."""

from pathlib import Path

import pytest
import torch

from milepost.runtime import cgroup, hardware

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write a tree of groups: {folder: {file: text}}, and what this process is in."""

    def written(membership: str, files: dict[str, dict[str, str]]) -> None:
        for folder, texts in files.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (tmp_path / folder / name).write_text(text + "\n")
        (tmp_path / "membership").write_text(membership + "\n")
        monkeypatch.setattr(cgroup, "ROOT", tmp_path)
        monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")

    return written


def second(limit: object, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7"
    return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}


def first(limit: object, used: int, inactive: int = 0) -> dict[str, str]:
    stat = f"cache 5\ntotal_inactive_file {inactive}"
    return {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used), "memory.stat": stat}


def test_version_2_in_a_container_whose_group_is_the_root(groups):
    groups("0::/", {".": second(2 * GIB, GIB, inactive=GIB // 2)})
    assert (cgroup.memory_limit(), cgroup.memory_left()) == (2 * GIB, 3 * GIB // 2)


def test_the_lowest_limit_of_the_groups_above_counts(groups):
    groups("0::/batch/job", {"batch": second(GIB, 0), "batch/job": second("max", 5)})
    assert (cgroup.memory_limit(), cgroup.memory_left()) == (GIB, GIB)


def test_version_1(groups):
    groups("5:cpu:/x\n4:cpuset,memory:/docker/ab", {"memory": first(3 * GIB, GIB, inactive=7)})
    assert (cgroup.memory_limit(), cgroup.memory_left()) == (3 * GIB, 2 * GIB + 7)


@pytest.mark.parametrize("limit", ["max", 9223372036854771712, "nonsense", ""])
def test_no_limit(groups, limit):
    groups("0::/\n4:memory:/", {".": second(limit, 5), "memory": first(limit, 5)})
    assert (cgroup.memory_limit(), cgroup.memory_left()) == (None, None)


def test_systems_without_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "MEMBERSHIP", Path("/nonexistent/cgroup"))
    assert cgroup.memory_limit() is None
    everything = hardware.all_memory(torch.device("cpu"))
    assert everything is None or everything > 0


def test_memory_of_the_machine_is_what_the_group_allows(groups):
    groups("0::/", {".": second(64 * 2**20, 2**20)})
    assert hardware.all_memory(torch.device("cpu")) == 64 * 2**20
    assert hardware.free_main_memory() == 63 * 2**20
