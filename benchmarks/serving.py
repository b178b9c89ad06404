"""Measure scripts/serve_checkpoint.py with a GPT-2 (124M parameters) on a CPU: one client, and many at once.

    python3 benchmarks/serving.py             # about five minutes and 0.5 GB of disk
    python3 benchmarks/serving.py soak 60     # 64 clients for 60 s, some of whom go midway: errors, memory, and whether each text is that of its seed

One client is measured against the same texts without a server, in a process of its own: its first token, and tokens per second. Then as many clients
as CLIENTS at once, against one at a time. In the server's process nothing else computes: OpenMP would keep threads for it.
"""

import contextlib
import http.client
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from measure import compare, header, row  # noqa: E402
from model_server import Served, serving, settings_for  # noqa: E402

from milepost import ckpt, config  # noqa: E402
from milepost.generation.texts import Sampling, texts  # noqa: E402
from milepost.run import fresh, to_record  # noqa: E402
from milepost.runtime.progress import Log  # noqa: E402
from milepost.samples import Loaded, open_named  # noqa: E402

SIZES = {
    "124M": {"N_LAYER": "12", "N_HEAD": "12", "N_EMBD": "768", "TOKENIZER": "gpt2", "BLOCK_SIZE": "256"},
    "small": {"N_LAYER": "4", "N_HEAD": "4", "N_EMBD": "256", "TOKENIZER": "char", "BLOCK_SIZE": "128"},
}
COMMON = {"MODEL_TYPE": "gpt2", "BATCH_SIZE": "1", "COMPILE": "false", "PYTHON_DOTENV_DISABLED": "1", "DEVICE": "cpu"}
NEW, CLIENTS, SOAKING = 48, 16, 64
PROMPT = "Dear Wren, the winter has been long"


def main() -> None:
    """Print the rows, or soak; or write texts without a server, for the process of the server."""
    if sys.argv[1:2] == ["alone"]:
        answer(Path(sys.argv[2]), sys.argv[3])
        return
    soaking = sys.argv[1:2] == ["soak"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(1) as passing:
            passing.submit(save_weights, folder, "small" if soaking else "124M").result()
        if soaking:
            soak(folder, float(sys.argv[2]))
            return
        header()
        for dtype in ("bfloat16", "float32"):
            with serving(folder, CHECKPOINT_PATH="latest", DTYPE=dtype, SERVE_TIMEOUT="3600") as served:
                one_client(served, folder, dtype)
                many_clients(served, dtype)


def answer(folder: Path, dtype: str) -> None:
    """Read a seed and a number of tokens from each line of stdin; print the text as JSON."""
    loaded = open_named("latest", settings_for(folder, DTYPE=dtype), Log())
    for line in sys.stdin:
        print(json.dumps(text_of(loaded, *map(int, line.split()))), flush=True)


def save_weights(folder: Path, size: str) -> None:
    """Save a checkpoint of a fresh model."""
    places = {"CHECKPOINT_DIR": str(folder / "checkpoints"), "RUNS_DIR": str(folder)}
    run = fresh(config.read(COMMON | SIZES[size] | places), Log())
    ckpt.save(to_record(run), folder / "checkpoints")


def text_of(loaded: Loaded, seed: int, tokens: int) -> str:
    """Return a text without a server."""
    ids = loaded.tokenizer.encode(PROMPT)
    how = Sampling(max_new_tokens=tokens, temperature=0.8, top_k=200)
    return "".join(next(texts(loaded.generator, loaded.tokenizer, ids, sampling=how, seed=seed, count=1)))


@contextlib.contextmanager
def alone(folder: Path, dtype: str) -> Iterator[Callable[[int, int], str]]:
    """Yield a function of a seed and a number of tokens that returns a text from a process of its own."""
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


def asked(served: Served, seed: int, tokens: int, *, stream: bool = False) -> str:
    """Return a text from the server."""
    reply = served.complete(PROMPT, seed=seed, max_tokens=tokens, stream=stream)
    values = reply.events if stream else [reply.value]
    return "".join(value["choices"][0]["text"] for value in values)


def one_client(served: Served, folder: Path, dtype: str) -> None:
    """Measure one client that streams against the same texts in a process of their own."""
    with alone(folder, dtype) as write:
        assert asked(served, 1, NEW, stream=True) == write(1, NEW)
        for what, tokens in (("first token", 1), ("tokens/s", NEW)):
            arms = {
                "served": lambda n=tokens: asked(served, 1, n, stream=True),
                "alone": lambda n=tokens: write(1, n),
            }
            taken = compare(arms)
            shown = {arm: f"{1e3 * s:.0f} ms" if tokens == 1 else f"{tokens / s:.1f} tok/s" for arm, s in taken.items()}
            ratio = taken["alone"] / taken["served"]
            row(
                f"one client, 124M {dtype}: {what}",
                ours=shown["served"],
                peer=shown["alone"],
                ratio=ratio,
                bound="0.95",
            )


def many_clients(served: Served, dtype: str) -> None:
    """Measure CLIENTS requests at once against one after the other."""
    seeds = range(CLIENTS)

    def at_once() -> list[str]:
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda seed: asked(served, seed, NEW), seeds))

    def in_turn() -> list[str]:
        return [asked(served, seed, NEW) for seed in seeds]

    assert at_once() == in_turn(), "a text depends on what else is generated"
    taken = compare({"at once": at_once, "in turn": in_turn}, rounds=3, warmups=0)
    rates = {arm: f"{CLIENTS * NEW / seconds:.1f} tok/s" for arm, seconds in taken.items()}
    together = "together" if served.server.catalogue.models["latest"].together else "in turn"
    ratio = taken["in turn"] / taken["at once"]
    row(
        f"{CLIENTS} clients, 124M {dtype} ({together})",
        ours=rates["at once"],
        peer=rates["in turn"],
        ratio=ratio,
        bound="5",
    )


