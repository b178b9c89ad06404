import os

# Before torch is imported: threads that wait by spinning make tests many times slower wherever another process runs
# too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("COLUMNS", None)  # of a worker of pytest-xdist: lines of ours would fold

import signal

import pytest
from hypothesis import HealthCheck, settings

from milepost.files import look
from milepost.run import text

# A slow machine is no failure: hypothesis's own limits are 200 ms for an example and a second to draw ten.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# nohup makes the suite ignore SIGHUP, a shell's & SIGINT and SIGQUIT, and what it starts inherits that: a test of the signal
# would fail, or wait for ever.
for name, usual in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler), ("SIGQUIT", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), usual)


# The files that take longest, begun first: begun last, one keeps a process busy when the others have ended.
DEAREST = (
    "test_exact_resume", "test_distributed", "test_interrupt", "test_screen", "test_faults", "test_guides", "test_readme",
    "test_kill", "test_replay", "test_resume", "test_file_systems", "test_bad_inputs", "test_index", "test_sharded",
    "test_decoder", "test_mirror_kills", "test_installed", "test_plain_objects", "test_others_folders", "test_lazy",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    last = len(DEAREST)
    items.sort(key=lambda item: DEAREST.index(item.path.stem) if item.path.stem in DEAREST else last)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Token files of the tests stay out of the checkout, also those of fixtures that a file has once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CACHE_FOLDER", tmp_path_factory.getbasetemp() / "token-cache")
        yield


@pytest.fixture(autouse=True)
def looked_at(tmp_path_factory):
    """A process looks once at what a file system can do; tests that count or refuse calls count none of that.

    Once for each test: some make the process forget its look.
    """
    look(tmp_path_factory.getbasetemp())
