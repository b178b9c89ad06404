"""Data sets of the hub: `hf://datasets/owner/name[@revision][:config][/split]` as the files that hold a split.

A revision becomes a commit, which takes its place in the address that a checkpoint records: a branch may move. The list of a commit's
files is kept beside the other caches, so that a resume needs no network.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from milepost.files import new_file
from milepost.text.errors import DataError
from milepost.text.readers import listed, suffix_of

HUB = "hf://"
SCHEME = f"{HUB}datasets/"
_ADDRESS = re.compile(
    rf"{SCHEME}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/convert/\w+|refs/pr/\d+|[^@:/\s]+))?"
    r"(:(?P<config>[\w.-]+))?(/(?P<split>[\w.-]+))?"
)
_COMMIT = re.compile("[0-9a-f]{40}")
_SHARD = re.compile(r"data/(?P<split>\w+(\.\w+)*)-\d{5}-of-\d{5,}\..*")
FORM = f"{SCHEME}owner/name[@revision][:config][/split]"
FOLDER = "or download the files and name their folder"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
# What the datasets library takes no text from, and which type it reads of several: the most frequent, of equals the first.
METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
TYPES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".txt", ".tsv")
SAME_TYPE = {".jsonl": ".json", ".tsv": ".csv"}


@dataclass(frozen=True)
class DataSet:
    """An address taken apart."""

    repo: str
    revision: str | None
    config: str | None
    split: str

    @property
    def address(self) -> str:
        """The address, with its split."""
        revision, config = f"@{self.revision}" * bool(self.revision), f":{self.config}" * bool(self.config)
        return f"{SCHEME}{self.repo}{revision}{config}/{self.split}"


def data_set(address: str) -> DataSet:
    """Return the parts of an address. Raise DataError if it is not of the form."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise DataError(f"{address}: expected {FORM}")
    return DataSet(found["repo"], found["revision"], found["config"], found["split"] or "train")


def at_commit(place: str, before: Iterable[str]) -> str:
    """Return the address that a checkpoint recorded for this place, among `before`, if only its commit differs; else the place."""
    if not _ADDRESS.fullmatch(place):
        return place
    asked = data_set(place)
    same = [
        each for each in map(data_set, filter(_ADDRESS.fullmatch, before)) if _but_commit(each) == _but_commit(asked)
    ]
    return next(
        (each.address for each in same if asked.revision is None or not _COMMIT.fullmatch(asked.revision)), place
    )


def _but_commit(each: DataSet) -> tuple[str, str | None, str]:
    return each.repo, each.config, each.split


