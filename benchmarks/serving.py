"""Measure scripts/serve_checkpoint.py with a GPT-2 (124M parameters) on a CPU: one client, and many at once.

    python3 benchmarks/serving.py             # about five minutes and 0.5 GB of disk
    python3 benchmarks/serving.py small       # the same with a small model, in a minute: to try the benchmark
    python3 benchmarks/serving.py soak 60     # 64 clients for 60 s, some of whom go midway: errors, memory, and whether each text is that of its seed

The server is the script, in a process of its own, and the clients are in this process, so that neither waits for the other's interpreter. One client
is measured against the same texts without a server, in another process: its first token, and tokens per second; the first token of a text that
continues an earlier one against one that is read anew. Then as many clients as CLIENTS at
once, against one at a time.
"""

import contextlib
import http.client
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from measure import compare, header, row  # noqa: E402

SIZES = {
    "124M": {"N_LAYER": "12", "N_HEAD": "12", "N_EMBD": "768", "TOKENIZER": "gpt2", "BLOCK_SIZE": "256"},
    "small": {"N_LAYER": "4", "N_HEAD": "4", "N_EMBD": "256", "TOKENIZER": "char", "BLOCK_SIZE": "128"},
}
COMMON = {"MODEL_TYPE": "gpt2", "BATCH_SIZE": "1", "COMPILE": "false", "PYTHON_DOTENV_DISABLED": "1", "DEVICE": "cpu"}
NEW, CLIENTS, SOAKING, SEEDS = 48, 16, 64, 200
PROMPT = "Dear Wren, the winter has been long"
SAID = PROMPT * 24  # about 200 tokens of GPT-2, of which a further request of the conversation reads only the last few
SAMPLING = {"temperature": 0.8, "top_k": 200}
START_SECONDS, STOP_SECONDS = 300, 30


def main() -> None:
    """Print the rows, or soak; or save weights or write texts, for a process of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the server would outlive this process
    match sys.argv[1:]:
        case ["save", folder, size]:
            save_weights(Path(folder), size)
        case ["alone", folder, dtype]:
            answer(Path(folder), dtype)
        case ["soak", seconds]:
            with weights("small") as folder:
                soak(folder, float(seconds))
        case [] | ["small"] as sizes:
            size = sizes[0] if sizes else "124M"
            with weights(size) as folder:
                header()
                for dtype in ("bfloat16", "float32"):
                    with served(folder, DTYPE=dtype, SERVE_TIMEOUT="3600") as server:
                        one_client(server, folder, f"{size} {dtype}")
                        conversation(server, f"{size} {dtype}")
                        many_clients(server, f"{size} {dtype}")
        case _:
            sys.exit(__doc__)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@contextlib.contextmanager
def weights(size: str) -> Iterator[Path]:
    """Yield a folder with a checkpoint of a fresh model, which another process saved."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "save", folder, size], check=True)
        yield Path(folder)


def save_weights(folder: Path, size: str) -> None:
    """Save a checkpoint of a fresh model."""
    from milepost import ckpt, config
    from milepost.run import fresh, to_record
    from milepost.runtime.progress import Log

    run = fresh(config.read(COMMON | SIZES[size] | places(folder)), Log())
    ckpt.save(to_record(run), folder / "checkpoints")


def places(folder: Path) -> dict[str, str]:
    """Return the settings that name the folders of a process."""
    return {"CHECKPOINT_DIR": str(folder / "checkpoints"), "RUNS_DIR": str(folder / "runs")}


def answer(folder: Path, dtype: str) -> None:
    """Read a seed and a number of tokens from each line of stdin; print the text as JSON."""
    from milepost import config
    from milepost.generation.texts import Sampling, texts
    from milepost.runtime.progress import Log
    from milepost.samples import open_named

    settings = config.read({"PYTHON_DOTENV_DISABLED": "1", "DEVICE": "cpu", "DTYPE": dtype} | places(folder))
    loaded = open_named("latest", settings, Log())
    ids = loaded.tokenizer.encode(PROMPT)
    for line in sys.stdin:
        seed, tokens = map(int, line.split())
        how = Sampling(max_new_tokens=tokens, **SAMPLING)
        drawn = next(texts(loaded.generator, loaded.tokenizer, ids, sampling=how, seed=seed, count=1))
        print(json.dumps("".join(drawn)), flush=True)


