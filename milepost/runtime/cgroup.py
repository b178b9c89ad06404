"""The memory that a container or a batch system leaves to this process: /proc/meminfo knows only the whole machine."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# The files of both versions: the limit, what is used, and the line of memory.stat with what can be taken back at once.
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_limit() -> int | None:
    """Return the bytes that this process and those beside it may use at most; None without a limit."""
    return min((limit for limit, _ in _limits()), default=None)


def memory_left() -> int | None:
    """Return the bytes that are left of the limit; None without a limit."""
    return min((max(0, limit - used) for limit, used in _limits()), default=None)


def _limits() -> list[tuple[int, int]]:
    """Return limit and use of each control group that this process is in, from its own to the root."""
    found = []
    for folder in _folders():
        for names in FILES:
            limit, used = (_number(folder / name) for name in names[:2])
            if limit is not None and used is not None:
                found.append((limit, used - _inactive(folder, names[2])))
    return found


def _folders() -> list[Path]:
    """Return the folders of this process's groups. In a container its group is often mounted as the root."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    folders = []
    for line in lines:
        number, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "")
        if number == "0" or "memory" in controllers.split(","):
            base = ROOT if number == "0" else ROOT / "memory"
            own = base / path.strip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
    return list(dict.fromkeys(folders))


def _number(path: Path) -> int | None:
    """Return the number in a file; None without the file, or where it says "max" or a number that means none."""
    try:
        value = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return value if value < 2**60 else None


def _inactive(folder: Path, name: str) -> int:
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(lines[name])
    except (OSError, ValueError, KeyError):
        return 0
