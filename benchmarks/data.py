"""Measure text to tokens to batches: speed, memory, and how long a training step waits for its batch.

    python3 benchmarks/data.py            # about two minutes and 0.7 GB of disk

The text is the bundled one, its sentences shuffled. "In memory" tokenizes chunks in memory; "file to files" also reads, checks,
hashes and writes, against the same peer. The cap limits the process's own memory (RLIMIT_DATA), above its baseline.
"""

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from measure import compare, header, not_measured, row  # noqa: E402

import training  # noqa: E402
from milepost import config  # noqa: E402
from milepost.run import fresh  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402
from milepost.text import tokenization  # noqa: E402
from milepost.text.chunks import rechunk  # noqa: E402
from milepost.text.corpus import open_corpus  # noqa: E402
from milepost.text.scan import scan  # noqa: E402
from milepost.text.token_files import CHUNK, prepare, token_ids  # noqa: E402
from milepost.text.tokenization.bpe import check_bpe  # noqa: E402
from milepost.text.tokenization.gpt2 import gpt2_encoding  # noqa: E402

CAP = 64  # MB
SIZES = {  # name of the model: its settings
    "0.8M": {"N_LAYER": "4", "N_HEAD": "4", "N_EMBD": "128", "BLOCK_SIZE": "64", "BATCH_SIZE": "12"},
    "10.7M": {"N_LAYER": "6", "N_HEAD": "6", "N_EMBD": "384", "BLOCK_SIZE": "256", "BATCH_SIZE": "16"},
}


def main() -> None:
    """Print the rows."""
    header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, megabytes in (("gpt2", 64), ("bpe", 8), ("char", 64)):
            tokenizing(kind, written(folder / f"{kind}.txt", megabytes), folder)
        under_a_cap(written(folder / "large.txt", 4 * CAP), folder)
        for model in SIZES:
            waiting(model, folder)


def written(path: Path, megabytes: int) -> Path:
    """Write a file of the bundled text's sentences, shuffled again for each repetition."""
    draw, size = random.Random(1), megabytes * 10**6
    sentences = re.split(r"(?<=[.!?\n]) *", (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8"))
    with open(path, "wb") as file:
        while file.tell() < size:
            draw.shuffle(sentences)
            file.write(" ".join(sentences).encode())
    return path


def tokenizing(kind: str, path: Path, folder: Path) -> None:
    """Measure the rate of token_ids() and of prepare(), against the library's own batch function where it has one."""
    corpus = open_corpus(str(path), data_dir=folder)
    found, pieces, numbers = scan(corpus), list(corpus.pieces()), iter(range(100))
    tokenizer = tokenization.build(kind, pieces[:2], alphabet=found.alphabet, documents=1, vocab_size=1024)
    chunks = [text for text, _ in rechunk(pieces, size=CHUNK)]
    arms = {
        "in memory": lambda: [ids.size for ids in token_ids(pieces, tokenizer)],
        "file to files": lambda: prepare(
            corpus, found, tokenizer, validation_fraction=0.1, cache_dir=folder / f"cache-{next(numbers)}"
        ),
    }
    theirs = {"gpt2": tiktoken_batch, "bpe": tokenizers_batch}.get(kind)
    if theirs is not None:
        assert np.array_equal(
            np.concatenate(list(token_ids(pieces, tokenizer))), np.concatenate(theirs(tokenizer, chunks))
        )
        arms["the library"] = lambda: theirs(tokenizer, chunks)
    median, size = compare(arms), os.path.getsize(path) / 1e6
    for name in ("in memory", "file to files"):
        ours, metric = f"{size / median[name]:.1f} MB/s", f"tokenizing, {kind}, {name}"
        if theirs is None:
            row(metric, ours=ours)
        else:
            peer, bound = median["the library"], "1" if (kind, name) == ("gpt2", "in memory") else "-"
            row(metric, ours=ours, peer=f"{size / peer:.1f} MB/s", ratio=peer / median[name], bound=bound)


def tiktoken_batch(tokenizer: tokenization.Tokenizer, chunks: list[str]) -> list[list[int]]:
    """Return tiktoken's ids of each chunk, with a thread per core."""
    return gpt2_encoding().encode_ordinary_batch(chunks, num_threads=os.cpu_count() or 1)


def tokenizers_batch(tokenizer: tokenization.Tokenizer, chunks: list[str]) -> list[list[int]]:
    """Return the tokenizers library's ids of each chunk, with its default threads."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(check_bpe(tokenizer.to_dict()["tokenizer"]))
    return [encoding.ids for encoding in library.encode_batch_fast(chunks, add_special_tokens=False)]


CAPPED = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from milepost.text.corpus import open_corpus
from milepost.text.scan import scan
from milepost.text.tokenization import Gpt2Tokenizer
from milepost.text.token_files import prepare
def memory(word):  # of this process, in bytes
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))
tokenizer = Gpt2Tokenizer()
base, limit = memory("VmRSS"), memory("VmData") + {cap} * 10**6
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
corpus = open_corpus({path!r}, data_dir=Path({folder!r}))
prepare(corpus, scan(corpus), tokenizer, validation_fraction=0.1, cache_dir=Path({folder!r}) / "capped")
print((memory("VmHWM") - base) / 1e6)
"""


def under_a_cap(path: Path, folder: Path) -> None:
    """Measure the peak memory for a corpus of four times the cap, above the process's baseline."""
    metric = f"peak memory, corpus of {os.path.getsize(path) // 10**6} MB"
    if not sys.platform.startswith("linux"):
        not_measured(metric, "needs Linux's RLIMIT_DATA")
        return
    script = CAPPED.format(root=str(ROOT), cap=CAP, path=str(path), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    row(metric, ours=f"{float(done.stdout):.0f} MB", limit=f"cap {CAP} MB", share=float(done.stdout) / CAP)


def waiting(model: str, folder: Path) -> None:
    """Measure how long a training step waits for its batch, in percent of the step."""
    settings = {"MODEL_TYPE": "gpt2", "TOKENIZER": "char", "RUNS_DIR": str(folder), "PYTHON_DOTENV_DISABLED": "1"}
    run = fresh(config.read(settings | SIZES[model]), Log())
    run.metrics, steps = Metrics(folder / "metrics.jsonl"), iter(range(10**9))

    def batches() -> Iterator[object]:
        return (run.batches.at(next(steps)) for _ in range(1000))

    median = compare({"1000 batches": lambda: list(batches()), "a step": lambda: training.training_step(run, 1e-4)})
    batch, step = median["1000 batches"] / 1000, median["a step"]
    row(
        f"waiting for data, {model}, % of a step",
        ours=f"{1e6 * batch:.0f} us",
        peer=f"step {1e3 * step:.1f} ms",
        ratio=100 * batch / step,
        bound="0.5",
    )


if __name__ == "__main__":
    main()