def files_at(address: str, cache_dir: Path, note: Callable[[str], None] = lambda _: None) -> tuple[str, list[Path]]:
    """Return the address with its commit, and the files of its split, downloaded into the hub's own cache. What is left out of them
    goes to `note`.

    Raise DataError if the hub has no such split, or cannot be reached.
    """
    asked = data_set(address)
    if asked.revision and _COMMIT.fullmatch(asked.revision) and (known := _known(asked, cache_dir)):
        return asked.address, known
    # Imported only here: it takes a third of a second.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(asked.repo, revision=asked.revision)
        every = files_of_split(asked, [each.rfilename for each in info.siblings or ()], configs_of(info.card_data))
        names = of_one_type(every)
        if others := sorted({*every} - {*names}):
            note(
                f"{address}: not read, because files of several types are copies of one text as a rule: {listed(others)}"
            )
        pinned = DataSet(asked.repo, info.sha, asked.config, asked.split)
        patterns = list(map(glob.escape, names))
        folder = Path(snapshot_download(asked.repo, repo_type="dataset", revision=info.sha, allow_patterns=patterns))
    except GatedRepoError as error:  # a RepositoryNotFoundError too
        remedy = f"accept them at huggingface.co/datasets/{asked.repo} and set HF_TOKEN to a token of the account"
        problem = "the hub gives this data set only to accounts that have accepted its terms"
        raise DataError(f"{address}: {problem}: {remedy}") from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{address}: the hub has the data set, but no such revision of it: check what follows the @"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{address}: the hub has no such data set, or it needs HF_TOKEN: check the name, {FOLDER}"
        ) from error
    except DataError:
        raise
    except Exception as error:  # without a network, each version of the client has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{address} could not be fetched from the hub ({reason:.120}): try again, {FOLDER}") from error
    paths = [folder / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(f"{address}: {listed(missing)} did not arrive from the hub: try again, {FOLDER}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a question to the hub
        _record(pinned, cache_dir).parent.mkdir(parents=True, exist_ok=True)
        with new_file(_record(pinned, cache_dir), replace=True) as file:
            file.write(json.dumps({"address": pinned.address, "files": list(map(str, paths))}, indent=1).encode())
    return pinned.address, paths


def _record(pinned: DataSet, cache_dir: Path) -> Path:
    return cache_dir / "hub" / f"{hashlib.sha256(pinned.address.encode()).hexdigest()[:32]}.json"


def _known(pinned: DataSet, cache_dir: Path) -> list[Path]:
    """Return the files of an address with a commit that were all downloaded before; empty if one is missing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        paths = [Path(path) for path in json.loads(_record(pinned, cache_dir).read_bytes())["files"]]
        return paths if all(path.is_file() for path in paths) else []
    return []


def configs_of(card: Any) -> list[dict[str, Any]]:
    """Return the `configs` of a data set's README, if it has any."""
    found = getattr(card, "configs", None) if card is not None else None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def files_of_split(asked: DataSet, names: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the data files of the split in order: by the README's `configs`, else by what their names say.

    Raise DataError naming the configs or splits that there are.
    """
    files = sorted(name for name in names if suffix_of(name) in TYPES and PurePosixPath(name).name not in METADATA)
    from fsspec.utils import glob_translate  # of the hub's own client

    config = _config(asked, configs)
    folder = PurePosixPath(config.get("data_dir") or ("" if config else asked.config or ""))
    if not config.get("data_files"):
        patterns = _by_names([name for name in files if PurePosixPath(name).is_relative_to(folder)], folder)
        asked_for = next((each for each in (asked.split, *SPLITS.get(asked.split, ())) if each in patterns), "")
        chosen = patterns.get(asked_for, [])
    else:
        patterns = _patterns(config["data_files"])
        wanted = [glob_translate(str(folder / each)) for each in patterns.get(asked.split, [])]
        chosen = [name for name in files if any(re.match(each, name) for each in wanted)]
    if not chosen:
        there = listed(sorted(patterns)) if patterns else "no data file"
        raise DataError(
            f"{asked.address}: the data set has no such split with {', '.join(TYPES)} files; it has {there}"
        )
    return chosen


def of_one_type(names: Sequence[str]) -> list[str]:
    """Return the files of the type that most have: data sets hold one text in several types (datasets.load,
    infer_module_for_data_files_list).
    """
    counts = Counter(map(suffix_of, names))
    first = max(counts, key=lambda suffix: (counts[suffix], -TYPES.index(suffix)))
    kind = SAME_TYPE.get(first, first)
    return [name for name in names if SAME_TYPE.get(suffix_of(name), suffix_of(name)) == kind]


def _by_names(files: Sequence[str], folder: PurePosixPath) -> dict[str, list[str]]:
    """Return split -> files, by what their names say: whole where the hub's own client wrote them, else by words in them."""
    shards: dict[str, list[str]] = {}
    for name in files:
        if found := _SHARD.fullmatch(str(PurePosixPath(name).relative_to(folder))):
            shards.setdefault(found["split"], []).append(name)
    sharded = set(itertools.chain(*shards.values()))
    others = [name for name in files if name not in sharded]
    by_words = {split: [name for name in others if _names_split(name, split)] for split in SPLITS}
    lacking = {split: found for split, found in by_words.items() if found and not shards.keys() & {*SPLITS[split]}}
    return shards | lacking or ({"train": list(files)} if files else {})


def _names_split(name: str, split: str) -> bool:
    words = re.split(r"[/._ -]|(?<=\D)(?=\d)", name.lower())
    return any(word in SPLITS[split] for word in words)


def _config(asked: DataSet, configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the README's config that is asked for; empty if none of them names files or a folder of its own."""
    with_files = {
        str(each.get("config_name", "default")): each
        for each in configs
        if each.get("data_files") or each.get("data_dir")
    }
    if not with_files:
        return {}
    default = [
        name for name, each in with_files.items() if each.get("default") or name == "default" or len(with_files) == 1
    ]
    name = asked.config or next(iter(default), "")
    if name not in with_files:
        raise DataError(
            f"{asked.address}: expected one of its configs, as in {SCHEME}{asked.repo}:{next(iter(with_files))}: {listed(list(with_files))}"
        )
    return with_files[name]


def _patterns(files: Any) -> dict[str, list[str]]:
    """Return split -> patterns of files."""
    found: dict[str, list[str]] = {}
    for each in files if isinstance(files, list) else [files]:
        entry = each if isinstance(each, dict) else {"split": "train", "path": each}
        path = entry.get("path", [])
        found.setdefault(str(entry.get("split", "train")), []).extend(path if isinstance(path, list) else [path])
    return found
