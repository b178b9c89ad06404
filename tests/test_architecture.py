"""docs/architecture.md shows the rooms, their imports and their files as they are."""

import re

import pytest
from drive import ROOT
from test_layers import SOURCES, imports, room_of

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
Edges = set[tuple[str, str]]


def edges() -> Edges:
    """Return (room, room that it imports) for every import between rooms."""
    found = set()
    for path in SOURCES:
        parts = [part.removesuffix(".py") for part in path.relative_to(ROOT).parts]
        room = room_of(".".join(part for part in parts if part != "__init__"))
        found |= {(room, room_of(module)) for module in imports(path)}
    return {(room, below) for room, below in found if below not in (None, room, "milepost") and room != "milepost"}


def reachable(graph: Edges, start: str) -> set[str]:
    """Return the rooms below `start`, by any path."""
    found: set[str] = set()
    todo = {below for room, below in graph if room == start}
    while todo:
        found |= todo
        todo = {below for room, below in graph if room in todo} - found
    return found


def reduced(graph: Edges) -> Edges:
    """Return the transitive reduction: without the imports that a longer way already implies."""
    return {
        (room, below)
        for room, below in graph
        if not any(below in reachable(graph, other) for start, other in graph if start == room and other != below)
    }


def drawn(page: str) -> Edges:
    """Return the arrows of the page's Mermaid picture."""
    (picture,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    return set(re.findall(r"^ +(\w+) --> (\w+)$", picture, re.MULTILINE))


def test_the_picture_shows_the_imports_between_rooms():
    actual = reduced(edges())
    assert drawn(PAGE) == actual, "expected:\n" + "\n".join(f"    {room} --> {below}" for room, below in sorted(actual))


ROOMS = ["training.py", "scripts/", "models/", *(
    path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
    for path in (ROOT / "milepost").iterdir()
    if (path.suffix == ".py" and not path.name.startswith("_")) or any(path.glob("*.py"))
)]  # fmt: skip


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_is_explained(room):
    assert f"`{room}`" in PAGE


def test_every_file_that_the_page_names_exists():
    names = re.findall(r"`((?:milepost|models|tests|scripts|benchmarks|docs)/[\w./-]*\.\w+|training\.py)`", PAGE)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_an_arrow_too_many_or_too_few_would_be_noticed():
    graph = {("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")}
    assert reduced(graph) == {("a", "b"), ("b", "c"), ("d", "c")}
    page = "```mermaid\nflowchart TD\n    a --> b\n    b --> c\n```\n"
    assert drawn(page) == {("a", "b"), ("b", "c")}
    assert drawn(page) != reduced(graph)