@contextlib.contextmanager
def alone(folder: Path, dtype: str) -> Iterator[Callable[[int, int], str]]:
    """Yield a function of a seed and a number of tokens that returns a text from a process without a server."""
    command = [sys.executable, __file__, "alone", str(folder), dtype]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        stdin, stdout = process.stdin, process.stdout

        def ask(seed: int, tokens: int) -> str:
            stdin.write(f"{seed} {tokens}\n")
            stdin.flush()
            return json.loads(stdout.readline())

        yield ask
        stdin.close()


class Server(NamedTuple):
    """The script in a process of its own, its port, and the lines that it logs."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str]

    def get(self, path: str) -> str:
        """Return what the server answers to a GET; raise OSError if it does not listen yet."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def ask(
        self, seed: int, tokens: int, *, stream: bool = False, prompt: str = PROMPT
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Return status, value and headers of the answer to a prompt; the value of a stream is its text."""
        body = {"prompt": prompt, "seed": seed, "max_tokens": tokens, "stream": stream, **SAMPLING}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            if not stream:
                return response.status, json.loads(response.read()), response.headers
            pieces = [json.loads(line[6:])["choices"][0]["text"] for line in response if line.startswith(b"data: {")]
            return response.status, "".join(pieces), response.headers

    def text(self, seed: int, tokens: int, *, stream: bool = False, prompt: str = PROMPT) -> str:
        """Return a text, which must not be refused."""
        status, value, _ = self.ask(seed, tokens, stream=stream, prompt=prompt)
        assert status == 200, value
        return value if stream else value["choices"][0]["text"]

    @property
    def busy(self) -> float:
        """How many requests run or wait."""
        found = re.findall(r"^milepost_requests_(?:running|waiting) (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, found))

    @property
    def memory(self) -> float | None:
        """The memory of the server in MB where /proc says it."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return None
        return pages * resource.getpagesize() / 1e6


@contextlib.contextmanager
def served(folder: Path, **changes: str) -> Iterator[Server]:
    """Start the script on the checkpoint of the folder; yield it when it accepts requests, and end it with SIGTERM."""
    values = {"CHECKPOINT_PATH": "latest", "PORT": "0", "PYTHON_DOTENV_DISABLED": "1", "DEVICE": "cpu"}
    environment = os.environ | values | places(folder) | changes
    command = [sys.executable, str(ROOT / "scripts" / "serve_checkpoint.py")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stderr or ()))  # until it ends
    reading.start()
    try:
        yield begun(process, lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_SECONDS) == 0, lines
    finally:
        process.kill()
        process.wait()
        reading.join()


def begun(process: subprocess.Popen[str], lines: list[str]) -> Server:
    """Return the server when /health answers; raise RuntimeError with what it logged if it ends before, or takes too long."""
    ends = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < ends:
        if found := re.search(r"^listening on http://127\.0\.0\.1:(\d+)/", "".join(lines), re.MULTILINE):
            server = Server(process, int(found[1]), lines)
            with contextlib.suppress(OSError, ValueError):
                if json.loads(server.get("/health")) == {"status": "ok"}:
                    return server
        time.sleep(0.1)
    raise RuntimeError(f"the server did not begin: {''.join(lines)}")


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def one_client(server: Server, folder: Path, what: str) -> None:
    """Measure one client that streams against the same texts in a process of their own."""
    with alone(folder, what.split()[-1]) as write:
        assert server.text(1, NEW, stream=True) == write(1, NEW)
        for figure, tokens, rounds in (("first token", 1, 101), ("tokens/s", NEW, 7)):
            arms = {"served": lambda n=tokens: server.text(1, n, stream=True), "alone": lambda n=tokens: write(1, n)}
            taken = compare(arms, rounds=rounds)
            shown = {arm: f"{1e3 * s:.0f} ms" if tokens == 1 else f"{tokens / s:.1f} tok/s" for arm, s in taken.items()}
            ratio = taken["alone"] / taken["served"]
            row(f"one client, {what}: {figure}", ours=shown["served"], peer=shown["alone"], ratio=ratio, bound="0.95")


