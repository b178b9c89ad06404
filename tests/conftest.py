import os

# Before torch is imported: threads that wait by spinning make tests many times slower wherever another process runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from milepost import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token files of the tests stay out of the checkout."""
    monkeypatch.setattr(run, "CACHE_FOLDER", tmp_path_factory.getbasetemp() / "token-cache")
