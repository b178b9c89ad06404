"""Token files on a mounted folder that goes away: the process waits for it, or ends with a sentence, never by SIGBUS."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from drive import ROOT, small_text
from mounts import missing, ssh_server, sshfs_of, unmount
from picky import mounted

from milepost import files
from milepost.text import token_arrays
from milepost.text.corpus import open_corpus
from milepost.text.scan import scan
from milepost.text.token_files import TokenSplit, prepare
from milepost.text.tokenization import ByteTokenizer

pytestmark = pytest.mark.mounted


def tokens_in(cache: Path, text: Path) -> TokenSplit:
    corpus = open_corpus(str(text), data_dir=text.parent)
    return prepare(corpus, scan(corpus), ByteTokenizer(), validation_fraction=0.1, cache_dir=cache)


# Opens the token file below PLACE in the way `HOW`; then it cannot be read, for so many seconds, and it is used.
READ = """
import sys, threading
from pathlib import Path
import numpy as np
from milepost.text import token_arrays
from milepost.text.batches import Batches
from milepost.text.errors import DataError
back, place, how, seconds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
(back / ".unread").unlink(missing_ok=True)
(path,) = place.rglob("train.npy")
tokens = token_arrays.opened(path) if how == "opened" else np.load(path, mmap_mode="r")
(back / ".unread").write_text("0 1000000")
if seconds == "for ever":
    token_arrays.PATIENCE = 0
else:
    threading.Timer(float(seconds), (back / ".unread").unlink).start()
try:
    print(Batches(tokens, block_size=16, batch_size=4, seed=1).at(0)[0].flatten().tolist())
except DataError as error:
    print(str(error).split(":")[0] == str(path))
"""


def read(folder: Path, place: Path, how: str, seconds: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", READ, str(folder / "back"), str(place), how, seconds]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_tokens_that_cannot_be_read_are_waited_for_or_an_error(tmp_path):
    folder = tmp_path / "fs"
    with mounted(folder, "unread") as place:
        files.forget()
        tokens_in(place / "tokens", small_text(tmp_path))
        expected, later, never = (read(folder, place, "opened", seconds) for seconds in ("0", "4", "for ever"))
        mapped = read(folder, place, "mapped", "4")
    files.forget()
    assert expected.stdout.startswith("[")
    assert (later.returncode, later.stdout) == (0, expected.stdout), later.stderr
    assert (never.returncode, never.stdout) == (0, "True\n"), never.stderr
    assert mapped.returncode == -signal.SIGBUS  # the control: a map would not live through it


def test_tokens_on_an_sshfs_that_dies_are_read_on_when_it_is_mounted_again(tmp_path):
    if packages := missing("sshfs"):
        pytest.skip(f"needs {packages}")
    own = tmp_path / "fs"
    with ssh_server(own) as port, contextlib.ExitStack() as second, contextlib.ExitStack() as first:
        place = first.enter_context(sshfs_of(own, port))
        files.forget()
        tokens = tokens_in(place / "tokens", small_text(tmp_path)).train
        assert isinstance(tokens, token_arrays.ReadArray)
        before = tokens[:100].tolist()
        os.kill(int((own / "pid").read_text()), signal.SIGKILL)

        def return_later() -> None:
            time.sleep(2)
            unmount(place)
            time.sleep(1)  # nothing is mounted, and the folder is empty
            second.enter_context(sshfs_of(own, port))

        away = threading.Thread(target=return_later)
        away.start()
        assert tokens[:100].tolist() == before
        away.join()
        assert np.asarray(tokens).tobytes() == next((own / "back").rglob("train.npy")).read_bytes()[tokens.offset :]
    files.forget()
