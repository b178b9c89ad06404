import pytest

import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Token files of the tests stay out of the checkout."""
    monkeypatch.setattr(run, "CACHE_FOLDER", tmp_path_factory.getbasetemp() / "token-cache")
