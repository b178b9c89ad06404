"""A process that has imported torch once and forks a child for each program that a test starts.

A child becomes what `python training.py` would be: it has the descriptors, folder, environment, session and limits that
were asked for, and the program runs as `__main__` at the top of the stack, so that Python itself ends it. The server
imports nothing of this project, and runs no operation of torch: the threads of OpenMP do not survive a fork.

programs.py sends a request as one message on the control socket: a `Start` as JSON, with these descriptors: a socket for
this child, stdin, stdout, stderr, and one that the child inherits, if any. On the child's socket the server reports its
number, then its wait status. The child stays a zombie until the other side answers or closes the socket, as every child
does until somebody waits for it.
"""

import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import importlib.machinery
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import termios
import types
import warnings
from typing import Any, TypedDict

IMPORTED = (  # what a training imports, with their parts: none of this project
    "torch", "torch._dynamo", "torch.utils._device", "torch._numpy", "numpy", "dotenv", "filelock", "safetensors.torch",
    "tqdm", "argparse", "difflib", "gettext", "http.client", "csv", "tarfile",
)  # fmt: skip
LARGEST = 2**20  # bytes of a request
Limits = list[tuple[int, tuple[int, int]]]


class Start(TypedDict):
    """A program to start: `python WORDS` as subprocess.Popen would start it."""

    words: list[str]
    folder: str
    environment: dict[str, str]
    umask: int
    limits: Limits
    session: bool
    terminal: bool  # stdin becomes the terminal of the session
    inherits: int  # number of a further descriptor that it inherits, or 0
    closed: list[int]  # which of its three streams it starts without


def own_limits() -> Limits:
    """Return every limit of this process."""
    numbers = {value for name, value in vars(resource).items() if name.startswith("RLIMIT_")}
    return [(number, resource.getrlimit(number)) for number in sorted(numbers)]


def own_terminal() -> None:
    """Make stdin the controlling terminal, so that Ctrl-C there reaches this process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def serve(control: socket.socket) -> tuple[Start, list[int]] | None:
    """Fork a child for each request. Return in the child what it is to start, in the server None when the tests end."""
    running: dict[int, tuple[int, int]] = {}  # descriptor of a process -> its number, and where to report its end
    ended: dict[int, int] = {}  # where its end was reported -> number of the process
    events = select.poll()
    events.register(control, select.POLLIN)
    while True:
        for descriptor, _ in events.poll():
            if descriptor == control.fileno():
                message, descriptors, _, _ = socket.recv_fds(control, LARGEST, 5)
                if not message:
                    return None
                report, *streams = descriptors
                pid = _fork()
                if pid == 0:
                    control.detach()
                    return json.loads(message), streams
                for each in streams:
                    os.close(each)
                _tell(report, pid)
                process = os.pidfd_open(pid)
                running[process] = pid, report
                events.register(process, select.POLLIN)
            elif descriptor in running:
                events.unregister(descriptor)
                os.close(descriptor)
                pid, report = running.pop(descriptor)
                _tell(report, _wait_status(pid))
                ended[report] = pid
                events.register(report, select.POLLIN)
            else:
                events.unregister(descriptor)
                os.waitpid(ended.pop(descriptor), 0)
                os.close(descriptor)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the threads of NumPy's OpenBLAS, which ends them before a fork
        return os.fork()


def _tell(report: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for this process
        os.write(report, str(number).encode())


def _wait_status(pid: int) -> int:
    """Return what os.waitpid would, and leave the process a zombie."""
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert end is not None
    if end.si_code == os.CLD_EXITED:
        return end.si_status << 8
    return end.si_status | (0x80 if end.si_code == os.CLD_DUMPED else 0)


def become(start: Start, streams: list[int]) -> tuple[Any, dict[str, Any]]:
    """Take over everything that a process gets from the program that starts it; return the code and its namespace."""
    kept = [0, 1, 2, *([start["inherits"]] if start["inherits"] else [])]
    for number, descriptor in zip(kept, streams, strict=True):
        os.dup2(descriptor, number)
    for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(before + 1, after)
    if start["session"]:
        os.setsid()
    if start["terminal"]:
        own_terminal()
    os.chdir(start["folder"])
    os.umask(start["umask"])
    for number, limit in start["limits"]:
        if resource.getrlimit(number) != tuple(limit):
            resource.setrlimit(number, tuple(limit))
    _replace_environment(start["environment"])
    option = start["words"][0] == "-u"
    for number in start["closed"]:
        os.close(number)
    _replace_streams(option or bool(os.environ.get("PYTHONUNBUFFERED")), closed=start["closed"])
    return _main(start["words"][option:])


def _replace_environment(environment: dict[str, str]) -> None:
    coerced = {name: os.environ[name] for name in ["LC_CTYPE"] if name in os.environ}  # by Python itself (PEP 538)
    os.environ.clear()
    os.environ.update(coerced | environment)
    tempfile.tempdir = None


def _replace_streams(unbuffered: bool, *, closed: list[int]) -> None:
    """Give sys new streams, buffered as Python buffers those of a process that it starts, and None where one is closed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if number in closed:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        mode = "w" if number else "r"
        like = getattr(sys, name)
        raw: Any = io.FileIO(number, mode, closefd=False)
        raw.name = f"<{name}>"
        binary = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
        text: Any = io.TextIOWrapper(
            binary, like.encoding, like.errors, newline="\n", write_through=unbuffered,
            line_buffering=not unbuffered and (number == 2 or raw.isatty()),
        )  # fmt: skip
        text.mode = mode
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _main(words: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the code and the namespace of a new module `__main__`, and set what `python WORDS` sets."""
    own, module = vars(sys.modules["__main__"]), types.ModuleType("__main__")
    names = vars(module)
    names["__builtins__"] = builtins
    if "__annotations__" in own:  # Python 3.14 makes none
        names["__annotations__"] = {}
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        text, name = words[1].encode(), "<string>"
    else:
        name = os.path.join(os.getcwd(), words[0])
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.realpath(name))
        with open(name, "rb") as file:
            text = file.read()
        names["__file__"] = name
        if "__cached__" in own:
            names["__cached__"] = None
        names["__loader__"] = importlib.machinery.SourceFileLoader("__main__", name)
    sys.modules["__main__"] = module
    sys.excepthook = _print_exception
    importlib.invalidate_caches()
    return compile(text, name, "exec", dont_inherit=True), names


def _print_exception(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print an exception without the frames of this file, which called the program."""
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def end_by_signal() -> None:
    """End as Python does after a KeyboardInterrupt that nobody caught. It forgets that where a library, such as optree, runs code of
    its own as the process ends; this is registered first, so it runs after that.
    """
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def wait_for_start() -> tuple[Any, dict[str, Any]] | None:
    """Import, serve, and return in a child what it is to run."""
    atexit.register(end_by_signal)
    for each in IMPORTED:
        importlib.import_module(each)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    try:
        requested = serve(socket.socket(fileno=int(sys.argv[1])))
    except KeyboardInterrupt:
        requested = None  # the tests end
    return become(*requested) if requested else None


if __name__ == "__main__":
    program = wait_for_start()
    if program is None:
        os._exit(0)
    exec(*program)
