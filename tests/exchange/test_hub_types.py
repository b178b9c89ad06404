"""The files of a data set of the hub are those that the datasets library reads."""

from pathlib import Path

import pytest
from datasets import data_files, load, packaged_modules
from test_hub_datasets import PATTERNS, SEVERAL_TYPES, SHARDS, TREE


@pytest.mark.parametrize(("names", "read"), SEVERAL_TYPES)
def test_of_several_types_it_reads_the_same(names: list[str], read: list[str]) -> None:
    files = [name for name in names if name not in data_files.FILES_TO_IGNORE]
    module, _ = load.infer_module_for_data_files_list(files)
    extensions = packaged_modules._MODULE_TO_EXTENSIONS[module]
    assert [name for name in files if Path(name).suffix in extensions] == read


@pytest.mark.parametrize(("pattern", "found"), PATTERNS.items())
def test_a_pattern_matches_the_same(pattern: str, found: list[str], tmp_path: Path) -> None:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    theirs = sorted(
        Path(each).relative_to(tmp_path).as_posix() for each in data_files.resolve_pattern(pattern, str(tmp_path))
    )
    assert theirs == found


def test_the_splits_of_shards_have_the_same_names(tmp_path: Path) -> None:
    for name in SHARDS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(data_files.get_data_patterns(str(tmp_path))) == ["dev", "train_gen", "train_sft"]
