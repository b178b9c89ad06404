"""What is no good checkpoint is refused in one sentence that names it, soon, without running its code or filling memory."""

import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import command, tensor_bytes
from records import WEIGHT, in_child, members, pack, record, walkable_folder
from safetensors.torch import save_file

import ckpt
from ckpt import Checkpoint, CheckpointError
from ckpt.rebuild import build_model, build_tokenizer

SECONDS = 3  # of a slow machine; each takes milliseconds
JSON_MEMBER = "archive/milepost.json"


def opened(wish: str | Path, folder: Path) -> Checkpoint:
    """What inference does with CHECKPOINT_PATH, as far as the model that could answer."""
    path, _ = ckpt.resolve(str(wish), folder)
    one = ckpt.load(path, verify=True)
    build_model(one, device=torch.device("cpu"))
    build_tokenizer(one)
    return one


def refusal(wish: str | Path, folder: Path) -> str:
    """The one sentence in which `wish` is refused, by name and soon."""
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        opened(wish, folder)
    text = str(caught.value)
    assert time.monotonic() - start < SECONDS
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
    "5 glob without a match": (lambda folder: folder / "checkpoint_*_step9.pt", "nothing matches"),
    "7 pipe": (pipe, "is no regular file"),
    "7 pipe of another name": (lambda folder: pipe(folder, "pipe"), "is no checkpoint of a known layout"),
    "7 socket": (unix_socket, "is no regular file"),
    "7 device": (lambda _: Path("/dev/zero"), "is no checkpoint of a known layout"),
    "7 link to a device": (linked("/dev/zero"), "is no regular file"),
    "8 dangling link": (linked("nowhere"), "Checkpoint not found"),
    "8 looping link": (linked("link.pt"), "Checkpoint not found"),
    "10 git-lfs pointer": (written("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "run `git lfs pull`"),
    "11 web page": (written("\n<!DOCTYPE html><html><body>404</body></html>"), "a web page"),
    "12 JSON": (written('{"model_state_dict": {}}'), "JSON text"),
    "12 text": (written("the weights are in the other file\n"), "of an unknown kind"),
    "13 safetensors": (safetensors_file, "a safetensors file"),
    "13 tokenizer.json": (written("{}", "tokenizer.json"), "is no checkpoint of a known layout"),
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
    return pack(
        folder / "bad.pt",
        {"bad/data.pkl": b"", "bad/constants.pkl": b"", "bad/code/__torch__.py": b"", "bad/version": b"3"},
    )


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


def legacy_pickle(folder: Path) -> Path:
    torch.save({"model_state_dict": record().model_state}, folder / "bad.pt", _use_new_zipfile_serialization=False)
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
    "20 checksum": (wrong_checksum, "the bytes of archive/data/0 do not agree with their checksum"),
    "21 bytes before": (prefixed, "does not begin with its archive"),
    "22 legacy tar": (legacy_tar, "of an unknown kind"),
    "22 legacy pickle": (legacy_pickle, "a bare pickle, which is never opened"),
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
    """What torch.load finds in a good file, with changes."""
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
    """Negative control for the tests above: in a process of its own, plain pickle runs the very bytes that were refused."""
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
    "26 number for a name": (named(3), "3 is no name of a tensor"),
    "26 empty name": (named(""), "'' is no name of a tensor"),
    "26 long name": (named("w" * 513), "is no name of a tensor"),
    "26 control characters": (named("w\x1b[2J"), r"'w\x1b[2J' is no name of a tensor"),
    "26 line break": (named("a\nb"), r"'a\nb' is no name of a tensor"),
    "27 no weights": (
        value({"state": {}, "epoch\n": 3}),
        r"does not contain model_state_dict (keys seen: 'state', 'epoch\n')",
    ),
    "27 nothing at all": (value({}), "(keys seen: none)"),
    "27 empty weights": (weights(), "is dict of no tensors"),
    "27 weights of no dict": (value({"model_state_dict": [torch.ones(1)]}), "is list of no tensors"),
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


def test_36_weights_without_metadata_are_refused(tmp_path):
    torch.save({"model_state_dict": record().model_state}, tmp_path / "bad.pt")
    assert "the model's shape and tokenizer are unknown" in refusal(tmp_path / "bad.pt", tmp_path)
    (found,) = ckpt.find(tmp_path)
    assert "was written by another program" in str(found.problem)


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
        {"format_version": 2, "written_by": "milepost 9.0\x1b[2J"},
        r"format 2 was written by 'milepost 9.0\x1b[2J'; this is milepost 0.1.0, which reads up to 1: update it",
    ),
    "38 format of a wrong type": ({"format_version": "1"}, "format_version is '1', expected int"),
    "39 unknown model": ({"model_type": "llama"}, "model_type='llama': expected one of bigram, gpt2"),
    "39 model of a wrong type": ({"model_type": 7}, "model_type is 7, expected str"),
    "40 more tokens than rows": (
        {"tokenizer": {"kind": "char", "chars": list("abcdefghi")}},
        "its tokenizer has 9 tokens, but its model only 8 rows",
    ),
    "41 no tokenizer": ({"tokenizer": None}, "carries no tokenizer"),
    "41 a token twice": ({"tokenizer": {"kind": "char", "chars": ["a", "a"]}}, "must differ from each other"),
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
    "a number of 5000 digits": ('{"step": ' + "9" * 5000 + "}", "its metadata cannot be read"),
    "no object": ("[]", "its metadata is list, not an object"),
    "an empty object": ("{}", "its metadata has no model_type"),
    "no JSON": ("model_type: bigram", "its metadata cannot be read"),
    "nothing": ("", "its metadata cannot be read"),
    "too deep": ("[" * 100_000, "its metadata cannot be read"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_metadata_that_is_no_plain_json_is_refused(case, tmp_path):
    text, reason = TEXTS[case]
    assert reason in refusal(with_metadata(tmp_path, text), tmp_path)


def test_metadata_beyond_all_measure_is_refused_unread(tmp_path):
    path = with_metadata(tmp_path, '{"a": "' + "a" * (64 * 2**20) + '"}')
    assert "is larger than 67108864 bytes" in refusal(path, tmp_path)


def test_38_unknown_fields_are_left_out_and_said(tmp_path):
    values = metadata_of(tmp_path) | {"colour": "blue", "path": "/etc/passwd", "\x1b[2J": 1}
    one = opened(with_metadata(tmp_path, json.dumps(values)), tmp_path)
    assert one.path == next(tmp_path.glob("*.pt"))
    assert one.notes == [
        f"{one.path}: 3 fields that this version does not know were left out: '\\x1b[2J', 'colour', 'path'"
    ]
    assert tensor_bytes(one) == tensor_bytes(record(3))


# ---------------------------------------------------------------------------------------------------------------------
# At the door


def at_the_door(folder: Path, path: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return command("scripts/load_checkpoint.py", folder, CHECKPOINT_PATH=str(path), PROMPT="a", **changes)


DOOR = {
    "missing": (lambda folder: folder / "checkpoints" / "missing.pt", {}),
    "truncated": (truncated, {"MODE": "resume"}),
    "with code": (lambda folder: torch_saved(folder, Evil(f"open({str(folder / 'it ran')!r}, 'w').close()")), {}),
}


@pytest.mark.parametrize("case", DOOR)
def test_the_command_says_one_sentence_and_exits_with_3(case, tmp_path):
    make, changes = DOOR[case]
    path = make(tmp_path)
    done = at_the_door(tmp_path, path, **changes)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr
    assert not (tmp_path / "it ran").exists()
