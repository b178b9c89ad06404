"""The layers of docs/architecture.md: imports point down only, and a few rules that hold everywhere."""

import ast
from pathlib import Path

import pytest
from drive import ROOT

PROJECT = {"config", "ckpt", "data", "models", "runtime", "door", "run", "resume", "training"}
ALLOWED = {
    "scripts": PROJECT,
    "training": PROJECT - {"training"},
    "resume": PROJECT - {"training", "door", "resume"},
    "run": PROJECT - {"training", "door", "resume", "run"},
    "door": PROJECT - {"training", "door", "resume", "run"},
    "ckpt": {"ckpt"},
    "models": {"models"},
    "data": {"data"},
    "runtime": {"runtime"},
    "config": set(),
}
# The one module that knows both sides.
EXCEPTIONS = {"ckpt/rebuild.py": {"ckpt", "models", "data", "runtime"}}
SOURCES = [
    path
    for pattern in ("*.py", "ckpt/**/*.py", "data/*.py", "models/*.py", "runtime/*.py", "scripts/*.py")
    for path in ROOT.glob(pattern)
]
PYTHON = [*SOURCES, *(ROOT / "tests").glob("*.py")]
LONGEST_FUNCTION = 60


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The first word of every import anywhere in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    allowed = EXCEPTIONS.get(name_of(path), ALLOWED[layer])
    assert imports(path) & PROJECT <= allowed


def test_config_needs_only_dotenv():
    """So that a mistake is reported before torch is imported."""
    assert not imports(ROOT / "config.py") & {"torch", "numpy", "tokenizers", "tiktoken", "safetensors"}


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_nothing_is_unpickled_with_code(path):
    for name, call in calls(path):
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler")
        if name == "torch.load":
            assert {"weights_only": "True"}.items() <= {
                word.arg: ast.unparse(word.value) for word in call.keywords
            }.items()


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "config.py"], ids=name_of)
def test_only_config_reads_the_environment(path):
    text = path.read_text(encoding="utf-8")
    assert "os.environ" not in text
    assert "getenv" not in text


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
