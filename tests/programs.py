"""Starts programs for tests as subprocess does, without the seconds that each would take to import torch.

A program is forked from a process that has imported torch (forkserver.py), unless the test asks for a `fresh`
interpreter or a fork would differ from one. CONTRIBUTING.md says when a test needs a fresh interpreter.
"""

import atexit
import json
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import forkserver
from work import HANGING

# Variables that the interpreter or a library reads once, as it starts. Each set of values of SERVED has a server of its
# own; a program with other variables of this kind is started afresh. How threads wait changes no result.
ONCE = re.compile(
    "PYTHON(?!_DOTENV_DISABLED)|LD_|LC_|LANG|TZ|MALLOC|OMP_(?!WAIT_)|GOMP_|KMP_|MKL_|OPENBLAS_|ONEDNN_|DNNL_|ATEN_|CUDA_"
    "|PYTORCH_|TORCH(?!ELASTIC_|_NCCL_)|TQDM_"
)
SERVED = re.compile("LD_LIBRARY_PATH|LC_|LANG|OMP_NUM_THREADS|PYTHON(IOENCODING|UNBUFFERED|DONTWRITEBYTECODE)$")
INHERITED = "TEST_FORK_SERVER"  # a variable with the number of the control socket
# All that a program needs of this one's variables. Threads that spin while they wait take the time of the tests beside it.
LEAST = {"PATH": os.environ.get("PATH", os.defpath), "OMP_WAIT_POLICY": "PASSIVE"}
Variables = tuple[tuple[str, str], ...]
SERVERS = 3  # at most: each takes some hundred megabytes
OPTIONS = {"cwd", "env", "stdin", "stdout", "stderr", "text", "encoding", "errors", "start_new_session", "preexec_fn"}


def run(
    words: Sequence[str | Path], *, fresh: bool = False, input: str | bytes | None = None, capture_output: bool = False,
    timeout: float = HANGING, check: bool = False, **options: Any,
) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """Do what subprocess.run does."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(words, fresh=fresh, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def start(
    words: Sequence[str | Path], *, fresh: bool = False, starts_others: bool = False, closed: Sequence[int] = (),
    **options: Any,
) -> "subprocess.Popen[Any]":  # fmt: skip
    """Do what subprocess.Popen does. A program that `starts_others` may have its own forked: see `inherit_server`.

    `closed`: which of its streams the program starts without, as a shell's `<&- >&- 2>&-`.
    """
    texts = [os.fspath(word) for word in words]
    server = None if fresh else _server_for(texts, options)
    if not server:
        closing = {"preexec_fn": lambda: [os.close(number) for number in closed]} if closed else {}
        return subprocess.Popen(texts, **options | closing)
    return Forked(server, texts, **options, closed=closed, pass_fds=[server.fileno()] if starts_others else ())


def inherit_server() -> None:
    """Let the programs that this one starts be forked by the server that forked it, if it did."""
    if number := os.environ.pop(INHERITED, None):
        _servers[_read_once(os.environ)] = socket.socket(fileno=int(number))


class Forked(subprocess.Popen[Any]):
    """A child of the fork server, with all that a Popen can do. It replaces the methods that start and wait."""

    def __init__(self, server: socket.socket, words: list[str], *, closed: Sequence[int], **options: Any) -> None:
        self.server, self.closed = server, list(closed)
        super().__init__(words, **options)

    def _execute_child(  # type: ignore[no-untyped-def]
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, p2cread,
        p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask, start_new_session, *_,
    ) -> None:  # fmt: skip
        inherits = max(pass_fds, default=0)
        request: forkserver.Start = {
            "words": args[1:], "folder": os.path.abspath(cwd or "."), "umask": _umask(),
            "limits": forkserver.own_limits(),
            "environment": dict(os.environ if env is None else env) | ({INHERITED: str(inherits)} if inherits else {}),
            "session": start_new_session, "terminal": preexec_fn is not None, "inherits": inherits,
            "closed": self.closed,
        }  # fmt: skip
        self.report, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        streams = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        with other:
            socket.send_fds(self.server, [json.dumps(request).encode()], [other.fileno(), *streams, *pass_fds])
        self._child_created = True
        self.pid = self._told()
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _told(self) -> int:
        message = self.report.recv(32)
        assert message, "the fork server has ended"
        return int(message)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Return the number and status of the process if it has ended, as os.waitpid does; then its number is free."""
        if wait_flags & os.WNOHANG and not select.select([self.report], [], [], 0)[0]:
            return 0, 0
        with self.report:
            status = self._told()
            self.report.shutdown(socket.SHUT_WR)
            self.report.recv(1)
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG) if self.returncode is None else (0, 0)
                if pid:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _server_for(words: list[str], options: Mapping[str, Any]) -> socket.socket | None:
    """Return the control socket of the server that can fork this program, or None."""
    env = options.get("env")
    once = _read_once(os.environ if env is None else env)
    served = (
        sys.platform == "linux"
        and words[0] == sys.executable
        and _is_program(words[1:], Path(options.get("cwd") or "."))
        and set(options) <= OPTIONS
        and options.get("preexec_fn") in (None, forkserver.own_terminal)
        and all(SERVED.match(name) for name, _ in once)
    )
    return _server(once) if served else None


def _read_once(environment: Mapping[str, str]) -> Variables:
    return tuple(sorted((name, value) for name, value in environment.items() if ONCE.match(name)))


def _is_program(words: list[str], folder: Path) -> bool:
    """Whether the words after python are a file, or -c and code; -u may come first."""
    words = words[words[:1] == ["-u"] :]
    return words[:1] == ["-c"] or (bool(words) and words[0].endswith(".py") and (folder / words[0]).is_file())


def _server(once: Variables) -> socket.socket | None:
    if once not in _servers and len(_servers) < SERVERS:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, forkserver.__file__, str(theirs.fileno())], env={"OMP_WAIT_POLICY": "PASSIVE"} | dict(once), pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        atexit.register(process.wait)
        atexit.register(ours.close)  # first: its end is the end of the server
        _servers[once] = ours
    return _servers.get(once)


_servers: dict[Variables, socket.socket] = {}
