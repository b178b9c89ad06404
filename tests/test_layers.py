"""The layers of docs/architecture.md: imports point down only, and a few rules that hold everywhere."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from drive import ROOT

# A room may import itself and what stands here; training.py and scripts/ may import everything below them.
ROOMS: dict[str, set[str]] = {
    "files": {"paths"},
    "paths": set(),
    "locks": {"files", "paths", "screen"},
    "screen": set(),
    "lazy": set(),  # torch and numpy at their first use
    "splitmix": {"lazy"},
    "places": set(),
    "start": {"runtime"},  # the very first import; interrupt.py imports no other package
    "registry": set(),  # imports what a registry names, when it is first used
    "config": {
        "models",
        "text",
        "runtime",
        "registry",
        "places",
        "screen",
    },  # only registries and interrupt.py, which import no torch
    "models": set(),
    "text": {"files", "splitmix", "registry", "lazy"},
    "runtime": {"files", "splitmix", "registry", "screen", "lazy"},
    "generation": {"models", "text", "runtime", "splitmix"},
    "evaluate": {"models", "text", "runtime", "screen"},
    "ckpt": {"models", "text", "runtime", "files", "locks", "paths", "registry", "screen", "lazy"},
    "mirror": {"ckpt", "text", "files", "locks", "paths"},
}
BELOW_RUN = {*ROOMS}
BELOW_TRAINING = BELOW_RUN | {
    "run",
    "run_mirror",
    "run_files",
    "run_checkpoints",
    "resume",
    "reporting",
    "cli",
    "remote",
}
ALLOWED = ROOMS | {
    "run": BELOW_RUN,
    "run_mirror": BELOW_RUN | {"run"},
    "resume": BELOW_RUN | {"run", "run_mirror"},
    "cli": BELOW_RUN,
    "remote": BELOW_RUN,
    "reporting": BELOW_RUN | {"run", "resume"},
    "plots": BELOW_RUN,
    "page": BELOW_RUN | {"run", "resume", "reporting", "plots", "web"},
    "publish": BELOW_RUN | {"plots"},
    "run_publishing": BELOW_RUN | {"run", "publish"},
    "web": {"config", "files"},
    "run_files": BELOW_RUN | {"run", "run_mirror"},
    "run_checkpoints": BELOW_RUN | {"run", "run_mirror", "run_files"},
    "samples": BELOW_RUN | {"run", "resume"},
    "serving": BELOW_RUN | {"samples", "web"},
    "training": BELOW_TRAINING | {"run_publishing"},
    "scripts": BELOW_TRAINING | {"run_publishing", "samples", "training", "plots", "page", "publish", "serving", "web"},
    "api": BELOW_TRAINING | {"samples", "training"},
    "milepost": {"start", "api"},  # the latter when a name of it is first used
}
SOURCES = [
    path
    for pattern in ("training.py", "scripts/*.py", "models/*.py", "milepost/**/*.py")
    for path in ROOT.glob(pattern)
]
PYTHON = [*SOURCES, *(ROOT / "tests").glob("*.py")]
LONGEST_FUNCTION = 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str | None:
    """The room of a dotted module name: `ckpt` of `milepost.ckpt.record`; None if it is not this project's."""
    words = module.split(".")
    if words[0] == "milepost":
        return words[1] if len(words) > 1 else "milepost"
    return words[0] if words[0] in ALLOWED else None


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, by its dotted name."""
    return imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_at_once(path: Path) -> set[str]:
    """The modules that are imported with the file: not those in its functions, nor those for type checkers."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return imported(
        inner
        for node in nodes
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    )


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules of the import statements among the nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "milepost" else {node.module}
    return found


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    parts = [part.removesuffix(".py") for part in path.relative_to(ROOT).parts]
    room = room_of(".".join(part for part in parts if part != "__init__"))
    assert {room_of(module) for module in imports(path)} - {None} <= ALLOWED[room] | {room}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=name_of)
def test_no_script_imports_a_script(path):
    assert not {module.split(".")[0] for module in imports(path)} & {other.stem for other in path.parent.glob("*.py")}


# What config imports of other rooms: the choices of settings and the handling of signals. Like config, they are imported before torch.
LIGHT = (
    "models",
    "models.adapters",
    "milepost.runtime.optimizers",
    "milepost.runtime.trackers",
    "milepost.runtime.schedule",
    "milepost.runtime.interrupt",
    "milepost.text.registry",
    "milepost.text.addresses",
    "milepost.text.sources",
    "milepost.registry",
    "milepost.places",
    "milepost.screen",
)
LIGHT_FILES = [
    ROOT / name.replace(".", "/") / "__init__.py" if name == "models" else ROOT / f"{name.replace('.', '/')}.py"
    for name in LIGHT
]


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "milepost" / "config").glob("*.py")), *LIGHT_FILES], ids=name_of
)  # fmt: skip
def test_config_and_what_it_imports_need_only_dotenv(path):
    """So that a mistake is reported before torch is imported. (A registry imports torch for type checkers, and a model at its first use.)"""
    named = {module for module in imports_at_once(path) if module not in LIGHT}
    assert {room_of(module) for module in named} <= {None, "config", "milepost"}
    assert {module.split(".")[0] for module in named} <= {*sys.stdlib_module_names, "dotenv", "milepost"}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_is_unpickled_with_code(path):
    for name, call in calls(path):
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler")
        if name == "torch.load":
            assert {"weights_only": "True"}.items() <= {
                word.arg: ast.unparse(word.value) for word in call.keywords
            }.items()


@pytest.mark.parametrize("path", [path for path in SOURCES if "config" not in path.parts], ids=name_of)
def test_only_config_reads_the_environment(path):
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text


PRINTS = {
    "milepost/screen.py": {"print", "sys.stdout.write"},
    "milepost/config/docs.py": {"print"},
    "milepost/start.py": {"sys.stderr.write"},  # before anything can be imported
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_screen_prints(path):
    """So that no line reaches a terminal unescaped. Generated text is written as it is, except to a terminal."""
    printing = {name for name, _ in calls(path) if re.fullmatch(r"print|sys\.std(out|err)\.write(lines)?", name)}
    assert printing <= PRINTS.get(name_of(path), set())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_short(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    long = {node.name: node.end_lineno - node.lineno + 1 for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_functions_are_documented(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []
