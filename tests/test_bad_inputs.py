"""What is no good checkpoint is refused in one sentence that names it, soon, without running its code or filling memory.

The numbers are those of the project's list of 57 bad inputs:
path and kind             1 missing  2 empty  3 folder without any  4 several layouts  5 glob of none  6 glob of several  7 pipe, socket,
                          device  8 bad links  9 no permission  10 git-lfs  11 web page  12 text  13 safetensors and .pt exchanged
                          14 tokenizer, optimizer or adapter given as the model
container                 15 truncated  16 no data.pkl  17 doubled members  18 encrypted, outside  19 bombs  20 CRC  21 bytes after it
                          22 legacy tar
structure and tensors     23 code  24 no dict  25 cyclic, deep, huge  26 names  27 no weights  28 two that disagree  29 more than its storage
                          30 kinds of tensors  31 NaN (also test_inference, test_training, test_prune)  32 shapes  33 missing, unexpected
                          34 prefixes collide  35 twins differ  36 no config
config and tokenizer      37 values  38 unknown fields, newer format (also test_sidecar)  39 model type  40 ids  41 tokenizer
                          42 the prompt's characters: test_inference
adapter and optimizer     43 adapter without its base  44 optimizer missing (also test_resume_mode), of another save  45, 46 groups, names,
                          shapes, another class: test_rebuild, test_resume_mode  47 no generator's state is stored; another device or
                          thread count: test_resume_mode  48 step  49 manifest against files (also test_sidecar, test_faults)
sets, data, device        50 outside its folder  51 shards (also test_huggingface)  52 other data: test_resume  53 safetensors' header
                          54 fp8, bf16  55 absent device: test_device, test_inference  56 changes while it is read  57 other formats
"""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import ROOT, command, tensor_bytes
from folders import opened as opened_or_said
from records import WEIGHT, gpt2_record, in_child, members, pack, record, walkable_folder
from safetensors.torch import load_file, save_file
from script import NOTHING_OF_TRAINING
from work import HANGING, calls

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError, archive, tensors
from milepost.ckpt.layouts import sharded
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.ckpt.tensors import not_finite

JSON_MEMBER = "archive/milepost.json"


def opened(wish: str | Path, folder: Path) -> Checkpoint:
    """Do what inference does with CHECKPOINT_PATH, up to the model."""
    path, _ = ckpt.resolve(str(wish), folder)
    one = ckpt.load(path, verify=True)
    build_model(one, device=torch.device("cpu"))
    build_tokenizer(one)
    return one


def enough(folder: Path) -> int:
    """Function calls in which the files of `folder` must be refused or listed: some for each byte,
    whatever the bytes promise.
    """
    return 500_000 + 10 * sum(path.lstat().st_size for path in folder.rglob("*"))


def refusal(wish: str | Path, folder: Path) -> str:
    """Return the sentence that refuses `wish`, which names it; assert that the work is bounded by its bytes."""
    with pytest.raises(CheckpointError) as caught:
        calls(lambda: opened(wish, folder), most=enough(folder))
    text = str(caught.value)
    assert str(wish) in text
    assert text.isprintable()  # no line breaks, and nothing that could steer a terminal
    assert "weights_only" not in text  # torch's advice is to turn the safety off
    assert len(text) < 1500
    return text


def good(folder: Path, **changes: Any) -> Path:
    return ckpt.save(record(3, **changes), folder)


def test_control_the_good_one_is_opened(tmp_path):
    path = good(tmp_path)
    assert tensor_bytes(opened(path, tmp_path)) == tensor_bytes(record(3))


# ---------------------------------------------------------------------------------------------------------------------
# Path and kind


def written(data: bytes | str, name: str = "bad.pt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return make


def pipe(folder: Path, name: str = "pipe.pt") -> Path:
    os.mkfifo(folder / name)
    return folder / name


def unix_socket(folder: Path) -> Path:
    path = folder / "socket.pt"
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(folder)  # such a name may have 107 bytes at most
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)
    return path


def linked(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "link.pt").symlink_to(target)
        return folder / "link.pt"

    return make


def safetensors_file(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "renamed.pt")
    return folder / "renamed.pt"


def folder_of_nothing(folder: Path) -> Path:
    (folder / "inner").mkdir()
    (folder / "inner" / "notes.txt").write_text("no checkpoint")
    return folder / "inner"