def soak(folder: Path, seconds: float) -> None:
    """Run SOAKING clients for so long, one of eight of whom goes in the middle of each text.

    Raise AssertionError for an error other than 429, another text, or a slot that is not free at the end.
    """
    counts = {"texts": 0, "refused": 0, "left": 0}
    lock = threading.Lock()
    with serving(folder, CHECKPOINT_PATH="latest", SERVE_SLOTS="16", SERVE_QUEUE="32") as served:
        loaded = served.server.catalogue.models["latest"].loaded
        with ThreadPoolExecutor(1) as passing:
            expected = dict(enumerate(passing.map(lambda seed: text_of(loaded, seed, 20 + seed % 30), range(200))))
        began, before = time.monotonic(), memory()

        def client(number: int) -> None:
            seed = number
            while time.monotonic() - began < seconds:
                seed = (seed + 37) % len(expected)
                if number % 8 == 0:
                    leave(served, seed)
                    with lock:
                        counts["left"] += 1
                    continue
                reply = served.complete(PROMPT, seed=seed, max_tokens=20 + seed % 30)
                assert reply.status in (200, 429), reply.body
                with lock:
                    counts["texts" if reply.status == 200 else "refused"] += 1
                if reply.status == 429:
                    time.sleep(float(reply.headers["retry-after"]))
                else:
                    assert reply.value["choices"][0]["text"] == expected[seed]

        with ThreadPoolExecutor(SOAKING) as pool:
            list(pool.map(client, range(SOAKING)))
        while served.server.generating.requests() != (0, 0):
            assert time.monotonic() - began < seconds + 60, "a client that has gone keeps its slot"
            time.sleep(0.1)
        print(f"{counts} in {time.monotonic() - began:.0f} s; memory {before:.0f} MB before, {memory():.0f} MB after")


def leave(served: Served, seed: int) -> None:
    """Ask for a text without end, and close the connection after its first bytes, or those of a refusal."""
    body = json.dumps({"prompt": PROMPT, "stream": True, "seed": seed, "max_tokens": 1 << 20})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port)) as connection:
        connection.request("POST", "/v1/completions", body)
        connection.getresponse().read(1)


def memory() -> float:
    """Return the memory of this process in MB: now where /proc says it, else the most that it had."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
