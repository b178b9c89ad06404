"""Objects in other programs' pickles: read as plain values, without importing or running anything."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import io
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tracemalloc
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import fuzz
import numpy as np
import pytest
import torch
from drive import ROOT
from foreign_programs import SIZES, NanoGPT, nanogpt, shaken
from records import members, pack
from torch import nn

from milepost import ckpt
from milepost.ckpt import CheckpointError, archive

PROTOCOLS = (2, 3, 4, 5)  # of torch.save, which writes 2


@dataclasses.dataclass
class GPTConfig:
    """As nanoGPT's."""

    block_size: int = 6
    n_head: int = 3
    bias: bool = True


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, "x"


class Mode(enum.Enum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


class Attributes(dict):
    """A dictionary with attributes, as Lightning's."""


class Ordered(collections.OrderedDict):
    pass


class Names(list):
    pass


class Word(str):
    pass


class Pair(NamedTuple):
    first: int
    second: str


attributes = Attributes(x=1)
attributes.more = 2  # type: ignore[attr-defined]
OBJECTS: dict[str, tuple[Any, Any]] = {  # the object, and the plain value that stands for it
    "Namespace": (argparse.Namespace(n_head=3, out=Path("/a/b")), {"n_head": 3, "out": "/a/b"}),
    "SimpleNamespace": (types.SimpleNamespace(a=[1]), {"a": [1]}),
    "dataclass": (GPTConfig(), {"block_size": 6, "n_head": 3, "bias": True}),
    "slots": (Slots(), {"a": 1, "b": "x"}),
    "absolute path": (Path("/a/b.pt"), "/a/b.pt"),
    "relative path": (Path("a/b.pt"), "a/b.pt"),
    "windows path": (pathlib.PureWindowsPath("C:/a/b"), "C:\\/a/b"),
    "float64": (np.float64(3.1), 3.1),
    "float32": (np.float32(2.5), 2.5),
    "int64": (np.int64(-7), -7),
    "numpy bool": (np.bool_(True), True),
    "numpy text": (np.str_("hé"), "hé"),
    "enum": (Mode.FAST, "fast"),
    "int enum": (Level.HIGH, 3),
    "OrderedDict": (collections.OrderedDict(a=1), {"a": 1}),
    "subclass of OrderedDict": (Ordered(a=1, b=Ordered(c=2)), {"a": 1, "b": {"c": 2}}),
    "dictionary with attributes": (attributes, {"x": 1, "more": 2}),
    "defaultdict": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "Counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2], 3), [1, 2]),
    "set": ({1}, [1]),
    "frozenset": (frozenset({1}), [1]),
    "list subclass": (Names([1, 2]), [1, 2]),
    "text subclass": (Word("x"), "x"),
    "named tuple": (Pair(1, "b"), (1, "b")),
    "bytes": (b"a\xff", b"a\xff"),
    "no bytes": (b"", b""),
    "datetime": (datetime.datetime(2024, 5, 6, 7, 8, 9, 10), "2024-05-06T07:08:09.000010"),
    "date": (datetime.date(2024, 5, 6), "2024-05-06"),
    "timedelta": (datetime.timedelta(1, 2), 86402.0),
    "Decimal": (decimal.Decimal("1.5"), "1.5"),
    "a class": (GPTConfig, f"{__name__}.GPTConfig"),
    "a function": (nn.functional.relu, "torch.nn.functional.relu"),
    "dtype": (torch.int64, "torch.int64"),
}


def loaded(path: Path, content: Any, protocol: int = 2) -> Any:
    torch.save(content, path, pickle_protocol=protocol)
    assert archive.verify(path) == []
    return archive.load(path)[0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_is_read_as_a_plain_value(name: str, protocol: int, tmp_path: Path) -> None:
    value, plain = OBJECTS[name]
    found = loaded(tmp_path / "a.pt", {"value": value, "twice": [value, value]}, protocol)
    assert found["value"] == plain
    assert found["twice"] == [plain, plain]
    assert type(found["value"]) in (type(plain), collections.OrderedDict, bytearray)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_programs_keep_besides_is_no_obstacle(protocol: int, tmp_path: Path) -> None:
    """Generators' states, arrays, whole modules, parameters with attributes."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.decays = False  # type: ignore[attr-defined]
    rest = [
        np.random.get_state(),
        random.getstate(),
        torch.get_rng_state(),
        np.arange(3),
        np.random.default_rng(0),
        nn.GELU(),
    ]
    found = loaded(tmp_path / "a.pt", {"rest": rest, "parameter": parameter}, protocol)
    assert torch.equal(found["parameter"], torch.ones(2))
    assert found["rest"][5]["approximate"] == "none"


@pytest.mark.parametrize("key", ["args", "config", "hyper_parameters", "model_args", "hparams", "cfg"])
@pytest.mark.parametrize("kind", ["Namespace", "dataclass", "SimpleNamespace", "dictionary", "subclass"])
def test_a_config_of_any_class_gives_n_head(kind: str, key: str, tmp_path: Path) -> None:
    configs = {
        "Namespace": argparse.Namespace(**SIZES, out=Path("out"), when=datetime.date(2024, 1, 1)),
        "dataclass": GPTConfig(),
        "SimpleNamespace": types.SimpleNamespace(**SIZES),
        "dictionary": SIZES,
        "subclass": Attributes(SIZES),
    }
    model = shaken(NanoGPT(**SIZES))
    content = {"model": model.state_dict(), key: configs[kind], "val_loss": np.float64(3.25), "step": np.int64(9)}
    torch.save(content, tmp_path / "a.pt")
    record = ckpt.load(tmp_path / "a.pt")
    assert (record.model_settings["n_head"], record.step, record.validation_loss) == (3, 9, 3.25)
    assert torch.equal(record.model_state["wte.weight"], model.lm_head.weight)


def test_a_whole_module_gives_its_weights(tmp_path: Path) -> None:
    model = shaken(NanoGPT(**SIZES))
    for name, content in {"whole": model, "inside": {"model": model, "config": SIZES}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        (tmp_path / "config.json").write_text('{"n_head": 3}')
        record = ckpt.load(tmp_path / f"{name}.pt")
        assert {f"transformer.{n}" for n in record.model_state} == {n for n, _ in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# What is not read.


def kind_of_refusal(path: Path) -> tuple[str, str]:
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.remedy
    return caught.value.kind, str(caught.value)


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


HOSTILE = {
    "os.system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Calls(open, str(mark), "w"),
    "subprocess": lambda mark: Calls(subprocess.run, ["touch", str(mark)]),
    "os.mkdir": lambda mark: Calls(os.mkdir, str(mark)),
    "an import": lambda mark: Calls(__import__, "antigravity"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_what_runs_programs_is_refused_and_runs_nothing(name: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = nanogpt(NanoGPT(**SIZES)) | {"more": HOSTILE[name](mark)}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    kind, text = kind_of_refusal(tmp_path / "a.pt")
    assert kind == "refused"
    assert "asks for Python objects" in text
    assert not mark.exists()


class Loop:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.own = self


class Key:
    """An object with a hash, and a field that makes its plain value a dictionary."""

    def __init__(self) -> None:
        self.a = 1


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


UNREAD = {
    "an object in itself": Loop(),
    "an object as a key": {Key(): 1},
    "nested deep": nested(600),
    "many parts": ["x" * 100] * 400_000,
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # for Python's own pickler
    try:
        torch.save(nanogpt(NanoGPT(**SIZES)) | {"more": UNREAD[name]}, tmp_path / "a.pt")
    finally:
        sys.setrecursionlimit(limit)
    kind, text = kind_of_refusal(tmp_path / "a.pt")
    assert kind == "not understood"
    assert "damaged" not in text
    assert "torch.save" in text  # the remedy


def of_name(name: str, opcodes: bytes) -> bytes:
    """A pickle of a dictionary with a call of `name`, whose tuple of arguments the opcodes make."""
    module, function = name.split()
    return b"\x80\x02}X\x01\0\0\0ac" + f"{module}\n{function}\n".encode() + opcodes + b"Rs."


LONG = b"X\0\0\x10\0" + b"x" * 2**20  # a text of a megabyte
GROWING = {  # calls whose answer, as Python would compute it, is far larger than the arguments
    "a text times a number": of_name("datetime timedelta", LONG + b"\x85"),
    "a text as a deque": of_name("collections deque", LONG + b"\x85"),
    "a text as a set": of_name("__builtin__ set", LONG + b"\x85"),
    "a number of bytes": of_name("__builtin__ bytearray", b"J\xff\xff\xff\x7f\x85"),
    "pairs of a counter": of_name("collections Counter", b"](K\x01K\x02\x86e\x85"),
    "a range": of_name("__builtin__ xrange", b"J\xff\xff\xff\x7f\x85"),
    "numpy's zeros": of_name("numpy zeros", b"J\xff\xff\xff\x7f\x85"),
    "a tensor's zeros": of_name("torch zeros", b"J\xff\xff\xff\x7f\x85"),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_call_never_grows(name: str, tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "a.pt")
    parts = members(tmp_path / "a.pt")
    data = next(part for part in parts if part.endswith("data.pkl"))
    path = pack(tmp_path / "a.pt", parts | {data: GROWING[name]})
    tracemalloc.start()
    try:
        archive.load(path)
    except CheckpointError as error:
        refusal: CheckpointError | None = error
    else:
        refusal = None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusal is None or refusal.kind in ("not understood", "damaged")
    assert peak < 40 * 2**20


def test_an_archive_of_our_own_stays_strict(tmp_path: Path) -> None:
    """Negative control of what is read in others': no checkpoint of ours ever holds an object."""
    path = ckpt.save(fuzz.record(7), tmp_path)
    content = torch.load(path, weights_only=True) | {"more": argparse.Namespace(a=1)}
    torch.save(content, tmp_path / "archive.pt")
    parts = {
        name: data
        for name, data in members(tmp_path / "archive.pt").items()
        if not name.endswith("/.data/serialization_id")
    }
    json_member = members(path)["archive/milepost.json"]
    kind, _ = kind_of_refusal(pack(tmp_path / "archive.pt", parts | {"archive/milepost.json": json_member}))
    assert kind == "refused"


# ---------------------------------------------------------------------------------------------------------------------
# Mutated pickles: read or refused, with no import, no file touched, memory within the bound.

MUTATIONS, SOAK_MUTATIONS, PROCESSES = 1000, 100_000, 4


def seed_pickles() -> list[bytes]:
    """The pickles of the objects above, in every protocol, and of a whole checkpoint."""
    values = {name: value for name, (value, _) in OBJECTS.items()}
    everything = [
        nanogpt(NanoGPT(**SIZES)) | {"args": argparse.Namespace(**SIZES)},
        values,
        *values.values(),
        nn.GELU(),
    ]
    found = []
    for protocol in PROTOCOLS:
        for value in everything:
            torch.save({"value": value}, file := io.BytesIO(), pickle_protocol=protocol)
            file.seek(0)
            path = pack_source(file.getvalue())
            found.append(path)
    return found


def pack_source(data: bytes) -> bytes:
    """Return data.pkl of an archive in memory."""
    import zipfile

    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


MUTATED = """
import pickle, resource, random, sys, warnings
from collections import Counter
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
folder, seed, first, count = Path(sys.argv[2]), *sys.argv[3:6]
import fuzz
import torch
from milepost.ckpt import pickles, torch_pickle
seeds = pickle.loads((folder / "seeds").read_bytes())
storage = torch.zeros(64).untyped_storage()
def read(data):
    try:
        torch_pickle.content_of(data, lambda key: storage, objects=True)
        return "read"
    except pickles.Forbidden:
        return "forbidden"
    except pickles.NotUnderstood:
        return "not understood"
    except MemoryError:
        raise
    except Exception:
        return "damaged"
for data in seeds:
    read(data)
warnings.simplefilter("error")
def forbid(event, arguments):
    if event in ("import", "open", "exec", "compile", "os.system", "subprocess.Popen", "os.mkdir", "socket.connect"):
        raise SystemExit(f"{event} {arguments!r:.200} in case {case}")
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
case, counts = -1, Counter()
sys.addaudithook(forbid)
for case in range(int(first), int(first) + int(count)):
    draw = random.Random(f"{seed}/{case}")
    data = draw.choice(seeds)
    data = fuzz.respliced(draw, data) if draw.random() < 0.5 else fuzz.blind(draw, data, draw.choice(seeds))
    counts[read(data)] += 1
print(dict(counts))
"""


def mutated(folder: Path, *, seed: int, first: int, count: int) -> dict[str, int]:
    """Return how often mutated pickles were read and refused, in a process that ends at an import or at an opened file."""
    (folder / "seeds").write_bytes(pickle.dumps(seed_pickles()))
    command = [sys.executable, "-c", MUTATED, str(ROOT), str(folder), str(seed), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return eval(done.stdout, {})


def test_a_mutated_pickle_is_read_or_refused_and_imports_nothing(tmp_path: Path) -> None:
    counts = mutated(tmp_path, seed=1, first=0, count=MUTATIONS)
    assert sum(counts.values()) == MUTATIONS
    assert counts["read"] > MUTATIONS / 20
    assert counts["damaged"] + counts["not understood"] > MUTATIONS / 4


TEXTS = [b"V" + text + b"\n." for text in (b"abc", b"\\u00e9", b"\xe9", b"\\ud800", b"\\U0010ffff", b"\\u12")]
TEXTS += [b"S'" + text + b"'\n." for text in (b"abc", b"\\xe9", b"\xe9", b"\\N{DASH}")]
TEXTS += [
    b"U\x02\xe9\xe8.",
    b"T\x02\x00\x00\x00\xe9\xe8.",
    b"\x8c\x02\xe9\xe8.",
    b"I1\n.",
    b"I01\n.",
    b"L1L\n.",
    b"F1e5\n.",
]


def test_no_codec_is_imported_for_the_texts_of_old_protocols(tmp_path: Path) -> None:
    """pickletools decodes with several codecs, which Python imports when it first needs each."""
    own = MUTATED.replace("for data in seeds:\n    read(data)\n", "").replace(
        "data = fuzz.respliced(draw, data) if draw.random() < 0.5 else fuzz.blind(draw, data, draw.choice(seeds))",
        "data = seeds[case]",
    )
    assert (own.count("read(data)"), "seeds[case]" in own) == (2, True)
    (tmp_path / "seeds").write_bytes(pickle.dumps(TEXTS))
    command = [sys.executable, "-c", own, str(ROOT), str(tmp_path), "1", "0", str(len(TEXTS))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(eval(done.stdout, {}).values()) == len(TEXTS)


def test_control_the_hook_would_see_an_import(tmp_path: Path) -> None:
    """Negative control: Python's own unpickler imports what such a pickle names, and the process ends."""
    own = MUTATED.replace("torch_pickle.content_of(data, lambda key: storage, objects=True)", "pickle.loads(data)")
    assert own != MUTATED
    (tmp_path / "seeds").write_bytes(pickle.dumps([pickle.dumps(Calls(open, str(tmp_path / "mark"), "w"), 2)]))
    own = own.replace(
        "data = fuzz.respliced(draw, data) if draw.random() < 0.5 else fuzz.blind(draw, data, draw.choice(seeds))",
        "pass",
    )
    command = [sys.executable, "-c", own, str(ROOT), str(tmp_path), "1", "0", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "in case 0" in done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PROCESSES))
def test_a_hundred_thousand_mutated_pickles(part: int, tmp_path: Path) -> None:
    count = SOAK_MUTATIONS // PROCESSES
    counts = mutated(tmp_path, seed=2, first=part * count, count=count)
    assert sum(counts.values()) == count


def test_reading_objects_raises_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        loaded(tmp_path / "a.pt", {name: value for name, (value, _) in OBJECTS.items()})