KINDS = {
    "1 missing file": (lambda folder: folder / "missing.pt", "Checkpoint not found"),
    "1 missing folder": (lambda folder: folder / "no" / "such" / "folder", "Checkpoint not found"),
    "1 a name too long for any file": (lambda folder: folder / ("n" * 300), "Checkpoint not found"),
    "2 empty file": (written(b""), "an empty file"),
    "2 zeros": (written(bytes(4096)), "of an unknown kind"),
    "3 folder without checkpoints": (folder_of_nothing, "holds no checkpoint"),
    "5 glob without a match": (lambda folder: folder / "checkpoint_*_step9.pt", "matches no checkpoint"),
    "7 pipe": (pipe, "is not a regular file"),
    "7 pipe of another name": (lambda folder: pipe(folder, "pipe"), "is not a checkpoint of a known layout"),
    "7 socket": (unix_socket, "is not a regular file"),
    "7 device": (lambda _: Path("/dev/zero"), "is not a checkpoint of a known layout"),
    "7 link to a device": (linked("/dev/zero"), "is not a regular file"),
    "8 dangling link": (linked("nowhere"), "Checkpoint not found"),
    "8 looping link": (linked("link.pt"), "Checkpoint not found"),
    "10 git-lfs pointer": (written("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "run `git lfs pull`"),
    "11 web page": (written("\n<!DOCTYPE html><html><body>404</body></html>"), "a web page"),
    "12 JSON": (written('{"model_state_dict": {}}'), "JSON text"),
    "12 text": (written("the weights are in the other file\n"), "of an unknown kind"),
    "13 safetensors": (safetensors_file, "a safetensors file"),
    "13 tokenizer.json": (written("{}", "tokenizer.json"), "is not a checkpoint of a known layout"),
    "16 GGUF": (written(b"GGUF\x03\x00\x00\x00"), "a GGUF file"),
    "16 HDF5": (written(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_is_no_checkpoint_is_refused_by_what_it_is(case, tmp_path):
    make, reason = KINDS[case]
    assert reason in refusal(make(tmp_path), tmp_path)


def test_6_a_glob_of_several_takes_the_highest_step(tmp_path):
    for step in (5, 30, 7):
        ckpt.save(record(step), tmp_path)
    assert opened(tmp_path / "*.pt", tmp_path).step == 30


@pytest.mark.parametrize("hidden", ["file", "folder"])
def test_9_without_permission_it_is_refused(hidden):
    with walkable_folder() as outer:
        folder = outer / "checkpoints"
        folder.mkdir()
        path = good(folder)
        (path if hidden == "file" else folder).chmod(0)
        for action in (lambda: ckpt.load(path), lambda: ckpt.resolve(str(path), folder) and ckpt.load(path)):
            answer = in_child(action, as_nobody=True)
            assert answer.startswith("CheckpointError")
            assert str(path) in answer
            assert "ermission denied" in answer or "Checkpoint not found" in answer
        folder.chmod(0o755)


def test_13_a_checkpoint_of_another_name_is_opened(tmp_path):
    for name in ("renamed", "renamed.bin", "renamed.gguf"):
        path = good(tmp_path).rename(tmp_path / name)
        assert opened(path, tmp_path).step == 3


def test_13_a_checkpoint_under_the_name_of_safetensors_is_refused_by_what_it_is(tmp_path):
    path = good(tmp_path).rename(tmp_path / "renamed.safetensors")
    assert "rename it to .pt" in refusal(path, tmp_path)


def test_several_names_where_one_is_expected_are_refused_as_that(tmp_path):
    path = good(tmp_path)
    for name in (f"{path},{path}", "latest,best", "no/a.pt,no/b.pt"):
        said = refusal(Path(name), tmp_path)
        assert said == f"{name}: not a single checkpoint: name one of them here"


def test_nul_in_a_path_is_refused(tmp_path):
    for name in ("a\0b", "a\0b.pt", "a\0/b.pt"):
        with pytest.raises(CheckpointError, match="Checkpoint not found"):
            opened(name, tmp_path)
        with pytest.raises(CheckpointError, match="Checkpoint not found"):
            ckpt.load(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# The container


def truncated(folder: Path) -> Path:
    path = good(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def without_pickle(folder: Path) -> Path:
    content = members(good(folder))
    del content["archive/data.pkl"]
    return pack(folder / "bad.pt", content)


def torchscript(folder: Path) -> Path:
    """As torch.jit.save writes them; code lies in compressed members."""
    path = pack(folder / "bad.pt", {"bad/data.pkl": b"", "bad/constants.pkl": b"", "bad/version": b"3"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bad/code/__torch__.py", b"class Linear(Module):\n" * 9)
    return path


def twice(folder: Path) -> Path:
    """Two members of one name: torch takes the last."""
    path = pack(folder / "bad.pt", members(good(folder)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    return path


def extra(name: str) -> Callable[[Path], Path]:
    return lambda folder: pack(folder / "bad.pt", members(good(folder)) | {name: b"x"})


def directory(data: bytes) -> list[int]:
    """Where the entries of a zip file's central directory begin."""
    (start,) = struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)
    entries = []
    while data[start : start + 4] == b"PK\x01\x02":
        entries.append(start)
        start += 46 + sum(struct.unpack_from("<HHH", data, start + 28))
    return entries


def patched(offset: int, form: str, value: int) -> Callable[[Path], Path]:
    """One number of every entry of the central directory replaced."""

    def make(folder: Path) -> Path:
        path = pack(folder / "bad.pt", members(good(folder)))
        data = bytearray(path.read_bytes())
        for start in directory(data):
            struct.pack_into(form, data, start + offset, value)
        path.write_bytes(data)
        return path

    return make


def overlapped(folder: Path) -> Path:
    """A thousand members, all of them the same bytes of the file."""
    content = members(good(folder))
    path = pack(folder / "bad.pt", content | {"archive/data/000": b"x" * 4096})
    data = path.read_bytes()
    last = directory(data)[-1]
    (end,) = struct.unpack_from("<I", data, data.rindex(b"PK\x05\x06") + 16)
    entry = data[last : data.rindex(b"PK\x05\x06")]
    more = b"".join(entry.replace(b"data/000", b"data/%03d" % number) for number in range(1, 1000))
    tail = bytearray(data[data.rindex(b"PK\x05\x06") :])
    count, size = len(content) + 1000, len(data) - len(tail) - end + len(more)
    struct.pack_into("<HHII", tail, 8, count, count, size, end)
    path.write_bytes(data[: -len(tail)] + more + tail)
    return path


def prefixed(folder: Path) -> Path:
    """Python finds an archive behind other bytes, torch may find another one."""
    path = good(folder)
    path.write_bytes(b"PK\x03\x04 and more" + path.read_bytes())
    return path


def wrong_checksum(folder: Path) -> Path:
    path = good(folder)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("archive/data/0").header_offset
    data[data.index(record(3).model_state[WEIGHT].numpy().tobytes(), start)] ^= 1
    path.write_bytes(data)
    return path


def legacy_tar(folder: Path) -> Path:
    with tarfile.open(folder / "bad.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return folder / "bad.pt"


def bare_pickle(folder: Path) -> Path:
    (folder / "bad.pt").write_bytes(pickle.dumps({"model_state_dict": {}}, protocol=2))
    return folder / "bad.pt"


CONTAINERS = {
    "15 truncated": (truncated, "is damaged or cut short"),
    "16 plain zip": (lambda folder: pack(folder / "bad.pt", {"a.txt": "text"}), "without torch's data.pkl"),
    "16 empty zip": (lambda folder: pack(folder / "bad.pt", {}), "without torch's data.pkl"),
    "16 Keras": (
        lambda folder: pack(folder / "bad.pt", {"config.json": "{}", "model.weights.h5": b"\x89HDF"}),
        "without torch's data.pkl",
    ),
    "16 without data.pkl": (without_pickle, "without torch's data.pkl"),
    "16 TorchScript": (torchscript, "is a TorchScript program, which is never run"),
    "17 one name twice": (twice, "two members of its archive have one name"),
    "17 two pickles": (extra("other/data.pkl"), "or with more than one"),
    "18 absolute member": (extra("/etc/passwd"), "the member '/etc/passwd' points outside"),
    "18 member above": (extra("archive/../../x"), "points outside the archive"),
    "18 encrypted": (patched(8, "<H", 1), "is compressed or encrypted"),
    "19 compressed": (
        lambda folder: pack(folder / "bad.pt", members(good(folder)), compression=zipfile.ZIP_DEFLATED),
        "is compressed or encrypted",
    ),
    "19 bomb": (
        lambda folder: pack(
            folder / "bad.pt",
            members(good(folder)) | {"archive/data/9": bytes(2**24)},
            compression=zipfile.ZIP_DEFLATED,
        ),
        "is compressed or encrypted",
    ),
    "19 declared size": (patched(24, "<I", 2**31 - 1), "members claim more bytes than it holds"),
    "19 one place for a thousand members": (overlapped, "members claim more bytes than it holds"),
    "20 checksum": (wrong_checksum, "the bytes of archive/data/0 do not match their checksum"),
    "21 bytes before": (prefixed, "does not begin with its archive"),
    "22 legacy tar": (legacy_tar, "of an unknown kind"),
    "22 bare pickle": (bare_pickle, "a bare pickle, which is never opened"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_that_torch_did_not_write_so_is_refused(case, tmp_path):
    make, reason = CONTAINERS[case]
    assert reason in refusal(make(tmp_path), tmp_path)


@pytest.mark.parametrize("size", [1, 100, 70_000])
def test_21_bytes_after_the_archive_are_refused_or_change_nothing(size, tmp_path):
    path = good(tmp_path)
    path.write_bytes(path.read_bytes() + b"\n" * size)
    try:
        one = opened(path, tmp_path)
    except CheckpointError as error:
        one, text = None, str(error)
    if one:
        assert tensor_bytes(one) == tensor_bytes(record(3))
    else:
        assert text.startswith(f"{path}: is damaged")


# ---------------------------------------------------------------------------------------------------------------------
# Code


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.code,)


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a valid file as torch.load reads it, with changes."""
    path = good(folder)
    loaded = torch.load(path, weights_only=True)
    path.unlink()
    return loaded | changes


def torch_saved(folder: Path, value: Any) -> Path:
    """`value` as torch saves it, with the good file's metadata beside it."""
    source = good(folder)
    torch.save(value, folder / "bad.pt")
    path = pack(folder / "bad.pt", {**members(folder / "bad.pt"), "bad/milepost.json": b"{}"})
    renamed = {name.replace("bad/", "archive/"): data for name, data in members(path).items()}
    return pack(path, renamed | {JSON_MEMBER: members(source)[JSON_MEMBER]})


PLACES = {
    "as the whole": lambda evil, folder: evil,
    "as the weights": lambda evil, folder: content(folder, model_state_dict=evil),
    "among the weights": lambda evil, folder: content(folder, model_state_dict={WEIGHT: evil}),
    "as a name": lambda evil, folder: content(folder, model_state_dict={evil: torch.ones(1)}),
    "as the optimizer": lambda evil, folder: content(folder, optimizer_state_dict=evil),
    "beside everything": lambda evil, folder: content(folder, more=[evil]),
}


@pytest.mark.parametrize("place", PLACES)
def test_23_no_code_of_a_file_ever_runs(place, tmp_path):
    marker = tmp_path / "it ran"
    path = torch_saved(tmp_path, PLACES[place](Evil(f"open({str(marker)!r}, 'w').close()"), tmp_path))
    text = refusal(path, tmp_path)
    assert "asks for Python objects that a checkpoint never needs (__builtin__.eval)" in text  # as protocol 2 calls it
    assert not marker.exists()


def test_23_no_code_of_a_bare_pickle_ever_runs(tmp_path):
    marker, path = tmp_path / "it ran", tmp_path / "bad.pt"
    path.write_bytes(pickle.dumps(Evil(f"open({str(marker)!r}, 'w').close()"), protocol=2))
    assert "a bare pickle, which is never opened" in refusal(path, tmp_path)
    assert not marker.exists()


def test_control_the_code_would_have_run(tmp_path):
    """Negative control for the tests above: in a process of its own,
    plain pickle runs the very bytes that were refused.
    """
    marker = tmp_path / "it ran"
    path = torch_saved(tmp_path, Evil(f"open({str(marker)!r}, 'w').close()"))
    (tmp_path / "pickled").write_bytes(members(path)["archive/data.pkl"])
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "pickled"], check=True)
    assert marker.exists()


CALLS = [
    "builtins bytearray",
    "torch FloatTensor",
    "torch Tensor",
    "torch.storage UntypedStorage",
    "collections Counter",
]


@pytest.mark.parametrize("called", CALLS)
def test_a_few_bytes_cannot_ask_for_memory(called, tmp_path):
    """torch's own unpickler lets a pickle call these with a size: 64 GB for a file of 600 bytes."""
    module, name = called.split()
    size = (2**36).to_bytes(8, "little")
    pickled = (
        b"\x80\x02}X\x04\x00\x00\x00" + b"more" + f"c{module}\n{name}\n".encode() + b"\x8a\x08" + size + b"\x85Rs."
    )
    path = pack(tmp_path / "bad.pt", members(good(tmp_path)) | {"archive/data.pkl": pickled})
    assert called.replace(" ", ".") in refusal(path, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Larger inside than out


def raised(depth: int, *, begin: bytes = b"", end: bytes, one: bytes = b"K\x01\x85") -> bytes:
    """Opcodes of a value that holds the one in it twice, `depth` times over."""
    return begin * depth + one + end * depth


def of_opcodes(opcodes: bytes) -> Callable[[Path], Path]:
    """The good file with more in its dictionary: `opcodes` leave one value."""

    def make(folder: Path) -> Path:
        parts = members(good(folder))
        text = parts["archive/data.pkl"].removesuffix(b".") + b"X\x04\0\0\0more" + opcodes + b"s."
        return pack(folder / "bad.pt", parts | {"archive/data.pkl": text})

    return make


TUPLES = {
    "two": {"end": b"q\xf0h\xf0\x86"},
    "three": {"end": b"q\xf0h\xf0K\x01\x87"},
    "marked": {"begin": b"(", "end": b"q\xf0h\xf0t"},
    "far cell": {"end": b"r\0\0\0\x01j\0\0\0\x01\x86"},
}
USES: dict[str, tuple[bytes, bytes]] = {  # what stands before and after it
    "a key": (b"}", b"K\x01s"),
    "one of several keys": (b"}(", b"K\x01K\x02K\x03u"),
    "a key of an OrderedDict": (b"ccollections\nOrderedDict\n](", b"K\x01\x86e\x85R"),
    "a key of an attribute": (b"ccollections\nOrderedDict\n)R](", b"K\x01\x86eb"),
    "a tensor's bytes": (b"(X\x07\0\0\0storagectorch\nFloatStorage\n", b"X\x03\0\0\0cpuK\x01tQ"),
    "called": (b"", b")R"),
    "made": (b"", b")\x81"),
    "a plain value": (b"", b""),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", TUPLES)
def test_25_a_tuple_that_is_exponential_when_walked_is_refused(form, use, tmp_path):
    """torch would hash it, or print it in an error, for ever."""
    before, after = USES[use]
    for depth in (20, 50):
        path = of_opcodes(before + raised(depth, **TUPLES[form]) + after)(tmp_path)
        assert "it would have more than 2000000 parts" in refusal(path, tmp_path)
        path.unlink()


@pytest.mark.parametrize("form", TUPLES)
def test_control_a_small_one_is_opened(form, tmp_path):
    path = of_opcodes(b"}" + raised(4, **TUPLES[form]) + b"K\x01s")(tmp_path)
    assert tensor_bytes(opened(path, tmp_path)) == tensor_bytes(record(3))


OPCODES = {
    "25 lists of lists": (raised(50, begin=b"](", end=b"q\xf0h\xf0e"), "it would have more than 2000000 parts"),
    "25 dicts of dicts": (
        raised(50, begin=b"}(K\x01", end=b"q\xf0K\x02h\xf0u"),
        "it would have more than 2000000 parts",
    ),
    "25 filled after it was shared": (b"]q\xf0](h\xf0h\xf0eh\xf0K\x01a\x87", "a value in it contains itself"),
    "25 a list in itself": (b"]q\xf0h\xf0a", "a value in it contains itself"),
    "25 a list in its tuple": (b"](K\x01]q\xf0h\xf0\x85ae", "a value in it contains itself"),
    "25 a long text many times": (
        b"X\0\0\x01\0" + b"a" * 2**16 + b"q\xf0](" + b"h\xf0" * 1000 + b"e\x86",
        "it would have more than 2000000 parts",
    ),
    "23 called without a name": (b"K\x01)R", "it calls something that is not a function"),
    "16 MiB": (b"(" + b"N" * 2**24 + b"t", "is larger than 16777216 bytes"),
    "a million sets": (b"(" + b"\x8f" * 10**6 + b"t", "it has the opcode EMPTY_SET"),
    "millions of opcodes": (b"(" + b"N" * 2_000_001 + b"t", "it would have more than 2000000 parts"),
    "millions of nothings": (b"N0" * 1_000_001 + b"N", "it has the opcode POP"),
    "calls": (
        b"ccollections\nOrderedDict\nq\xf0)q\xf1(" + b"h\xf0h\xf1R" * 300_000 + b"t\x87",
        "it would have more than 2000000 parts",
    ),
}


@pytest.mark.parametrize("case", OPCODES)
def test_a_pickle_that_is_larger_than_it_looks_is_refused(case, tmp_path):
    opcodes, reason = OPCODES[case]
    assert reason in refusal(of_opcodes(opcodes)(tmp_path), tmp_path)


@pytest.mark.parametrize("opcodes", [b"N0" * 1_000_001 + b"N.", b"(" + b"N" * 2_000_001 + b"t."], ids=["N0", "N"])
def test_a_large_pickle_of_another_program_is_listed_with_little_work(opcodes, tmp_path):
    parts = members(good(tmp_path))
    del parts[JSON_MEMBER]
    path = pack(tmp_path / "bad.pt", parts | {"archive/data.pkl": b"\x80\x02" + opcodes})
    found, _ = calls(lambda: ckpt.find(tmp_path), most=enough(tmp_path))
    assert [one.problem is None for one in found if one.path == path] == [False]


def test_control_what_programs_save_is_opened(tmp_path):
    """Groups that share their betas, an OrderedDict with attributes, shapes, keys of tuples, tied and shared tensors,
    a wide vocabulary.
    """
    model = torch.nn.TransformerEncoderLayer(8, 2)
    groups = [{"params": [one], "betas": (0.9, 0.95)} for one in model.parameters()]
    updates = torch.optim.AdamW(groups)
    model(torch.ones(2, 3, 8)).sum().backward()
    updates.step()
    shared = {"a": (1, (2, 3)), (1, (2, 3)): torch.Size([2, 3])}
    also = {
        "optimizer": updates.state_dict(),
        "module": model.state_dict(),
        "more": [shared] * 100,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "vocabulary": {f"piece {number}": number for number in range(100_000)},
    }
    path = torch_saved(tmp_path, content(tmp_path) | also)
    assert tensor_bytes(opened(path, tmp_path)) == tensor_bytes(record(3))
    assert list(archive.load(path)[0]["more"][99].values())[1] == (2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Structure and tensors


def weights(**tensors: Any) -> Callable[[Path], Path]:
    """A file of these weights; `weight` stands for the real one's name."""
    named = {WEIGHT if name == "weight" else name: tensor for name, tensor in tensors.items()}
    return lambda folder: torch_saved(folder, content(folder, model_state_dict=named))


def named(name: Any) -> Callable[[Path], Path]:
    return lambda folder: torch_saved(folder, content(folder, model_state_dict={name: torch.ones(1)}))


def value(one: Any) -> Callable[[Path], Path]:
    return lambda folder: torch_saved(folder, one)


def quantized(folder: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):  # torch means to do without them
        return weights(weight=torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8))(folder)


def shared_storage(folder: Path) -> Path:
    """A thousand weights of one storage: 4 MB in the file, 4 GB in a model."""
    storage = torch.ones(2**20)
    return torch_saved(folder, content(folder, model_state_dict={f"w{number}": storage for number in range(1000)}))


STRUCTURES = {
    "24 list": (value([1, 2]), "holds list, expected a dictionary"),
    "24 tensor": (value(torch.ones(2)), "holds Tensor, expected a dictionary"),
    "24 none": (value(None), "holds NoneType"),
    "26 number for a name": (named(3), "3 is not a tensor name"),
    "26 empty name": (named(""), "'' is not a tensor name"),
    "26 long name": (named("w" * 513), "is not a tensor name"),
    "26 control characters": (named("w\x1b[2J"), r"'w\x1b[2J' is not a tensor name"),
    "26 line break": (named("a\nb"), r"'a\nb' is not a tensor name"),
    "27 no weights": (
        value({"state": {}, "epoch\n": 3}),
        r"does not contain model_state_dict (keys seen: 'state', 'epoch\n')",
    ),
    "27 nothing at all": (value({}), "(keys seen: none)"),
    "27 empty weights": (weights(), "a dict of no tensors"),
    "27 weights of no dict": (value({"model_state_dict": [torch.ones(1)]}), "a list of no tensors"),
    "27 text for a tensor": (weights(weight="text"), "is str, expected a tensor"),
    "29 stride 0": (weights(weight=torch.ones(1).expand(10**6, 10**6)), "claims more bytes than the file holds"),
    "29 overlapping strides": (weights(weight=torch.ones(9).as_strided((8, 8), (1, 0))), "claims more bytes than"),
    "29 one storage for all": (shared_storage, "its tensors claim more bytes than the file holds"),
    "30 meta": (weights(weight=torch.ones(8, 8, device="meta")), "_rebuild_meta_tensor_no_storage"),
    "30 sparse": (weights(weight=torch.eye(8).to_sparse()), "_rebuild_sparse_tensor"),
    "30 quantized": (quantized, "_rebuild_qtensor"),
    "30 complex": (
        weights(weight=torch.ones(8, 8, dtype=torch.complex64)),
        "torch.complex64 tensor on cpu, expected dense floats",
    ),
    "30 integer": (
        weights(weight=torch.ones(8, 8, dtype=torch.int64)),
        "torch.int64 tensor on cpu, expected dense floats",
    ),
    "32 shape": (weights(weight=torch.ones(8, 9)), f"{WEIGHT} is (8, 9), expected (8, 8)"),
    "33 missing": (weights(other=torch.ones(8, 8)), f"{WEIGHT} (8, 8) is missing"),
    "33 unexpected": (weights(weight=torch.ones(8, 8), bias=torch.ones(8)), "bias (8,) is not expected"),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_content_that_is_no_models_weights_is_refused(case, tmp_path):
    make, reason = STRUCTURES[case]
    assert reason in refusal(make(tmp_path), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Other programs' weights


STATE = gpt2_record().model_state
SETTINGS = gpt2_record().model_settings
WTE = STATE["wte.weight"]
A = "base_model.model.h.0.attn.c_attn.lora_A.weight"


def nested_deep(depth: int) -> dict[str, Any]:
    outer: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(depth):
        outer = {"a": outer}
    return outer


def cyclic() -> dict[str, Any]:
    one: dict[str, Any] = {"w": torch.ones(2)}
    one["again"] = one
    return one


def doubled(times: int) -> list[Any]:
    """So many levels of a list that holds the level below it twice: 2^times leaves of a few hundred bytes."""
    one: list[Any] = [torch.ones(1)]
    for _ in range(times):
        one = [one, one]
    return one


def foreign(**content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "ckpt.pt")
        return folder / "ckpt.pt"

    return make


def half_alone(folder: Path) -> Path:
    model = ckpt.save(record(3), folder, layout="separated")
    model.unlink()
    return next(folder.glob("*-optimizer.pt"))


def taken_out(layout: str, name: str) -> Callable[[Path], Path]:
    """A single file of a checkpoint's folder, elsewhere."""
    return lambda folder: (ckpt.save(record(3), folder / "from", layout=layout) / name).rename(folder / name)


def mixed_pair(folder: Path) -> Path:
    for step in (3, 4):
        ckpt.save(record(step), folder / str(step), layout="separated")
    (mine,), (other,) = ((folder / step).glob("*-optimizer.pt") for step in "34")
    other.replace(mine)
    return next((folder / "3").glob("*-model.pt"))


def adapter(folder: Path) -> Path:
    save_file({A: torch.ones(2, 8)}, folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


FOREIGN = {
    "14 optimizer's half": (half_alone, "holds only an optimizer's state"),
    "14 optimizer.pt": (taken_out("directory", "optimizer.pt"), "is not a tensor name"),
    "14 optimizer.safetensors": (
        taken_out("consolidated", "optimizer.safetensors"),
        "are of no model that milepost knows",
    ),
    "25 deep": (foreign(model=nested_deep(70)), "is nested deeper than 64"),
    "25 cyclic": (foreign(model=cyclic()), "a value in it contains itself"),
    "25 doubled": (foreign(model={"a": doubled(40)}), "it would have more than 2000000 parts"),
    "28 two that disagree": (
        foreign(model=STATE, state_dict=STATE | {"wte.weight": WTE + 1}, config=SETTINGS),
        "both hold weights, but different ones",
    ),
    "33 missing behind a prefix": (
        foreign(
            model={f"_orig_mod.module.{name}": each for name, each in STATE.items() if name != "h.1.ln_1.weight"},
            config=SETTINGS,
        ),
        "h.1.ln_1.weight (8,) is missing",
    ),
    "33 unexpected": (
        foreign(model=STATE | {"h.0.extra": torch.ones(2)}, config=SETTINGS),
        "h.0.extra (2,) is not known",
    ),
    "34 prefixes collide": (
        foreign(model=STATE | {"module.wte.weight": WTE}, config=SETTINGS),
        "wte.weight (12, 8) and module.wte.weight (12, 8) are both wte.weight without their prefixes",
    ),
    "35 twins differ": (
        foreign(model=STATE | {"lm_head.weight": WTE + 1}, config=SETTINGS),
        "its lm_head is not its embedding",
    ),
    "36 no config": (foreign(model=STATE), "has no n_head, which shapes do not determine"),
    "43 adapter": (adapter, "lora_A.weight (2, 8)"),
    "43 adapter among weights": (foreign(model=STATE | {A: torch.ones(2, 8)}, config=SETTINGS), "is not known"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_anothers_weights_are_translated_wholly_or_refused(case, tmp_path):
    make, reason = FOREIGN[case]
    assert reason in refusal(make(tmp_path), tmp_path)


SOUND = {
    "28 two that agree": {"model": STATE, "state_dict": dict(STATE)},
    "33 behind prefixes": {"model": {f"_orig_mod.module.{name}": each for name, each in STATE.items()}},
    "35 twins": {"model": STATE | {"lm_head.weight": WTE.clone()}},
}


@pytest.mark.parametrize("case", SOUND)
def test_control_anothers_sound_weights_are_taken(case, tmp_path):
    one = ckpt.load(foreign(**SOUND[case], config=SETTINGS)(tmp_path), verify=True)
    assert {name: each.tolist() for name, each in one.model_state.items()} == {
        name: each.tolist() for name, each in STATE.items()
    }
    build_model(one, device=torch.device("cpu"))


def test_31_weights_that_are_no_numbers_are_found_by_what_decides_by_them(tmp_path):
    """They open, so that they can be inspected; generating, saving and pruning check them first."""
    path = ckpt.save(record(3, model_state={WEIGHT: torch.full((8, 8), float("nan"))}), tmp_path)
    assert not_finite(opened(path, tmp_path).model_state) == [WEIGHT]


def test_36_weights_of_one_shape_only_need_no_config(tmp_path):
    one = ckpt.load(foreign(model_state_dict=record().model_state)(tmp_path))
    assert (one.model_type, one.model_settings["vocab_size"]) == ("bigram", 8)
    assert "records no block_size" in one.notes[0]


def test_44_an_optimizer_of_another_save_is_refused(tmp_path):
    path = mixed_pair(tmp_path)
    for one in (path, path.with_name(path.name.replace("-model.pt", "-optimizer.pt"))):
        with pytest.raises(CheckpointError, match=r"-optimizer\.pt: belongs to another save than .*-model\.pt"):
            opened(one, tmp_path)
    assert "belongs to another save than" in str(ckpt.find(path.parent)[0].problem)


def test_44_without_its_optimizer_it_generates_and_reports_what_is_missing(tmp_path):
    path = ckpt.save(record(3), tmp_path, layout="separated")
    next(tmp_path.glob("*-optimizer.pt")).unlink()
    one = opened(path, tmp_path)
    assert one.parts == ["model"]
    assert "without it this checkpoint generates but cannot resume bit-exactly" in one.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders, shards, and safetensors


def test_4_of_several_layouts_the_newest_is_taken_and_all_are_listed(tmp_path):
    for step, layout in enumerate(ckpt.WRITERS, start=1):
        ckpt.save(record(step), tmp_path, layout=layout)
    path, notes = ckpt.resolve(str(tmp_path), tmp_path)
    assert ckpt.load(path).step == len(ckpt.WRITERS)
    assert notes == [f"taking {path}"]
    assert {one.layout for one in ckpt.find(tmp_path)} == set(ckpt.WRITERS)
    text = refusal(tmp_path / "missing.pt", tmp_path)
    assert all(str(one.path.relative_to(tmp_path)) in text for one in ckpt.find(tmp_path))


def manifest(**more: Any) -> Callable[[Path], Path]:
    """A folder whose manifest also names these files, its own checksum right."""

    def make(folder: Path) -> Path:
        path = ckpt.save(record(3), folder, layout="directory")
        values = json.loads((path / "manifest.json").read_text())
        values["files"] |= more
        (path / "manifest.json").write_text(json.dumps(values | {"sha256": None}))
        return path

    return make


def shards(*, second: int = 5, names: dict[str, str] = {}, without: str = "") -> Callable[[Path], Path]:  # noqa: B006
    """transformers' own folder in two shards, the second from that tensor on; `names` are also in the index."""

    def make(folder: Path) -> Path:
        path = ckpt.save(gpt2_record(), folder, layout="huggingface")
        weights = load_file(path / "model.safetensors")
        for name in ("milepost.json", "optimizer.safetensors", "model.safetensors"):
            (path / name).unlink()
        parts = {"one.safetensors": sorted(weights)[:5], "two.safetensors": sorted(weights)[second:]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, path / file)
        index = {name: file for file, part in parts.items() for name in part} | names
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (path / without).unlink() if without else None
        return path

    return make


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        text = json.dumps(header).encode()
        path = folder / "bad.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
        return path

    return make


def tensor(shape: list[int], dtype: str = "F32", end: int = 4) -> dict[str, Any]:
    return {WEIGHT: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


FOLDERS = {
    "49 a file that is not there": (manifest(x={"size": 1, "sha256": "0"}), "is missing, but its manifest lists it"),
    "49 no size": (manifest(x={"sha256": "0"}), "expected size and sha256"),
    "50 above": (manifest(**{"../x": {"size": 1, "sha256": "0"}}), "names '../x', which lies outside its folder"),
    "50 absolute": (manifest(**{"/etc/passwd": {"size": 1, "sha256": "0"}}), "which lies outside its folder"),
    "50 with a control character": (manifest(**{"\x1b[2J/../x": {"size": 1, "sha256": "0"}}), "which lies outside its folder"),
    "51 missing shard": (shards(without="two.safetensors"), "lists 'two.safetensors', which is missing"),
    "51 overlapping shards": (shards(second=3), "is in an earlier shard too"),
    "51 shards with a gap": (shards(second=6), "is missing"),
    "51 a tensor in no shard": (shards(names={"more": "one.safetensors"}), "lists 'more', which is in none of its files"),
    "51 a shard outside": (shards(names={"more": "../one.safetensors"}), "which lies outside its folder"),
    "53 header beyond the file": (safetensors({}, length=2**40), "its header claims 1099511627776 bytes"),
    "53 metadata bomb": (safetensors({"__metadata__": {"k": "x" * 2**24}}), "is not a complete safetensors file"),
    "53 entries of nothing": (
        safetensors({f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(20_000)}),
        "is empty, expected weights",
    ),
    "53 absurd shape": (safetensors(tensor([2**62, 4]), b"0000"), "overflow computing buffer size"),
    "53 empty and absurd": (safetensors(tensor([0, 10**18], end=0)), "is empty, expected weights"),
    "53 a thousand dimensions": (safetensors(tensor([1] * 1000), b"0000"), "is no bigram model's"),
    "53 dtype with a control character": (safetensors(tensor([1], "\x1b[2J"), b"0000"), r"unknown variant `\x1b[2J`"),
    "54 fp8": (safetensors(tensor([2, 2], "F8_E4M3"), b"0000"), "float8_e4m3fn tensor on cpu, expected dense floats"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_or_a_safetensors_file_that_cannot_be_is_refused(case, tmp_path):
    make, reason = FOLDERS[case]
    assert reason in refusal(make(tmp_path), tmp_path)


def test_control_sound_shards_are_opened(tmp_path):
    path = shards()(tmp_path)
    assert ckpt.load(path).model_state.keys() == STATE.keys()


def test_54_bf16_is_opened_as_float32(tmp_path):
    path = ckpt.save(record(3, model_state={WEIGHT: torch.ones(8, 8, dtype=torch.bfloat16)}), tmp_path)
    model = build_model(opened(path, tmp_path), device=torch.device("cpu"))
    assert {each.dtype for each in model.state_dict().values()} == {torch.float32}


CHANGES = {
    "shrinks": lambda data: data[: len(data) // 2],
    "is emptied": lambda data: b"",
    "grows": lambda data: data + bytes(5000),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", ckpt.WRITERS)
def test_56_what_changes_between_two_looks_at_it_is_refused_or_right(layout, change, tmp_path, monkeypatch):
    """Between the check of its structure and the opening of its tensors."""
    path = ckpt.save(record(3), tmp_path, layout=layout)

    def changing(action: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Path, **named: Any) -> Any:
            file.write_bytes(CHANGES[change](file.read_bytes()))
            return action(file, **named)

        return call

    monkeypatch.setattr(archive, "_map", changing(archive._map))
    monkeypatch.setattr(sharded, "_mapped", changing(sharded._mapped))
    check = tensors.check_header
    monkeypatch.setattr(tensors, "check_header", lambda file: (check(file), changing(lambda _: None)(file))[0])
    outcome = opened_or_said(path, verify=False)
    if isinstance(outcome, str):
        assert outcome.startswith(str(path.parent))
    else:
        assert change == "grows"
        assert tensor_bytes(outcome) == tensor_bytes(record(3))


FORMATS = {
    "GGUF": b"GGUF\x03\0\0\0",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "JSON": b"{}",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_57_another_programs_format_is_called_what_it_is(name, tmp_path):
    text = refusal(written(FORMATS[name], "weights.bin")(tmp_path), tmp_path)
    assert "is not a checkpoint of a known layout" in text
    assert name in text


@pytest.mark.parametrize("suffix", ["onnx", "msgpack", "h5", "npz", "ckpt.index", "ckpt.data-00000-of-00001"])
def test_57_what_milepost_has_never_heard_of_is_refused_too(suffix, tmp_path):
    assert "is not a checkpoint of a known layout" in refusal(
        written(b"\x08\x07\x12\x07other", f"weights.{suffix}")(tmp_path), tmp_path
    )


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def with_metadata(folder: Path, text: str) -> Path:
    path = good(folder)
    return pack(path, members(path) | {JSON_MEMBER: text})


def metadata_of(folder: Path) -> dict[str, Any]:
    path = good(folder)
    values = json.loads(members(path)[JSON_MEMBER])
    path.unlink()
    return values


SIZES = {"vocab_size": 8, "block_size": 4}
METADATA = {
    "37 no settings": ({"model_settings": {}}, "vocab_size is None, expected a positive whole number"),
    "37 settings of a wrong type": ({"model_settings": [8, 4]}, "model_settings is [8, 4], expected dict"),
    "37 zero": ({"model_settings": SIZES | {"block_size": 0}}, "block_size is 0, expected a positive whole number"),
    "37 negative": ({"model_settings": SIZES | {"vocab_size": -8}}, "vocab_size is -8"),
    "37 text": ({"model_settings": SIZES | {"vocab_size": "8"}}, "vocab_size is '8'"),
    "37 fraction": ({"model_settings": SIZES | {"vocab_size": 8.0}}, "vocab_size is 8.0"),
    "37 truth": ({"model_settings": SIZES | {"block_size": True}}, "block_size is True"),
    "37 absurd": ({"model_settings": SIZES | {"vocab_size": 10**12}}, "vocab_size=1000000000000"),
    "37 more than a number holds": ({"model_settings": SIZES | {"block_size": 10**400}}, "block_size is 1000"),
    "37 layers of a bigram": ({"model_settings": SIZES | {"n_layer": 2}}, "n_layer"),
    "38 newer format": (
        {"format_version": 3, "written_by": "milepost 9.0\x1b[2J"},
        r"format 3 was written by 'milepost 9.0\x1b[2J': update milepost: this is 0.1.0, which reads formats up to 2",
    ),
    "38 format of a wrong type": ({"format_version": "1"}, "format_version is '1', expected int"),
    "39 unknown model": ({"model_type": "mamba"}, "model_type='mamba': expected one of bigram, gpt2, llama"),
    "39 model of a wrong type": ({"model_type": 7}, "model_type is 7, expected str"),
    "40 more tokens than rows": (
        {"tokenizer": {"kind": "char", "chars": list("abcdefghi")}},
        "its tokenizer has 9 tokens, but its model only 8 rows",
    ),
    "41 no tokenizer": ({"tokenizer": None}, "carries no tokenizer"),
    "41 a token twice": ({"tokenizer": {"kind": "char", "chars": ["a", "a"]}}, "distinct"),
    "41 unknown kind": ({"tokenizer": {"kind": "word\x1b"}}, "unknown tokenizer kind"),
    "48 negative step": ({"step": -1}, "step is -1, expected int"),
    "48 true step": ({"step": True}, "step is True, expected int"),
    "48 fraction of a step": ({"step": 1.5}, "step is 1.5, expected int"),
    "48 text for a step": ({"step": "1"}, "step is '1', expected int"),
    "48 no step": ({"step": None}, "step is None, expected int"),
    "48 step that no number holds": ({"step": 10**400}, "step is 1000"),
    "48 loss of text": ({"validation_loss": "low"}, "validation_loss is 'low', expected float | None"),
    "a run's name that leads out of its folder": ({"run_id": "../../outside"}, "run_id is '../../outside'"),
    "a run's name that is hidden": ({"run_id": ".hidden"}, "run_id is '.hidden'"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_is_refused_by_field_and_value(case, tmp_path):
    changes, reason = METADATA[case]
    path = with_metadata(tmp_path, json.dumps(metadata_of(tmp_path) | changes))
    assert reason in refusal(path, tmp_path)


TEXTS = {
    "48 NaN step": ('{"step": NaN, "model_type": "bigram", "model_settings": {}}', "NaN is not a JSON number"),
    "48 infinite loss": ('{"best_loss": -Infinity}', "-Infinity is not a JSON number"),
    "48 loss past all floats": (
        '{"validation_loss": 1e999, "step": 1, "model_type": "a", "model_settings": {}}',
        "inf",
    ),
    "a number of 5000 digits": ('{"step": ' + "9" * 5000 + "}", "archive/milepost.json: is damaged: not valid JSON"),
    "no object": ("[]", "archive/milepost.json: holds list, expected an object"),
    "null": ("null", "archive/milepost.json: holds NoneType, expected an object"),
    "a name twice": ('{"step": 1, "step": 2}', "a name is repeated"),
    "a million lists": ('{"a": [' + "[]," * 1_000_000 + "[]]}", "has more than 1000000 values"),
    "an empty object": ("{}", "its metadata has no model_type"),
    "no JSON": ("model_type: bigram", "archive/milepost.json: is damaged: not valid JSON"),
    "nothing": ("", "archive/milepost.json: is damaged: not valid JSON"),
    "too deep": ("[" * 100_000, "archive/milepost.json: is damaged: not valid JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_metadata_that_is_no_plain_json_is_refused(case, tmp_path):
    text, reason = TEXTS[case]
    assert reason in refusal(with_metadata(tmp_path, text), tmp_path)


def test_metadata_beyond_all_measure_is_refused_unread(tmp_path):
    path = with_metadata(tmp_path, '{"a": "' + "a" * (16 * 2**20) + '"}')
    assert "is larger than 16777216 bytes" in refusal(path, tmp_path)


def test_38_unknown_fields_are_left_out_and_reported(tmp_path):
    values = metadata_of(tmp_path) | {"colour": "blue", "path": "/etc/passwd", "\x1b[2J": 1}
    one = opened(with_metadata(tmp_path, json.dumps(values)), tmp_path)
    assert one.path == next(tmp_path.glob("*.pt"))
    assert one.notes == [
        f"{one.path}: 3 fields that this version does not know were left out: '\\x1b[2J', 'colour', 'path'"
    ]
    assert tensor_bytes(one) == tensor_bytes(record(3))


@pytest.mark.parametrize(
    "changes",
    [
        {"hyperparameters": {"DATA": "\ud800"}},
        {"hyperparameters": {"\udc80": 1}},
        {"saved_at": "2025\udfff"},
        {"parent": {"run_id": "one", "step": 1, "changed": {"SEED": ["\ud800", 1]}}},
    ],
)
def test_half_a_surrogate_pair_is_a_problem_of_its_own_file_only(changes, tmp_path):
    """Printed, it would end the command, and with it the list of the whole folder."""
    path = with_metadata(tmp_path, json.dumps(metadata_of(tmp_path) | changes))
    beside = ckpt.save(record(4), tmp_path)
    reason = refusal(path, tmp_path)
    assert ckpt.verify(path) == [reason]
    assert {each.path: each.problem for each in ckpt.find(tmp_path)} == {path: reason, beside: None}
    done = command("scripts/list_checkpoints.py", tmp_path, CHECKPOINT_PATH=str(tmp_path))
    assert done.returncode == 0
    assert beside.name in done.stdout
    assert path.name in done.stdout


def test_a_name_that_is_no_utf8_is_listed(tmp_path):
    path = good(tmp_path)
    path.rename(tmp_path / os.fsdecode(b"\xff.pt"))
    done = command("scripts/list_checkpoints.py", tmp_path, CHECKPOINT_PATH=str(tmp_path))
    assert done.returncode == 0
    assert r"\udcff.pt" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def layers(tensor: torch.Tensor, *, count: int = 1000) -> Callable[[Path], Path]:
    """A file of so many tensors, and of as many layers by its settings."""

    def make(folder: Path) -> Path:
        one = gpt2_record()
        one.model_state |= {f"h.{number}.ln_1.weight": tensor.clone() for number in range(count)}
        path = ckpt.save(one, folder)
        values = metadata_of_file(path)
        values["model_settings"]["n_layer"] = count
        return pack(path, members(path) | {JSON_MEMBER: json.dumps(values)})

    return make


def metadata_of_file(path: Path) -> dict[str, Any]:
    return json.loads(members(path)[JSON_MEMBER])


@pytest.mark.parametrize("tensor", [torch.empty(0), torch.ones(1)], ids=["empty", "of one number"])
def test_a_model_of_more_layers_than_its_tensors_make_is_not_built(tensor, tmp_path):
    """Of as many layers as tensors, a model would take hundreds of times the bytes of its file."""
    path = layers(tensor)(tmp_path)
    tracemalloc.start()
    text = refusal(path, tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "n_layer is 1000, but it holds only" in text
    assert most < 40 * path.stat().st_size


BOMBS = {
    **{
        f"container {case}": CONTAINERS[case]
        for case in ("19 bomb", "19 declared size", "19 one place for a thousand members")
    },
    **{
        f"structure {case}": STRUCTURES[case]
        for case in ("29 stride 0", "29 overlapping strides", "29 one storage for all")
    },
    **{f"foreign {case}": FOREIGN[case] for case in ("25 deep", "25 cyclic", "25 doubled")},
    **{f"opcodes {case}": (of_opcodes(OPCODES[case][0]), OPCODES[case][1]) for case in OPCODES},
    "metadata a million lists": (
        lambda folder: with_metadata(folder, TEXTS["a million lists"][0]),
        TEXTS["a million lists"][1],
    ),
    **{f"folder {case}": FOLDERS[case] for case in FOLDERS if case.startswith("53")},
}
OPENS = """
import resource, sys
from pathlib import Path
from milepost import ckpt; import torch
torch.set_num_threads(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.stdin.read().splitlines():
    try:
        print("opened", ckpt.load(Path(path), verify=True).step)
    except ckpt.CheckpointError as error:
        print("refused", error)
"""


def test_bombs_are_refused_in_a_quarter_of_a_gigabyte(tmp_path):
    """By the reason that they are refused for, and not because memory ran out."""
    paths = []
    for number, (make, _) in enumerate(BOMBS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(make(folder))
    lines = "\n".join(map(str, [*paths, good(tmp_path)]))
    done = subprocess.run(
        [sys.executable, "-c", OPENS],
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
        timeout=HANGING,
        check=True,
    )
    *said, control = done.stdout.splitlines()
    assert control == "opened 3"
    for (case, (_, reason)), line in zip(BOMBS.items(), said, strict=True):
        assert line.startswith("refused"), case
        assert reason in line, case


# ---------------------------------------------------------------------------------------------------------------------
# At the command line


def at_the_door(folder: Path, path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    prompt = {} if "MODE" in changes else {"PROMPT": "a"}
    set_here = {**NOTHING_OF_TRAINING, "CHECKPOINT_PATH": str(path), **prompt, **changes}
    return command("scripts/load_checkpoint.py", folder, **set_here)


DOOR = {
    "missing": (lambda folder: folder / "checkpoints" / "missing.pt", {}),
    "truncated": (truncated, {"MODE": "resume"}),
    "an edited folder": (manifest(**{"../x": {"size": 1, "sha256": "0"}}), {"MODE": "resume"}),
    "another program's, in part": (foreign(model=STATE | {"h.0.extra": torch.ones(2)}, config=SETTINGS), {}),
    "with code": (lambda folder: torch_saved(folder, Evil(f"open({str(folder / 'it ran')!r}, 'w').close()")), {}),
}


@pytest.mark.parametrize("case", DOOR)
def test_the_command_prints_one_sentence_and_exits_with_3(case, tmp_path):
    make, changes = DOOR[case]
    path = make(tmp_path)
    done = at_the_door(tmp_path, path, **changes)
    assert done.returncode == 3
    assert done.stdout == ""
    *before, error = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert len(before) == ("MODE" in changes)  # a resume first says how to look without training
    assert str(path) in error
    assert not (tmp_path / "it ran").exists()