def conversation(server: Server, what: str) -> None:
    """Measure the first token after a text that continues an earlier one, against one that differs from the beginning."""
    words = itertools.count()
    arms = {
        "continues": lambda: server.text(1, 1, stream=True, prompt=f"{SAID} {next(words)}"),
        "anew": lambda: server.text(1, 1, stream=True, prompt=f"{next(words)} {SAID}"),
    }
    taken = compare(arms, rounds=15)
    shown = {arm: f"{1e3 * seconds:.0f} ms" for arm, seconds in taken.items()}
    ratio = taken["anew"] / taken["continues"]
    row(f"first token of a conversation, {what}", ours=shown["continues"], peer=f"{shown['anew']} anew", ratio=ratio)


def many_clients(server: Server, what: str) -> None:
    """Measure CLIENTS requests at once against one after the other."""
    seeds = range(CLIENTS)

    def at_once() -> list[str]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda seed: server.text(seed, NEW), seeds))

    def in_turn() -> list[str]:
        return [server.text(seed, NEW) for seed in seeds]

    assert at_once() == in_turn(), "a text depends on what else is generated"
    taken = compare({"at once": at_once, "in turn": in_turn}, rounds=3, warmups=0)
    rates = {arm: f"{CLIENTS * NEW / seconds:.1f} tok/s" for arm, seconds in taken.items()}
    (together,) = re.findall("requests (together|in turn)", "".join(server.lines))
    ratio = taken["in turn"] / taken["at once"]
    row(f"{CLIENTS} clients, {what} ({together})", ours=rates["at once"], peer=rates["in turn"], ratio=ratio, bound="5")


def soak(folder: Path, seconds: float) -> None:
    """Run SOAKING clients for so long, one of eight of whom goes in the middle of each text.

    Raise AssertionError for an error other than 429, another text, or a slot that is not free at the end.
    """
    counts = {"texts": 0, "refused": 0, "left": 0}
    lock = threading.Lock()

    def count(what: str) -> None:
        with lock:
            counts[what] += 1

    def client(number: int) -> None:
        seed = number
        while time.monotonic() - began < seconds:
            seed = (seed + 37) % len(expected)
            if number % 8 == 0:
                leave(server, seed)
                count("left")
                continue
            status, value, headers = server.ask(seed, 20 + seed % 30)
            assert status in (200, 429), value
            count("texts" if status == 200 else "refused")
            if status == 429:
                time.sleep(float(headers["retry-after"]))
            else:
                assert value["choices"][0]["text"] == expected[seed]

    with served(folder, SERVE_SLOTS="16", SERVE_QUEUE="32", DTYPE="float32") as server:
        with alone(folder, "float32") as write:
            expected = [write(seed, 20 + seed % 30) for seed in range(SEEDS)]
        server.text(0, NEW)
        began, before = time.monotonic(), server.memory
        with ThreadPoolExecutor(SOAKING) as pool:
            list(pool.map(client, range(SOAKING)))
        while server.busy:
            assert time.monotonic() - began < seconds + 60, "a client that has gone keeps its slot"
            time.sleep(0.1)
        grown = "" if before is None else f"; memory of the server {before:.0f} MB before, {server.memory:.0f} MB after"
        print(f"{counts} in {time.monotonic() - began:.0f} s{grown}")


def leave(server: Server, seed: int) -> None:
    """Ask for a text without end, and close the connection after its first bytes, or those of a refusal."""
    body = json.dumps({"prompt": PROMPT, "stream": True, "seed": seed, "max_tokens": 1 << 20})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().read(1)


if __name__ == "__main__":
    main()
