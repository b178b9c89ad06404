"""Files of conversations for tests."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ["wren", "rook", "owl", "lark", "finch", "sings", "flies", "sleeps", "at", "dawn", "in", "the", "hedge"]


def sentence(draw: random.Random, longest: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))


def talk(draw: random.Random) -> list[dict[str, str]]:
    """A conversation of one to three turns, some with a system message."""
    messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": sentence(draw, 4) + "?"})
        messages.append({"role": "assistant", "content": sentence(draw, 4) + "."})
    return messages


def rows(path: Path, values: Iterable[Mapping[str, Any]]) -> Path:
    """A .jsonl of these rows."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def talks_file(folder: Path, *, count: int = 40, seed: int = 0) -> Path:
    """A .jsonl of conversations."""
    draw = random.Random(seed)
    return rows(folder / "talks.jsonl", [{"messages": talk(draw)} for _ in range(count)])
