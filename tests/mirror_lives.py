"""A process that forks runs with a mirror, and kills them at an operation of their upload. Its arguments: a folder, and
lives as JSON, of which each has a name, the variables of its run, where it is killed (`operation`, from 0) and how.

As tests/saver.py, it imports torch and runs no operation before it forks.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drive import train

from milepost import run_checkpoints, run_mirror
from milepost.mirror import Store

submit = run_mirror.copy_to_mirror


def killed_at(operation: int, *, halves: bool) -> None:
    """End this process at that operation on the store; with `halves`, in the middle of a file."""
    done = iter(range(operation))

    def counted(action: Callable[..., None]) -> Callable[..., None]:
        def call(store: Store, name: str, *arguments: object, **named: object) -> None:
            if "/lease/" not in name and next(done, None) is None:  # which beats by a clock
                if halves and arguments:
                    source = arguments[0] if isinstance(arguments[0], bytes) else Path(str(arguments[0])).read_bytes()
                    path = Path(store.root) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(source[: len(source) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            action(store, name, *arguments, **named)

        return call

    Store.put, Store.delete = counted(Store.put), counted(Store.delete)  # type: ignore[method-assign,assignment]


def manifest_first() -> None:
    """Let each manifest be written before the checkpoint that it names: what the tests must notice."""
    late: dict[str, Path] = {}
    put, size = Store.put, Store.size

    def put_late(store: Store, name: str, source: Path | bytes, **named: object) -> None:
        if "/checkpoints/" in name and isinstance(source, Path):
            late[name] = source
            return
        put(store, name, source)
        while name.endswith("manifest.json") and late:
            put(store, *late.popitem())

    Store.put = put_late  # type: ignore[method-assign,assignment]
    Store.size = lambda store, name: late[name].stat().st_size if name in late else size(store, name)  # type: ignore[method-assign]


def waiting(run, saved, folder, *, step):
    """Submit a checkpoint and wait until it is mirrored, so that the operations always come in one order."""
    submit(run, saved, folder, step=step)
    run.uploader.finish()
    with open(Path(run.settings.runs_dir).parent / "mirrored", "a", encoding="utf-8") as file:
        file.write(f"{step}\n")


def forked(folder: Path, prepare: Callable[[], None], **variables: str) -> int:
    """Train in a child; return its exit status, negative for a signal."""
    if (child := os.fork()) == 0:
        code = 99
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run_checkpoints.copy_to_mirror = waiting
            prepare()
            code, said = train(folder, **variables)
            (folder / "said").write_text(said, encoding="utf-8")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def live(folder: Path, life: dict) -> None:
    """Train until the kill, lose the machine, and resume on an empty disk."""
    folder.mkdir(parents=True)
    variables = life["variables"] | {"CHECKPOINT_MIRROR": f"file://{folder / 'mirror'}"}

    def prepare() -> None:
        if life["operation"] is not None:
            killed_at(life["operation"], halves=life["halves"])
        if life.get("manifest_first"):
            manifest_first()

    status = forked(folder, prepare, **variables)
    again = None
    if life["operation"] is not None:
        if (folder / "mirror").exists():
            shutil.copytree(folder / "mirror", folder / "left")  # as it was when the machine was lost
        if (folder / "mirrored").exists():
            shutil.move(folder / "mirrored", folder / "left" / "reported")
        for name in ("checkpoints", "runs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        again = forked(folder, lambda: None, **variables, RESUME="auto")
    print(json.dumps([life["name"], status, again]), flush=True)


if __name__ == "__main__":
    for life in json.loads(sys.argv[2]):
        live(Path(sys.argv[1]) / life["name"], life)
