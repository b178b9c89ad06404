"""The decoder of compiled kernels: when it is chosen, what is said, and what it does with weights that are not finite."""

import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from test_decoder import SETTINGS, VOCAB, published, random_model, through_cache

from milepost.generation import kernels, texts
from milepost.generation.compiled import CompiledDecoder
from milepost.generation.decoder import Decoder
from milepost.generation.texts import FEWEST_COMPILED, choose_decoder
from models.linears import FEW

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tokens", "kind"), [(FEWEST_COMPILED - 1, Decoder), (FEWEST_COMPILED, CompiledDecoder)], ids=["few", "more"]
)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_it_is_chosen_for_more_than_a_few_tokens(tokens: int, kind: type[Decoder], quantize: str) -> None:
    model = random_model(replace(SETTINGS, n_embd=256))
    decoder, reason = choose_decoder(model, device=CPU, dtype="auto", quantize=quantize, tokens=tokens)
    assert (type(decoder), reason) == (kind, "")
    if quantize == "int8":
        assert decoder is not None
        assert decoder.weights == "int8"


def test_without_numba_the_other_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = random_model(replace(SETTINGS, n_embd=256)), list[str]()
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    decoder, _ = choose_decoder(model, device=CPU, dtype="auto", quantize="none", tokens=1000, log=said.append)
    assert (type(decoder), said) == (Decoder, [])


def test_a_numba_that_does_not_run_here_is_named_and_not_used(tmp_path: Path) -> None:
    """As numba ends where NumPy is newer than it knows."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less')")
    code = """
import torch
from milepost.generation.texts import choose_decoder
from models.gpt2 import GPT2, GPT2Settings
model = GPT2(GPT2Settings(300, block_size=8, n_layer=1, n_head=4, n_embd=256))
decoder, _ = choose_decoder(model, device=torch.device("cpu"), dtype="auto", quantize="int8", tokens=1000, log=print)
print(type(decoder).__name__)
"""
    said = in_python(code, PYTHONPATH=f"{tmp_path}:{ROOT}")
    told = "numba is installed and cannot be used (Numba needs NumPy 2.4 or less); generating without it"
    assert said == f"{told}\nDecoder\n"


def test_what_was_compiled_and_is_damaged_is_named_and_not_used(tmp_path: Path) -> None:
    """As a power cut leaves a file: empty. Without AVX2 PyTorch then has float32, not the bfloat16 that pays for kernels alone."""
    code = """
import torch
from pathlib import Path
from milepost.generation import kernels
from milepost.generation.texts import choose_decoder
from milepost.runtime import hardware
from models.gpt2 import GPT2, GPT2Settings
index = Path(kernels.read_heads._cache._cache_file._index_path)
index.parent.mkdir(parents=True, exist_ok=True)
index.write_bytes(b"")
hardware.multiplies_bfloat16, torch.backends.cpu.get_cpu_capability = lambda: False, lambda: "DEFAULT"
model = GPT2(GPT2Settings(300, block_size=8, n_layer=1, n_head=4, n_embd=256))
decoder, _ = choose_decoder(model, device=torch.device("cpu"), dtype="auto", quantize="none", tokens=1000, log=print)
print(type(decoder).__name__, decoder.weights)
"""
    said = in_python(code, NUMBA_CACHE_DIR=str(tmp_path), PYTHONPATH=str(ROOT))
    told = "numba is installed and cannot be used (Ran out of input); generating without it"
    assert said == f"{told}\nDecoder float32\n"


def test_compiling_is_told_once_and_its_result_kept(tmp_path: Path) -> None:
    code = """
from test_decoder import published
from milepost.generation.compiled import CompiledDecoder
for weights in ("bfloat16", "bfloat16"):
    CompiledDecoder(published(), weights=weights, log=print)
"""
    how = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert in_python(code, **how) == "compiling the decoder for this processor: some twenty seconds, once\n"
    assert in_python(code, **how) == ""


def test_processes_that_compile_at_once_keep_what_each_made(tmp_path: Path) -> None:
    """Of several dtypes; numba alone gives both one name, and the next process finds the other's."""
    code = """
import sys
from test_decoder import published
from milepost.generation.compiled import CompiledDecoder
for weights in sys.argv[1:]:
    CompiledDecoder(published(), weights=weights, log=print)
"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    kinds = ("float32", "int8")
    both = [subprocess.Popen([sys.executable, "-c", code, kind], env=env, stdout=subprocess.DEVNULL) for kind in kinds]
    assert [process.wait() for process in both] == [0, 0]
    again = subprocess.run([sys.executable, "-c", code, *kinds], env=env, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


def test_it_runs_where_nothing_can_be_kept() -> None:
    """numba refuses to make a function whose result it cannot keep."""
    code = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
import numpy as np
from milepost.generation import kernels
y = np.zeros((2, 3), np.float32)
norm = kernels.Norm(np.ones(3, np.float32), np.zeros(3, np.float32), np.float32(0), True)
kernels.normalize(norm, np.array([[1, 2, 3], [3, 3, 9]], np.float32), y)
print(np.abs(y - np.array([[-1.5, 0, 1.5], [-0.5, -0.5, 1]]) * np.sqrt([[2 / 3], [2]])).max() < 1e-6)
"""
    assert in_python(code, PYTHONPATH=str(ROOT)) == "True\n"


