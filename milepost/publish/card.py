"""The model card of a published checkpoint, from its record alone. https://huggingface.co/docs/hub/model-cards"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from milepost.ckpt import Checkpoint
from milepost.ckpt.hub import is_pinned
from milepost.screen import harmless
from milepost.text.templates import PLAIN_END
from models import with_trait

CURVE = "loss.svg"


def card(record: Checkpoint, name: str, *, parameters: int, sha256: str, curve: bool) -> str:
    """Return the README.md of a public record that is published as `name`; `sha256` is that of its weights, and `curve`
    whether CURVE is beside it.
    """
    sections = [
        _front_matter(record),
        f"# {name.rpartition('/')[2]}\n\n{_summary(record, parameters)}",
        f"## Use\n\n{_use(record, name)}",
        "## Training\n\n" + "\n\n".join(_training(record, curve=curve)),
        "## Evaluation\n\n" + _evaluation(record),
        "## Origin\n\n" + "\n".join(f"- {line}" for line in _origin(record, sha256)),
    ]
    return "\n\n".join(sections) + "\n"


def base_on_hub(record: Checkpoint) -> str | None:
    """Return the hub's name of the model that a public record began with; None if it began with none, or with a file."""
    named = record.hyperparameters.get("PRETRAINED") or record.hyperparameters.get("GPT2_MODEL_NAME")
    name: str | None = named or (record.base or {}).get("source")
    return name.partition("@")[0] if is_pinned(name) else name


def _front_matter(record: Checkpoint) -> str:
    """Return the YAML that the hub reads. JSON is YAML."""
    lora = bool(record.model_settings.get("lora"))
    values: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["milepost", record.model_type]}
    if lora or record.model_type in with_trait("transformers"):
        values["library_name"] = "peft" if lora else "transformers"
    if base := base_on_hub(record):
        values["base_model"] = base
    lines = [f"{name}: {json.dumps(value)}" for name, value in sorted(values.items())]
    return "\n".join(["---", *lines, "---"])


def _summary(record: Checkpoint, parameters: int) -> str:
    what = f"LoRA adapters of a {record.model_type}" if record.adapters_only else f"A {record.model_type}"
    data = record.data.get("name") or record.data.get("source")
    on = f" on {code(data)}" if data else ""
    began = base_on_hub(record)
    begun = f", beginning with {code(began)}" if began else ""
    return f"{what} with {parameters:,} parameters, trained for {record.step:,} steps{on}{begun}."


def _use(record: Checkpoint, name: str) -> str:
    lora = record.model_settings.get("lora")
    if lora:
        base = base_on_hub(record) or "the folder of its base, in the form of transformers"
        return _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            f"model = PeftModel.from_pretrained(base, {json.dumps(name)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(base)})",
        )
    opened = f"`CHECKPOINT_PATH=FOLDER PROMPT='...' python3 scripts/load_checkpoint.py` of milepost generates from a copy of it: `hf download {name} --local-dir FOLDER`."
    if record.model_type not in with_trait("transformers"):
        return f"Transformers has no such model. {opened}"
    python = _python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})",
        'ids = tokenizer("...", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))",
    )
    return "\n\n".join([python, *_talk(record), opened])


def _talk(record: Checkpoint) -> Iterator[str]:
    if "template" in record.data:
        template = record.data["template"]
        yield (
            "It answers: its tokenizer has the chat template that it was trained with."
            if template
            else f"It answers prompts of the form `User:\\nQUESTION<end>\\nAssistant:\\n`, where `<end>` is the token that ends a text, or the characters `{PLAIN_END}`."
        )


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _training(record: Checkpoint, *, curve: bool) -> Iterator[str]:
    if curve:
        yield f"![training and validation loss by step]({CURVE})"
    values = {
        "steps": record.step,
        "tokens": record.tokens_seen or None,
        "epochs": record.epoch and round(record.epoch, 2),
    }
    yield _table(("", ""), {name: f"{value:,}" for name, value in values.items() if value is not None})
    if record.data:
        yield "Data: " + ", ".join(f"{key} {code(value)}" for key, value in record.data.items() if _is_short(value))
    if record.hyperparameters:
        known = {name: value for name, value in record.hyperparameters.items() if value not in (None, "")}
        table = _table(("variable", "value"), {f"`{name}`": code(value) for name, value in known.items()})
        yield f"<details><summary>Settings</summary>\n\n{table}\n\n</details>"
    if record.runtime:
        yield "Trained with " + ", ".join(f"{key} {code(value)}" for key, value in record.runtime.items())


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) <= 100


def _evaluation(record: Checkpoint) -> str:
    if record.validation_loss is None:
        return "It was not evaluated at this step."
    share = record.data.get("validation_fraction")
    held_out = f" on the last {share:.0%} of the data, which it was not trained on" if isinstance(share, float) else ""
    best = (
        f"; the lowest of its run is {record.best_loss:.4f}, at step {record.best_step}"
        if record.best_loss is not None
        else ""
    )
    return f"Validation loss {record.validation_loss:.4f} nats per token{held_out}{best}."


def _origin(record: Checkpoint, sha256: str) -> Iterator[str]:
    again = "; `REPLAY=true python3 scripts/verify_checkpoint.py` trains them again and compares"
    # Merged weights have no step of their own, and another program's no run that could be replayed.
    trained = record.run_id is not None and (not record.parent or record.parent.get("step") != record.step)
    yield f"sha256 of all its weights: {code(sha256)}{again if trained else ''}"
    if record.run_id:
        yield f"run {code(record.run_id)}"
    if record.parent:
        yield f"resumed from run {code(record.parent.get('run_id'))} at step {record.parent.get('step')}"
    if record.base:
        yield f"base: {code(record.base.get('source') or 'a file')}, sha256 {code(record.base.get('sha256'))}"
    yield f"written by {code(record.written_by)}"


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items())])


def code(value: Any) -> str:
    """Return a value from a file as code, which Markdown does not read as anything else."""
    text = harmless(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), one_line=True).strip()
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
