"""Source code: a folder of it as git sees it, without binary and over-large files, and files and globs of a type."""

import subprocess
import sys
from pathlib import Path

import pytest
from drive import newest, train
from exactly import resumes_exactly

from milepost.run import text as run_text
from milepost.text import folders
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError
from milepost.text.readers import Reading

TREE = {
    "README.md": "# Wren\n",
    "src/wren.py": "def sing():\n    return 'tseep'\n",
    "src/wren.rs": "fn sing() {}\n",
    "src/latin.c": b"// caf\xe9\n",
    "src/nul.h": b"a\0b",
    "src/large.js": "x" * 5000,
    "src/data.json": "[1]",
    "src/logo.png": b"\x89PNG",
    "build/out.py": "built = 1\n",
    "build/keep.py": "kept = 0\n",
    "sub/.gitignore": "!made.py\n*.go\n",
    "sub/made.py": "made = 1\n",
    "sub/a.go": "package a\n",
    "sub/deep/made.py": "made = 2\n",
    ".venv/lib.py": "hidden = 1\n",
    ".gitignore": "build/\n!build/keep.py\nmade.py\n",
}
READ = ["README.md", "src/wren.py", "src/wren.rs", "sub/deep/made.py", "sub/made.py"]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache" / "tokens")
    monkeypatch.setattr(folders, "CODE_LIMIT", 4000)


def tree(folder: Path) -> Path:
    for name, content in TREE.items():
        path = folder / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "project"


def opened(source: str) -> Corpus:
    return open_corpus(source, data_dir=Path("nowhere"))


def names(corpus: Corpus, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in corpus.paths]


def test_a_folder_is_read_as_git_sees_it(tmp_path: Path) -> None:
    """The files are those that git itself lists, but for what is no text."""
    project = tree(tmp_path)
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    ).stdout.split()
    corpus = opened(f"code:{project}")
    assert names(corpus, project) == READ
    assert set(READ) == {name for name in listed if name.endswith((".py", ".rs", ".md", ".go"))} - {".venv/lib.py"}
    assert corpus.skipped == (
        f"{project}: 5 files of source code; left out: 3 in .gitignore, 1 above 4,000 bytes, 2 not text",
        f"{project}: 2 files skipped: .json, .png",
    )
    assert [text for text, _ in corpus.pieces()] == [TREE[name] for name in READ]


def test_the_rules_of_the_repository_hold_in_a_folder_of_it(tmp_path: Path) -> None:
    project = tree(tmp_path)
    (project / ".git").mkdir()
    assert names(opened(f"code:{project / 'sub' / 'deep'}"), project) == ["sub/deep/made.py"]
    (project / ".gitignore").write_text("made.py\n*.py\n")
    (project / "sub" / ".gitignore").unlink()
    with pytest.raises(DataError, match=r"1 in \.gitignore"):
        opened(f"code:{project / 'sub' / 'deep'}")
    (project / "build" / "a.rs").write_text("fn a() {}\n")
    (project / ".gitignore").write_text("build/\n")
    assert names(opened(f"code:{project / 'build'}"), project) == ["build/a.rs", "build/keep.py", "build/out.py"]


def test_files_and_globs_of_a_type(tmp_path: Path) -> None:
    project = tree(tmp_path)
    assert names(opened(str(project / "src" / "wren.rs")), project) == ["src/wren.rs"]
    assert names(opened(f"{project}/**/*.py"), project) == [
        "build/keep.py", "build/out.py", "src/wren.py", "sub/deep/made.py", "sub/made.py"
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no source code \(1 not text\)"):
        opened(f"{project}/src/*.h")
    corpus = opened(str(project / "*"))  # as before: a glob or folder of documents has none
    assert names(corpus, project) == ["README.md"]
    with pytest.raises(DataError, match="is not a folder"):
        opened(f"code:{project / 'README.md'}")
    reading = Reading(separator="(")
    pieces = open_corpus(str(project / "src" / "wren.py"), data_dir=tmp_path, reading=reading).pieces()
    assert [text for text, _ in pieces] == [TREE["src/wren.py"]]  # a separator is of .txt and .md


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tree(tmp_path)
    monkeypatch.setitem(sys.modules, "pathspec", None)
    with pytest.raises(DataError, match="pip install pathspec"):
        opened(f"code:{project}")
    for path in project.rglob(".gitignore"):
        path.unlink()
    assert len(opened(f"code:{project}").paths) == 8


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    project = tree(tmp_path)
    (project / "src" / "more.py").write_text("".join(f"def f{n}():\n    return {n}\n" for n in range(90)))
    record, _ = resumes_exactly(tmp_path, TRAINING_DATA_SOURCE=f"code:{project}")
    assert record.data["name"] == "project"


def test_a_folder_with_new_types_resumes_as_it_was_read(tmp_path: Path) -> None:
    """A checkpoint without `file_types` is of a version that passed over them in folders and globs."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("Dear Wren,\n" * 200)
    (folder / "b.csv").write_text("text\n" + "Dear Lark\n" * 50)
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(folder), TRAINING_STEPS="4", LR_SCHEDULE="constant")[0] == 0
    before = newest(tmp_path)
    assert "file_types" not in before.data
    (folder / "c.parquet").write_bytes(b"not read")
    (folder / "d.txt.zst").write_bytes(b"not read")
    code, said = train(
        tmp_path, TRAINING_DATA_SOURCE=str(folder), TRAINING_STEPS="6", RESUME="auto", LR_SCHEDULE="constant"
    )
    assert code == 0, said
    assert (newest(tmp_path).step, newest(tmp_path).data) == (6, before.data)
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(folder))[0] == 4  # a new run reads them all
