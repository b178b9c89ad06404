"""Opens checkpoints that were changed at random, in a process whose memory and time are bounded; test_fuzz.py starts
it.

`python3 tests/fuzz.py FOLDER SEED FIRST COUNT` says what came of each case, in one line of JSON. A case is known by
seed and number. Blind changes are an accident's: whatever still loads must be the original in every bit. Those that
know the format are somebody's work: their checksums are right, so that they reach what is behind them, and a load must
only be harmless.
"""

import io
import json
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from folders import every_file, sentence_of  # noqa: E402
from records import FULL, bits, gpt2_record, members, pack, record  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from work import HANGING  # noqa: E402

from milepost import ckpt, files  # noqa: E402
from milepost.ckpt import Checkpoint, archive, index, manifest, restore  # noqa: E402
from milepost.runtime.optim import build_optimizer  # noqa: E402

MOST_TOLD = 20
MEMORY = 2**30  # bytes of address space beyond what the process has when it begins


@dataclass
class Sample:
    """A checkpoint as it was saved, and the bytes of each of its files."""

    home: Path
    original: Checkpoint
    content: dict[Path, bytes]
    ours: bool  # with checksums


# ---------------------------------------------------------------------------------------------------------------------
# What is changed.


def samples(folder: Path) -> list[Sample]:
    """One of each layout, of ours and of others."""
    one = record(7, **FULL)
    homes = [ckpt.save(one, folder / layout, layout=layout) for layout in ckpt.WRITERS]
    homes += [
        ckpt.save(gpt2_record(), folder / f"gpt2-{layout}", layout=layout)
        for layout in ("unified", "directory", "huggingface", "sharded")
    ]
    others = [write(folder) for write in (nanogpt, lightning, flat, transformers_own, without_manifest, bare)]
    return [sample(home, ours=True) for home in homes] + [sample(home, ours=False) for home in others]


def sample(home: Path, *, ours: bool) -> Sample:
    beside = [path for path in home.parent.iterdir() if not ours and path.is_file() and not path.name.startswith(".")]
    content = {path: path.read_bytes() for path in {*every_file(home), *beside}}
    return Sample(home, copied(ckpt.load(home)), dict(sorted(content.items())), ours)


def copied(one: Checkpoint) -> Checkpoint:
    """Return a copy of the record: loaded tensors are mapped from the files and would change with them."""
    moments = one.optimizer_state["state"] if one.optimizer_state else {}
    for tensors in (one.model_state, *moments.values()):
        tensors |= {name: tensor.clone() for name, tensor in tensors.items()}
    return one


def nanogpt(folder: Path) -> Path:
    """With its meta.pkl, which is pickled by hand here: protocol 2, dicts of one-letter texts and numbers."""
    import pickle

    one = gpt2_record(settings={"activation": "gelu_erf"})
    named = {f"_orig_mod.transformer.{name}": tensor for name, tensor in one.model_state.items()}
    named["_orig_mod.lm_head.weight"] = one.model_state["wte.weight"].clone()
    arguments = {
        name: one.model_settings[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")
    }
    path = folder / "nanogpt" / "ckpt.pt"
    path.parent.mkdir()
    torch.save(
        {"model": named, "model_args": arguments, "iter_num": 5, "best_val_loss": torch.tensor(2.0), "config": {}}, path
    )
    letters = dict(enumerate("abcdefghijk "))
    meta = {"vocab_size": 12, "itos": letters, "stoi": {letter: number for number, letter in letters.items()}}
    (path.parent / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=4))
    return path


def lightning(folder: Path) -> Path:
    one = gpt2_record()
    path = folder / "lightning" / "epoch=1.ckpt"
    path.parent.mkdir()
    state = {f"model.{name}": tensor for name, tensor in one.model_state.items()}
    torch.save(
        {
            "pytorch-lightning_version": "2.6",
            "state_dict": state,
            "hyper_parameters": one.model_settings,
            "global_step": 3,
            "epoch": 1,
        },
        path,
    )
    return path


def flat(folder: Path) -> Path:
    """As MLX saves it."""
    path = folder / "mlx" / "step_000003.safetensors"
    path.parent.mkdir()
    save_file(record(3).model_state, path)
    path.with_name("step_000003_state.json").write_text(
        json.dumps({"step": 3, "epoch": 1, "metrics": {"val_loss": 2.0}})
    )
    return path


def transformers_own(folder: Path) -> Path:
    home = ckpt.save(gpt2_record(), folder / "transformers", layout="huggingface")
    for name in ("milepost.json", "optimizer.safetensors"):
        (home / name).unlink()
    return home


