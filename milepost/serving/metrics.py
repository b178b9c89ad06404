"""Counts and times of a server, as the text that Prometheus reads."""

from collections import Counter
from collections.abc import Mapping

PREFIX = "milepost_"
HELP = {
    "requests_total": ("counter", "Requests answered, by path and status"),
    "prompt_tokens_total": ("counter", "Tokens of prompts"),
    "kept_tokens_total": ("counter", "Tokens of prompts that were not read anew"),
    "generated_tokens_total": ("counter", "Tokens generated"),
    "first_token_seconds": ("summary", "Seconds from a request's arrival to its first token"),
    "request_seconds": ("summary", "Seconds from a request's arrival to its last token"),
    "requests_running": ("gauge", "Requests that generate"),
    "requests_waiting": ("gauge", "Requests that wait for a slot"),
    "model_step": ("gauge", "Optimizer step of the weights that are served"),
}
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Metrics:
    """Counts by name and labels. For the event loop only."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add to a count."""
        self.values[series(name, labels)] += value  # type: ignore[assignment]

    def observe(self, name: str, seconds: float, /, **labels: str) -> None:
        """Add a time to a summary."""
        self.add(f"{name}_sum", seconds, **labels)
        self.add(f"{name}_count", 1, **labels)

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all counts, and the gauges by their series."""
        values = {**self.values, **gauges}
        lines = []
        for name, (kind, about) in HELP.items():
            lines += [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} {kind}"]
            own = {f"{name}_sum", f"{name}_count"} if kind == "summary" else {name}
            lines += [f"{PREFIX}{each} {value:.12g}" for each, value in values.items() if each.partition("{")[0] in own]
        return "\n".join(lines) + "\n"


def series(name: str, labels: Mapping[str, str]) -> str:
    """Return the name of a series with its labels."""
    inner = ",".join(f'{label}="{value.translate(ESCAPES)}"' for label, value in labels.items())
    return f"{name}{{{inner}}}" if inner else name
