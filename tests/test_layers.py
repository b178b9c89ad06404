"""The layers of docs/architecture.md: imports point down only, and a few rules that hold everywhere."""

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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
    "resume_choice",
    "reporting",
    "cli",
    "remote",
}
ALLOWED = ROOMS | {
    "run": BELOW_RUN | {"remote"},
    "run_mirror": BELOW_RUN | {"run"},
    "resume": BELOW_RUN | {"run", "run_mirror", "remote"},
    "resume_choice": BELOW_RUN | {"run", "run_mirror", "remote", "resume"},
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


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, by its dotted name."""
    return imported(ast.walk(tree_of(path)))


def imports_at_once(path: Path) -> set[str]:
    """The modules that are imported with the file: not those in its functions, nor those for type checkers."""
    return imported(
        inner
        for node in tree_of(path).body
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


@functools.cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call of a function that has a dotted name, with that name."""
    return [(dotted(node.func), node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]


def dotted(node: ast.expr) -> str:
    """The name as it is written; a part that is no name is a question mark."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def broken_by(paths: Iterable[Path], finds: Callable[[Path], Any]) -> dict[str, Any]:
    """Return what `finds` finds in each file, by the file's name: a test for each of 400 files would cost seconds."""
    found = {name_of(path): finds(path) for path in paths}
    assert found
    return {name: each for name, each in found.items() if each}


def test_imports_point_down():
    def beyond(path: Path) -> set[str]:
        parts = [part.removesuffix(".py") for part in path.relative_to(ROOT).parts]
        room = room_of(".".join(part for part in parts if part != "__init__"))
        return {room_of(module) for module in imports(path)} - {None} - ALLOWED[room] - {room}

    assert broken_by(SOURCES, beyond) == {}


def test_no_script_imports_a_script():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    names = {path.stem for path in scripts}
    assert broken_by(scripts, lambda path: {module.split(".")[0] for module in imports(path)} & names) == {}


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


def test_config_and_what_it_imports_need_only_dotenv():
    """So that a mistake is reported before torch is imported. (A registry imports torch for type checkers, and a model at its first use.)"""

    def beyond(path: Path) -> set[str | None]:
        named = {module for module in imports_at_once(path) if module not in LIGHT}
        packages = {module.split(".")[0] for module in named} - {*sys.stdlib_module_names, "dotenv", "milepost"}
        return packages | ({room_of(module) for module in named} - {None, "config", "milepost"})

    assert broken_by([*sorted((ROOT / "milepost" / "config").glob("*.py")), *LIGHT_FILES], beyond) == {}


def test_nothing_is_unpickled_with_code():
    def unsafe(path: Path) -> list[str]:
        return [
            ast.unparse(call)
            for name, call in calls(path)
            if name in ("pickle.load", "pickle.loads", "pickle.Unpickler")
            or (
                name == "torch.load"
                and ("weights_only", "True") not in [(word.arg, ast.unparse(word.value)) for word in call.keywords]
            )
        ]

    assert broken_by(PYTHON, unsafe) == {}


def test_only_config_reads_the_environment():
    def reads(path: Path) -> set[str]:
        text = path.read_text(encoding="utf-8")
        return {name for name in ("os.environ", "getenv") if name in text}

    assert broken_by([path for path in SOURCES if "config" not in path.parts], reads) == {}


PRINTS = {
    "milepost/screen.py": {"print", "sys.stdout.write"},
    "milepost/config/docs.py": {"print"},
    "milepost/start.py": {"sys.stderr.write"},  # before anything can be imported
}


def test_only_the_screen_prints():
    """So that no line reaches a terminal unescaped. Generated text is written as it is, except to a terminal."""

    def prints(path: Path) -> set[str]:
        printing = {name for name, _ in calls(path) if re.fullmatch(r"print|sys\.std(out|err)\.write(lines)?", name)}
        return printing - PRINTS.get(name_of(path), set())

    assert broken_by(SOURCES, prints) == {}


def test_functions_stay_short():
    def long(path: Path) -> dict[str, int]:
        functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
        lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
        return {name: count for name, count in lines.items() if count > LONGEST_FUNCTION}

    assert broken_by(SOURCES, long) == {}


def test_public_functions_are_documented():
    def bare(path: Path) -> list[str]:
        defined = [node for node in tree_of(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        return [node.name for node in defined if not node.name.startswith("_") and not ast.get_docstring(node)]

    assert broken_by(SOURCES, bare) == {}