def without_manifest(folder: Path) -> Path:
    home = ckpt.save(gpt2_record(), folder / "unlisted", layout="directory")
    (home / "manifest.json").unlink()
    return home


def bare(folder: Path) -> Path:
    """Weights and settings without a word of ours."""
    one = gpt2_record()
    path = folder / "bare" / "model_best.pth"
    path.parent.mkdir()
    torch.save(
        {"state_dict": one.model_state, "config": one.model_settings, "optimizer": one.optimizer_state, "step": 3}, path
    )
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Blind changes.


def blind(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """One to three of: flipped bits, overwritten, removed, doubled or foreign pieces, a cut, a longer end."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = draw.choice((flip, overwrite, take_out, put_in, splice, cut, grow))(draw, data, other)
    return data


def piece(draw: random.Random, data: bytes) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 2, 4, 8, 64, 512, 4096)))


def flip(draw: random.Random, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8)) if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def overwrite(draw: random.Random, data: bytes, _: bytes) -> bytes:
    start, end = piece(draw, data)
    return data[:start] + draw.choice((b"\0", b"\xff", b"9", draw.randbytes(1)))[:1] * (end - start) + data[end:]


def take_out(draw: random.Random, data: bytes, _: bytes) -> bytes:
    start, end = piece(draw, data)
    return data[:start] + data[end:]


def put_in(draw: random.Random, data: bytes, _: bytes) -> bytes:
    start, end = piece(draw, data)
    return data[:end] + data[start:end] + data[end:]


def splice(draw: random.Random, data: bytes, other: bytes) -> bytes:
    start, end = piece(draw, data)
    return data[:start] + other[start:end] + data[end:]


def cut(draw: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def grow(draw: random.Random, data: bytes, _: bytes) -> bytes:
    return data + draw.choice((b"\n", bytes(22), data[-64:], draw.randbytes(9)))


# ---------------------------------------------------------------------------------------------------------------------
# Changes that know the format.

WORDS = [
    "step",
    "params",
    "param_names",
    "__metadata__",
    "model_type",
    "n_layer",
    "gpt2",
    "bigram",
    "F64",
    "BF16",
    "I8",
    "char",
    "bpe",
]
VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 1, lambda: 7, lambda: 2**31,
    lambda: 2**63, lambda: 10**400,
    lambda: 0.5, lambda: 1e308, lambda: -0.0, lambda: "", lambda: "x" * 1000, lambda: "\x1b[2J", lambda: "\ud800",
    lambda: "../../etc/passwd",
    lambda: "/dev/zero", lambda: "a\nb\0", lambda: [], lambda: {}, lambda: [[]], lambda: nested(50),
    lambda: nested(200), lambda: ["a"] * 1000,
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in JSON values with each of its keys, not far down."""
    found, waiting = [], [value]
    while waiting and len(found) < 5000:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one))) if isinstance(one, list) else []
        found += [(one, key) for key in keys]
        waiting += [one[key] for key in keys[:200]]
    return found


def changed_values(draw: random.Random, values: Any) -> None:
    """One to three values replaced, removed, renamed, exchanged or added, in place."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        found = places(values)
        if not found:
            return
        (container, key), (other, other_key) = draw.choice(found), draw.choice(found)
        action = draw.randrange(6)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[draw.choice(WORDS)] = container.pop(key)
        elif action == 2:
            container[key] = json.loads(json.dumps(other[other_key]))
        elif action == 3 and isinstance(container[key], int | float):
            container[key] = container[key] * draw.choice((-1, 2, 10**6)) + draw.choice((-1, 0, 1))
        elif action == 4 and isinstance(container, dict):
            container[draw.choice(WORDS)] = draw.choice(VALUES)()
        else:
            container[key] = draw.choice(VALUES)()


def text_of(draw: random.Random, values: Any) -> bytes:
    """Return JSON text, sometimes with duplicate names, NaN or Infinity, which only other writers write."""
    text = json.dumps(values)
    if draw.random() < 0.05:
        text = text.replace("{", '{"step": 1, "step": 2, ', 1)
    if draw.random() < 0.05:
        text = text.replace(": 0", ": NaN", 1).replace(": 1", ": 1e999", 1)
    if draw.random() < 0.02:
        text = text.replace("[", "[" * 100_000, 1)
    if draw.random() < 0.01:
        text = text.replace("[", "[" + "[]," * draw.choice((10**5, 11 * 10**5)), 1)
    return text.encode()


def informed(draw: random.Random, path: Path, data: bytes) -> bytes:
    """The file with its structure changed and its own checksums made right."""
    if path.suffix == ".json":
        values = json.loads(data)
        changed_values(draw, values)
        if "metadata" in values and "files" in values:
            values["sha256"] = manifest._own_sum(values)
        return text_of(draw, values)
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        changed_values(draw, header)
        text = text_of(draw, header)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if path.suffix == ".pkl":
        return blind(draw, data, data)
    if path.name == ".metadata":
        return respliced(draw, data)
    if path.suffix == ".distcp":
        return splice(draw, data, bytes(len(data)))
    return informed_archive(draw, path)


TWICE = [  # opcodes before and after a value that make one of two of it
    (b"", b"q\xf0h\xf0\x86"), (b"(", b"q\xf0h\xf0t"), (b"](", b"q\xf0h\xf0e"), (b"}(K\x01", b"q\xf0K\x02h\xf0u"),
    (b"]q\xf0h\xf0", b"a"),
]  # fmt: skip
USES = [  # what stands before and after a value, so that one is left: kept, a key, called, walked
    (b"", b""), (b"}", b"K\x01s"), (b"", b")R"), (b"", b")\x81"), (b"", b"Q"), (b"", b"\x85"), (b"(", b"Nt"),
    (b"ccollections\nOrderedDict\n](", b"K\x01\x86e\x85R"), (b"ccollections\nOrderedDict\n)R](", b"K\x01\x86eb"),
    (b"ctorch\nSize\n", b"\x85R"), (b"ctorch\nFloatStorage\n", b"\x85R"),
]  # fmt: skip


def built(draw: random.Random) -> bytes:
    """Opcodes that leave one value, most of them one that is far larger than they are."""
    kind = draw.randrange(8)
    if kind == 0:
        return b"(" + draw.choice((b"N", b"]", b"}", b"(", b"N0", b"\x8f")) * draw.choice((10, 10**5)) + b"t"
    if kind == 1:
        return (
            b"X" + struct.pack("<I", 2**16) + b"a" * 2**16 + b"q\xf0](" + b"h\xf0" * draw.choice((1, 100, 10**4)) + b"e"
        )
    (begin, end), (before, after), depth = draw.choice(TWICE), draw.choice(USES), draw.choice((1, 3, 20, 50, 1000))
    return before + begin * depth + b"K\x01\x85" + end * depth + after


def respliced(draw: random.Random, pickled: bytes) -> bytes:
    """One to three opcodes or runs of them replaced: by others of it, by nothing,
    by a value that is built up out of itself.
    """
    for _ in range(draw.choice((1, 1, 2, 3))):
        try:
            found = [(opcode, place) for opcode, _, place in pickletools.genops(pickled)]
        except ValueError:
            return pickled
        edges = [place for _, place in found] + [len(pickled)]
        values = [number for number, (opcode, _) in enumerate(found) if opcode.stack_after and not opcode.stack_before]
        if values and draw.random() < 0.6:
            number = draw.choice(values)
            pickled = pickled[: edges[number]] + built(draw) + pickled[edges[number + 1] :]
            continue
        start, source = draw.randrange(len(found)), draw.randrange(len(found))
        end, until = (min(len(found), one + draw.choice((0, 1, 1, 2, 8))) for one in (start, source))
        pickled = pickled[: edges[start]] + pickled[edges[source] : edges[until]] + pickled[edges[end] :]
    return pickled


# Offset in the record and format of each field of a zip file's records that says where its members lie and what they
# are.
ENTRY_FIELDS = (
    (8, "<H"),
    (10, "<H"),
    (16, "<L"),
    (20, "<L"),
    (24, "<L"),
    (28, "<H"),
    (30, "<H"),
    (32, "<H"),
    (42, "<L"),
)
LOCAL_FIELDS = ((6, "<H"), (8, "<H"), (14, "<L"), (18, "<L"), (22, "<L"), (26, "<H"), (28, "<H"))
END_FIELDS = ((4, "<H"), (6, "<H"), (8, "<H"), (10, "<H"), (12, "<L"), (16, "<L"), (20, "<H"))


def zip_records(data: bytes) -> list[tuple[int, tuple[tuple[int, str], ...]]]:
    """Where each entry of the directory, each local header and the end record begin, and their fields;
    the entries first.
    """
    end = data.rindex(b"PK\x05\x06")
    (at,) = struct.unpack_from("<L", data, end + 16)
    entries, headers = [], []
    while data[at : at + 4] == b"PK\x01\x02":
        entries.append((at, ENTRY_FIELDS))
        headers.append((struct.unpack_from("<L", data, at + 42)[0], LOCAL_FIELDS))
        at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
    return [*entries, *headers, (end, END_FIELDS)]


def zip_field(draw: random.Random, data: bytes) -> bytes:
    """One field of one record has another value: its neighbour's, one more or less, a limit."""
    records = zip_records(data)
    at, fields = draw.choice(records)
    offset, form = draw.choice(fields)
    other, _ = draw.choice([record for record in records if record[1] is fields])
    limit = 256 ** struct.calcsize(form) - 1
    (now,), (others,) = (struct.unpack_from(form, data, place + offset) for place in (at, other))
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, draw.choice((others, now + 1, now - 1, now ^ 8, 0, limit)) & limit)
    return bytes(changed)