def in_python(code: str, **env: str) -> str:
    """What a program prints; it ends without an error."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_what_is_not_finite_stays_so(bad: float, weights: str) -> None:
    model = random_model(SETTINGS)
    sound = through_cache(CompiledDecoder(model, weights=weights), [1, 2, 3], [1, 1, 1])
    assert sound.isfinite().all()
    kept = model.h[1].mlp.c_fc.weight.detach().clone()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[5, 7] = bad
    logits = through_cache(CompiledDecoder(model, weights=weights), [1, 2, 3], [1, 1, 1])
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight.copy_(kept)
    assert not logits.isfinite().any()


def test_threads_change_no_bit() -> None:
    decoder, threads = CompiledDecoder(published(), weights="bfloat16"), torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(through_cache(decoder, list(range(20)), [1] * 20))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_long_prompt_too_takes_no_more_threads_than_pytorch() -> None:
    """Only the head's product is a kernel there; a thread that begins has all of numba's."""
    decoder, threads = CompiledDecoder(published(), weights="bfloat16"), torch.get_num_threads()
    found: list[int] = []

    def read() -> None:
        decoder.rows(list(range(FEW + 1)), decoder.new_cache())
        found.append(numba.get_num_threads())

    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found == [1]


def test_two_threads_generate_at_once_with_numbas_own_threads() -> None:
    """Where there is no OpenMP; without the lock the process is ended."""
    code = """
import sys, threading, torch
from test_decoder import published, through_cache
from milepost.generation import compiled
if sys.argv[1:] == ["unlocked"]:
    compiled.ONE_CALLER = __import__("contextlib").nullcontext()
decoder, ids = compiled.CompiledDecoder(published(), weights="bfloat16"), list(range(40))
alone, found = through_cache(decoder, ids, [1] * 40), []
generate = lambda: found.extend(through_cache(decoder, ids, [1] * 40) for _ in range(20))
threads = [threading.Thread(target=generate) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found), all(torch.equal(each, alone) for each in found))
"""
    how = {"NUMBA_THREADING_LAYER": "workqueue", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert in_python(code, **how) == "60 True\n"
    unlocked = subprocess.run(
        [sys.executable, "-c", code, "unlocked"], env=os.environ | how, capture_output=True, check=False
    )
    assert b"Concurrent access has been detected" in unlocked.stderr


@pytest.mark.parametrize("rows", [FEW, FEW + 1])
def test_a_pass_of_many_tokens_is_pytorchs(rows: int) -> None:
    """The same logits to the rounding of sums, on either side of the limit."""
    ids = [(7 * at) % VOCAB for at in range(rows)]
    decoder = CompiledDecoder(published(), weights="float32")
    assert decoder.agrees(rows) == (rows == FEW)
    assert torch.allclose(
        through_cache(decoder, ids, [rows]), through_cache(decoder, ids, [1] * rows), atol=1e-5, rtol=0
    )


def stored_as(kind: str, weights: kernels.Array) -> tuple[kernels.Array, kernels.Array]:
    """Weights as a decoder stores them, and what they are then."""
    if kind == "bfloat16":
        stored = (weights.view(np.uint32) >> 16).astype(np.uint16)
        return stored, (stored.astype(np.uint32) << 16).view(np.float32)
    stored = (weights * 40).clip(-127, 127).astype(np.int8) if kind == "int8" else weights
    return stored, stored.astype(np.float32)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("code", [kernels.KEPT, kernels.ADDED, kernels.SWIGLU])
def test_products_are_numpys_and_a_row_has_its_bits_beside_any_others(kind: str, code: int) -> None:
    """For widths that no register and no line divides, and numbers of rows that are no multiple of those computed at a time."""
    generator = np.random.default_rng(3)
    for size, outputs, rows in itertools.product((1, 7, 64, 771), (1, 5, 16, 37), (1, 2, 3, 4, 5, 7)):
        both = 2 * outputs if code == kernels.SWIGLU else outputs
        stored, weights = stored_as(kind, generator.standard_normal((both, size)).astype(np.float32))
        scales, biases = (generator.standard_normal(both).astype(np.float32) / size for _ in range(2))
        x, there = (generator.standard_normal((rows, width)).astype(np.float32) for width in (size, outputs))
        matrix, y = kernels.Matrix(stored, scales, biases), there.copy()
        kernels.multiply(matrix, x, y, code)
        expected = x.astype(float) @ weights.T.astype(float) * scales + biases
        if code == kernels.ADDED:
            expected += there
        if code == kernels.SWIGLU:
            first, gate = expected[:, :outputs], expected[:, outputs:]
            expected = first / (1 + np.exp(-first)) * gate
        assert np.abs(y - expected).max() < 2e-6 * np.abs(weights).max() * max(1, np.abs(expected).max())
        for row in range(rows):
            alone = there[row : row + 1].copy()
            kernels.multiply(matrix, x[row : row + 1], alone, code)
            assert np.array_equal(alone[0], y[row])


def test_rows_that_do_not_lie_one_after_the_other_are_refused() -> None:
    matrix = kernels.Matrix(*(np.ones(shape, np.float32) for shape in ((4, 6), 4, 4)))
    with pytest.raises(numba.TypingError):
        kernels.multiply(matrix, np.ones((6, 2), np.float32).T, np.empty((2, 4), np.float32), kernels.KEPT)
