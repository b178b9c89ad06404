"""What `make gpu` runs, as far as a machine without a GPU can show: one line where there is none, and a part on the CPU."""

import os
import re
import subprocess
import sys

from drive import ROOT
from work import HANGING

PART = (
    "test_gpu_numbers.py", "test_gpu_saving.py", "test_gpu_exact.py::test_a_resumed_run_equals_the_uninterrupted_one[defaults]",
    "test_gpu_processes.py::test_an_engine_of_several_processes_trains_and_resumes_exactly_with_one[ddp-adamw]",
)  # fmt: skip


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
        timeout=HANGING,
    )  # fmt: skip


def test_the_tests_of_a_gpu_pass_on_a_cpu():
    names = [f"tests/gpu/{name}" for name in PART]
    done = run("-m", "pytest", "-q", "-k", "not transformers", *names, GPU_DEVICE="cpu", GPU_TEST_SECONDS=str(HANGING))
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


def test_without_a_gpu_one_line_says_so():
    skipped = run("-m", "pytest", "-q", "tests/gpu", GPU_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert skipped.returncode == 0, skipped.stdout
    (line,) = (line for line in skipped.stdout.splitlines() if line.startswith("SKIPPED"))
    assert "no CUDA device here" in line
    measured = run("benchmarks/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert (measured.returncode, measured.stdout.count("\n")) == (0, 1)
    assert measured.stdout.startswith("not measured: no CUDA device here")
