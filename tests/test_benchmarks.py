"""Benchmarks are run by hand; what they import must be there whenever they are."""

import runpy
import sys
from pathlib import Path

import pytest
from drive import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_finds_what_it_imports(path: Path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    names = runpy.run_path(str(path), run_name="imported")
    assert names["__doc__"]
