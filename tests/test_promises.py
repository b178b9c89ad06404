"""docs/promises.md names tests, commands and figures that are there."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from drive import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_file_and_target_that_it_names_is_there() -> None:
    files = set(re.findall(r"`?(?:python |pytest )*((?:tests|benchmarks)/\w+\.py)", PAGE))
    assert len(files) > 20
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []
    targets = set(re.findall(r"make ([a-z][a-z-]*)", PAGE))
    assert {"test", "soak", "soak-exact"} <= targets
    assert [name for name in sorted(targets) if not re.search(rf"^{name}:", MAKEFILE, re.MULTILINE)] == []


def test_every_file_of_a_soak_command_has_cases_for_it() -> None:
    files = re.findall(r"pytest (tests/\w+\.py) -m soak", PAGE)
    assert len(files) == 5
    assert all("pytest.mark.soak" in (ROOT / name).read_text(encoding="utf-8") for name in files)


FIGURES = {
    "test_kill": lambda module: (module.KILLS, module.SOAK_KILLS),
    "test_fuzz": lambda module: (module.CASES, module.SOAK_CASES),
    "test_plain_objects": lambda module: (module.MUTATIONS, module.SOAK_MUTATIONS),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_numbers_of_cases_are_those_of_the_tests(name: str) -> None:
    module: Any = importlib.import_module(name)
    (row,) = (line for line in PAGE.splitlines() if f"pytest tests/{name}.py -m soak" in line)
    written = [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*", row.split("|", 2)[2])]
    assert tuple(written[:2]) == FIGURES[name](module)


def test_make_soak_exact_draws_as_many_settings_as_it_says() -> None:
    (drawn,) = re.findall(r"^SETTINGS \?= (\d+)$", MAKEFILE, re.MULTILINE)
    assert f"| | {drawn} | `make soak-exact SETTINGS={drawn}` |" in PAGE


def test_the_cost_of_a_save_is_that_of_the_benchmarks_page() -> None:
    page = (Path(ROOT) / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"full_folder\.py`\n(.*?)\n## ", page, re.DOTALL)
    rows = re.findall(r"^\| [\d,]+ \| (\d+) ms \| ([\d.]+) s \|$", table, re.MULTILINE)
    saves, firsts = zip(*rows, strict=True)
    (row,) = (line for line in PAGE.splitlines() if "full_folder.py" in line)
    assert f"{', '.join(saves)} ms" in row
    assert f"{', '.join(firsts)} s" in row
