"""Which settings a script reads: the fields of Config that appear in its main,
and in the functions that this reaches.
"""

import ast
import itertools
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

from drive import ROOT

import models
from milepost import config

FIELDS = {name.lower(): name for name in config.VARIABLES if name != "ENV_FILE"}
ABOVE_CKPT = (
    "training",
    "milepost.run",
    "milepost.run.build",
    "milepost.run.state",
    "milepost.run.text",
    "milepost.run.text_checks",
    "milepost.run.weights",
    "milepost.run_mirror",
    "milepost.remote",
    "milepost.run_publishing",
    "milepost.run_files",
    "milepost.run_checkpoints",
    "milepost.resume",
    "milepost.samples",
    "milepost.cli",
    "milepost.reporting",
)  # see Config
CHECKS = {"_finish", "_clashes", "_adapter_clashes"}  # check settings for any script, whatever it reads
SETTINGS = r"((run|self)\.)?settings|config|current"  # what the code calls a Config; not a model's settings
Function = tuple[Path, str]  # a file, and a function, class or constant at its top level


def file_of(module: str) -> Path | None:
    """Return the file of a module whose functions may read settings."""
    if module == "milepost.config":
        return ROOT / "milepost" / "config" / "resolve.py"
    script = ROOT / "scripts" / f"{module}.py"
    place = ROOT / module.replace(".", "/")
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    path = path if module in ABOVE_CKPT else script
    return path if path.is_file() else None


@cache
def parsed(path: Path) -> tuple[dict[str, ast.stmt], dict[str, Function], dict[str, Path]]:
    """Return the file's top-level definitions by name, the names that it imports,
    and the modules that it imports whole.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own[node.name] = node
        elif isinstance(node, ast.Assign):
            own |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    names: dict[str, Function] = {}
    modules: dict[str, Path] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name: place for alias in node.names if (place := file_of(alias.name))}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if place := file_of(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = place
                elif place := file_of(node.module):
                    names[alias.asname or alias.name] = place, alias.name
    return own, names, modules


def referred(function: Function) -> set[Function]:
    """Return the functions, classes and constants that a function refers to."""
    own, names, modules = parsed(function[0])
    found = set()
    for node in ast.walk(own[function[1]]):
        if isinstance(node, ast.Name):
            found |= {(function[0], node.id)} if node.id in own else set()
            found |= {names[node.id]} if node.id in names else set()
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            found.add((modules[ast.unparse(node.value)], node.attr))
    found = {parsed(path)[1].get(name, (path, name)) for path, name in found}  # a room exports names of its files
    return {(path, name) for path, name in found if name in parsed(path)[0]}


def strings(function: Function) -> set[str]:
    """Return the texts in a definition."""
    nodes = ast.walk(parsed(function[0])[0][function[1]])
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def fields_of(function: Function) -> set[str]:
    """Return the variables whose fields a function reads: as attributes of settings, by is_set, or by getattr."""
    found: set[str] = set()
    for node in ast.walk(parsed(function[0])[0][function[1]]):
        if isinstance(node, ast.Attribute) and re.fullmatch(SETTINGS, ast.unparse(node.value)):
            found |= {node.attr} & FIELDS.keys()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".is_set"):
            found |= {text.lower() for text in strings(function)} & FIELDS.keys() if node.args else set()
        elif isinstance(node, ast.Call) and re.match(r"getattr\((run\.)?settings, ", ast.unparse(node)):
            found |= computed(function, node.args[1])
    return {FIELDS[name] for name in found}


def computed(function: Function, name: ast.expr) -> set[str]:
    """Return the fields that a computed name can be, from the texts in the function and in the constants that it refers
    to.
    """
    if "fields_of" in ast.unparse(parsed(function[0])[0][function[1]]):  # the fields of the models' own settings
        return {
            field.name for kind in models.MODELS for field in fields(models.load(kind).settings_type)
        } & FIELDS.keys()
    texts = set().union(*map(strings, {function, *(place for place in referred(function) if place[1].isupper())}))
    if not isinstance(name, ast.JoinedStr):
        return texts & FIELDS.keys()
    literal = [part.value if isinstance(part, ast.Constant) else None for part in name.values]
    if any(part and len(part) > 1 for part in literal):  # as in f"{name}_interval"
        pattern = "".join(".*" if part is None else re.escape(part) for part in literal)
        return {field for field in FIELDS if re.fullmatch(pattern, field)}
    choices = itertools.product(*([part] if part else sorted(texts) for part in literal))
    return {"".join(parts) for parts in choices} & FIELDS.keys()


def reads(script: Path) -> set[str]:
    """Return the variables that a script reads, as far as its code tells."""
    todo, seen = [(script, "main"), (ROOT / "milepost" / "cli.py", "guarded")], set()
    while todo:
        function = todo.pop()
        if function not in seen and function[1] not in CHECKS:
            seen.add(function)
            todo += referred(function)
    return set().union(*map(fields_of, seen))