def zip_names(draw: random.Random, data: bytes) -> bytes:
    """A letter of one name has the other case, or is a slash or a backslash, in one of its two headers or in both."""
    records = zip_records(data)
    number = draw.randrange(len(records) // 2)
    entry, header = records[number][0], records[number + len(records) // 2][0]
    (length,) = struct.unpack_from("<H", data, entry + 28)
    place, changed = draw.randrange(length), bytearray(data)
    letter = draw.choice((data[entry + 46 + place] ^ 0x20, *b"/\\A\xe9"))
    for begin in draw.choice(([entry + 46], [header + 30], [entry + 46, header + 30])):
        changed[begin + place] = letter
    return bytes(changed)


def zip_twin(draw: random.Random, data: bytes) -> bytes:
    """One more member, its name nearly or exactly another's, its bytes another's or that one's with a change."""
    with zipfile.ZipFile(file := io.BytesIO(data), "a") as archive:
        name, other = draw.choice(archive.namelist()), draw.choice(archive.namelist())
        folder, _, rest = name.partition("/")
        names = (name, name.upper(), f"{folder}/{rest.upper()}", f"{folder.upper()}/{rest}", f"other/{rest}", rest)
        content = draw.choice((archive.read(other), flip(draw, archive.read(name), b"")))
        with warnings.catch_warnings(action="ignore"):
            archive.writestr(draw.choice((*names, name.replace("/", "\\"), f"{folder}/./{rest}", f"/{name}")), content)
    return file.getvalue()


def zip_order(draw: random.Random, data: bytes) -> bytes:
    """Two entries of the directory exchanged, left out or doubled, the end record made right."""
    records = zip_records(data)
    (end, _), starts = records[-1], [at for at, fields in records if fields is ENTRY_FIELDS]
    parts = [data[one:other] for one, other in zip(starts, [*starts[1:], end], strict=True)]
    one, other = draw.randrange(len(parts)), draw.randrange(len(parts))
    parts[one : one + 1] = draw.choice(([parts[other]], [], [parts[one], parts[one]]))
    tail = bytearray(data[end:])
    struct.pack_into("<HHL", tail, 8, len(parts), len(parts), sum(map(len, parts)))
    return data[: starts[0]] + b"".join(parts) + tail


def zip_gap(draw: random.Random, data: bytes) -> bytes:
    """Bytes before, between or behind the members, every offset behind them made right or not."""
    records = zip_records(data)
    at = draw.choice([*(start for start, fields in records if fields is LOCAL_FIELDS), records[0][0], records[-1][0]])
    filling = draw.choice((b"x", bytes(22), data[-22:], data[: draw.randrange(1, 200)]))
    changed = bytearray(data[:at] + filling + data[at:])
    for start, fields in records if draw.random() < 0.8 else []:
        shifted, offset = start + len(filling) * (start >= at), 42 if fields is ENTRY_FIELDS else 16
        if fields is not LOCAL_FIELDS and struct.unpack_from("<L", data, start + offset)[0] >= at:
            (now,) = struct.unpack_from("<L", data, start + offset)
            struct.pack_into("<L", changed, shifted + offset, now + len(filling))
    return bytes(changed)


def zip_structure(draw: random.Random, data: bytes) -> bytes:
    """The archive with the same members' bytes and another structure."""
    return draw.choice((zip_field, zip_field, zip_names, zip_twin, zip_order, zip_gap))(draw, data)


def informed_archive(draw: random.Random, path: Path) -> bytes:
    if draw.random() < 0.3:
        return zip_structure(draw, path.read_bytes())
    content: dict[str, Any] = members(path)
    name = draw.choice([each for each in content if each.endswith((".pkl", ".json"))])
    if name.endswith(".json"):
        values = json.loads(content[name])
        changed_values(draw, values)
        content[name] = text_of(draw, values)
    else:
        pickled = content[name]
        content[name] = respliced(draw, pickled) if draw.random() < 0.5 else blind(draw, pickled, pickled[::-1])
    if draw.random() < 0.1:
        del content[draw.choice(list(content))]
    scratch = path.with_name(".scratch")
    data = pack(scratch, content).read_bytes()
    scratch.unlink()
    return data


def listed_again(one: Sample, path: Path, data: bytes) -> dict[Path, bytes]:
    """The manifest with the size and the sums that the changed file now has, if there is one and it names the file."""
    import hashlib

    changed = {path: data}
    for place, text in one.content.items():
        values = json.loads(text) if place.suffix == ".json" and place != path and one.ours else {}
        for name, entry in values.get("files", {}).items() if isinstance(values.get("files"), dict) else ():
            if place.parent / name == path:
                begins = hashlib.sha256(data[: files.BEGINNING]).hexdigest()
                entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest(), begins_sha256=begins)
                values["sha256"] = manifest._own_sum(values)
                changed[place] = json.dumps(values).encode()
    return changed


# ---------------------------------------------------------------------------------------------------------------------
# What may come of it.


def case(draw: random.Random, every: list[Sample]) -> str:
    """Change one file of a checkpoint, open it in every way, and restore it; return the outcome."""
    one = draw.choice(every)
    path = draw.choice(list(one.content))
    knowing = draw.random() < 0.5
    if knowing:
        changed = listed_again(one, path, informed(draw, path, one.content[path]))
    else:
        changed = {path: blind(draw, one.content[path], draw.choice(list(one.content.values())))}
    for place, data in changed.items():
        place.write_bytes(data)
    archive._cached.cache_clear()  # which know a file by its time, and no two saves come so soon after each other
    index._last_listing.cache_clear()
    try:
        return outcome(draw, one, exact=one.ours and not knowing)
    finally:
        for place in changed:
            place.write_bytes(one.content[place])


def outcome(draw: random.Random, one: Sample, *, exact: bool) -> str:
    look_around(one.home)
    try:
        record = ckpt.load(one.home, verify=exact or draw.random() < 0.5, optimizer=draw.random() < 0.8)
    except Exception as error:
        refusal(error)
        return "refused"
    if exact:
        now, then = bits(record), bits(one.original)
        assert all(now[name] == then[name] for name in now), "other tensors passed verify"
        assert record.model_state.keys() == one.original.model_state.keys()
    return use(record)


def look_around(home: Path) -> None:
    """Do what list, verify and resolve do."""
    for found in ckpt.find(home.parent):
        assert found.problem is None or found.problem.isprintable(), found.problem
    assert all(problem.isprintable() for problem in ckpt.verify(home))
    for wish in ("best", str(home)):
        try:
            ckpt.resolve(wish, home.parent)
        except Exception as error:
            refusal(error)


def use(record: Checkpoint) -> str:
    """Do what generating and resuming do first."""
    assert all(note.isprintable() for note in record.notes), record.notes
    held = sum(tensor.nbytes for tensor in record.model_state.values())
    assert held < 2**20, "more tensors than the file can hold"
    try:
        model = restore.build_model(record, device=torch.device("cpu"))
        if record.tokenizer is not None:
            restore.build_tokenizer(record)
        if record.optimizer_state is not None:
            updates = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
            restore.restore_optimizer(updates, record)
    except Exception as error:
        refusal(error)
        return "refused when used"
    return "loaded"


def refusal(error: Exception) -> None:
    text = sentence_of(error)
    assert "MemoryError" not in text, text
    assert "allocate" not in text, text


def main() -> None:
    folder, seed, first, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    every = samples(folder)
    restore.build_tokenizer(next(one.original for one in every if one.original.tokenizer))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts: Counter[str] = Counter()
    failures = []
    progress = os.open(folder / "progress", os.O_WRONLY | os.O_CREAT)
    for number in range(first, first + count):
        os.pwrite(progress, b"%12d" % number, 0)
        signal.alarm(HANGING)  # ends the process, also from within C
        try:
            counts[case(random.Random(f"{seed}/{number}"), every)] += 1
        except BaseException:
            failures.append(f"case {seed}/{number}:\n{traceback.format_exc()}")
    signal.alarm(0)
    print(json.dumps(counts))
    sys.exit("\n".join(failures[:MOST_TOLD]) if failures else 0)


if __name__ == "__main__":
    main()
