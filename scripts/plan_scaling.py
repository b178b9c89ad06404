"""Print what a training on several devices can be expected to do: speed, memory, communication, how often to save, and the command.

MODEL_TYPE=gpt2 GPT2_MODEL_NAME=gpt2 BLOCK_SIZE=1024 BATCH_SIZE=64 python3 scripts/plan_scaling.py
MACHINES=8 MODEL_TYPE=gpt2 GPT2_MODEL_NAME=gpt2-xl BLOCK_SIZE=1024 BATCH_SIZE=512 python3 scripts/plan_scaling.py
"""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from milepost import config

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is imported, Ctrl-C just ends
    SETTINGS = config.from_command_line(sys.argv)  # before that, so that a typing error costs no seconds

import math
import shlex
from collections.abc import Iterator

import models
from milepost.ckpt.restore import skeleton
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.run import architecture, shape_variables
from milepost.runtime import scaling
from milepost.runtime.progress import Log, amount, duration, table, tell
from milepost.runtime.scaling import Cluster, Saving, Step, Way
from models.model import Model

VOCABULARY = {"gpt2": 50257, "byte": 256, "char": 256, "auto": 256}  # of the last two the most that there can be
MOST_LAYERS = 1000  # for which shapes are laid out in a second
SPARE_RESTARTS = 3  # beyond twice the failures to expect: what fails once may fail again at once
MOST_FAILURES = 10**6
NEVER = 1e12  # seconds that nobody waits for
OTHERS = (
    "Generating",
    "Going on",
    "Evaluating",
    "Looking after",
    "Scaling",
)  # groups of variables that training.py does not read


def main(settings: Config, log: Log) -> int:
    """Prints the plan; returns the exit code."""
    cluster = cluster_of(settings)
    model = model_of(settings)
    step = step_of(settings, model, cluster)
    for note in notes(settings):
        log(note)
    tell("\n\n".join(sections(settings, model, step, cluster)))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the settings mean.


def cluster_of(settings: Config) -> Cluster:
    """The machines, in bytes and seconds."""
    return Cluster(
        machines=settings.machines,
        devices=settings.devices_per_machine,
        flops=settings.device_tflops * 1e12,
        memory=settings.device_memory_gb * 1e9,
        within=settings.device_gb_s * 1e9,
        between=settings.machine_gb_s * 1e9,
        copy=settings.copy_gb_s * 1e9,
        disk=settings.disk_gb_s * 1e9,
        machine_mtbf=settings.machine_mtbf_hours * 3600,
    )


def model_of(settings: Config) -> Model:
    """The model's shapes; no memory is taken for its weights. Raises ConfigError for a model that no plan is made for."""
    if refused := list(refusals(settings)):
        raise ConfigError(refused)
    settings = published(settings)
    vocab_size = settings.bpe_vocab_size if settings.tokenizer == "bpe" else VOCABULARY[settings.tokenizer]
    try:
        model = skeleton(settings.model_type, architecture(settings, vocab_size=vocab_size))
    except (ValueError, RuntimeError) as error:  # the second for more weights than can be counted
        raise ConfigError([f"these sizes make no model: {str(error).splitlines()[0]:.200}"]) from error
    if config.frozen_base(settings):
        models.freeze_base(model)
    return model


def refusals(settings: Config) -> Iterator[str]:
    """What no plan is made for."""
    name, layers, model_type = settings.gpt2_model_name, settings.n_layer or 0, settings.model_type
    sizes = models.load(model_type).published
    if "n_layer" not in models.MODELS[model_type].defaults:
        yield f"MODEL_TYPE={model_type}: it has no blocks (N_LAYER), and a second device gains nothing; set MODEL_TYPE=gpt2"
    if settings.ttt_layers:
        yield f"TTT_LAYERS={settings.ttt_layers}: how long a TTT layer takes is not in the formulas; unset it"
    if settings.init_from:
        yield f"INIT_FROM={settings.init_from}: no checkpoint is opened; unset it, and set its sizes (N_LAYER, N_HEAD, N_EMBD)"
    if layers > MOST_LAYERS:
        yield f"N_LAYER={layers}: a plan is made for up to {MOST_LAYERS} blocks"
    if name and name not in sizes:
        yield f"GPT2_MODEL_NAME={name}: expected one of {', '.join(sizes)}; for another set N_LAYER, N_HEAD, N_EMBD and TOKENIZER=gpt2"
    elif name and settings.block_size > sizes[name].block_size:
        yield f"BLOCK_SIZE={settings.block_size}: {name} has {sizes[name].block_size} positions; set that or less"


def published(settings: Config) -> Config:
    """The settings with the sizes of the model that GPT2_MODEL_NAME names; raises ConfigError if others were given."""
    name = settings.gpt2_model_name
    if not name:
        return settings
    shape = models.plain(models.load(settings.model_type).published[name])
    own = {each: shape[each.lower()] for each in shape_variables(shape)} | {"TOKENIZER": "gpt2"}
    if wrong := config.contradictions(settings, own):
        raise ConfigError([f"{given}={value}: {name} has {kept}; unset {given}" for given, value, kept in wrong])
    return config.from_saved(settings, own)


def step_of(settings: Config, model: Model, cluster: Cluster) -> Step:
    """A step as one device sees it. Raises ConfigError if the rows cannot be shared evenly."""
    rows, left = divmod(settings.batch_size, cluster.size)
    if left:
        given = f"BATCH_SIZE={settings.batch_size} ({settings.sources['BATCH_SIZE']})"
        fits = (rows + 1) * cluster.size
        raise ConfigError([f"{given}: {cluster.size} devices share the rows evenly; set BATCH_SIZE={fits}"])
    shape = model.settings
    block = models.parameter_count(model.blocks()[0])
    weights, trained = models.parameter_count(model), models.trained_count(model)
    tables = [model.get_parameter(name) for name in model.position_tables]
    positions = sum(table.numel() for table in tables)  # are looked up, not multiplied
    learned = trained - sum(table.numel() for table in tables if table.requires_grad)
    costs = {"layers": shape.n_layer, "width": shape.n_embd, "context": shape.block_size}
    device_type = "cuda" if settings.device == "auto" else settings.device
    wide = settings.dtype == "float32" or (settings.dtype == "auto" and device_type != "cuda")
    return Step(
        weights=weights,
        trained=trained,
        root=weights - shape.n_layer * block,
        block=block,
        flops_per_token=scaling.flops_per_token(weights=weights - positions, trained=learned, **costs),
        tokens=rows * shape.block_size,
        micro_batches=settings.gradient_accumulation_steps,
        activations=model.activation_bytes(rows, bytes_per_value=4 if wide else 2, device_type=device_type),
    )


def notes(settings: Config) -> Iterator[str]:
    """What the plan leaves out."""
    if settings.tokenizer in ("auto", "char") and not settings.gpt2_model_name:
        assumed = f"a vocabulary of {VOCABULARY['auto']} tokens is assumed (TOKENIZER=gpt2 has 50,257)"
        yield f"TOKENIZER={settings.tokenizer}: the text is not read, so {assumed}"
    if settings.optimizer == "muon":
        yield "OPTIMIZER=muon: counted as adamw; muon keeps less, and its own products, and with fsdp its gathering, come on top"


# ---------------------------------------------------------------------------------------------------------------------
# What is printed.


def sections(settings: Config, model: Model, step: Step, cluster: Cluster) -> Iterator[str]:
    """The text of each section."""
    both, wish = scaling.ways(step, cluster), wish_of(settings)
    way = scaling.chosen(both, cluster, wish)
    saved = scaling.savings(checkpoint_bytes(settings, step), cluster, way, restart=60 * settings.restart_minutes)
    kept = next(
        one for one in saved if (one.together, one.background) == (by_all(settings, way), settings.checkpoint_async)
    )
    yield "=== MODEL AND STEP ===\n" + table(list(basics(model, step, cluster)))
    yield "=== DDP OR FSDP ===\n" + table(list(compared(step, cluster, both, wish)))
    yield f"=== FROM 1 DEVICE TO {cluster.size} ===\n" + table(list(trend(settings, step, cluster)))
    yield "=== SAVING AND FAILING ===\n" + table(list(failing(settings, step, cluster, way, kept)))
    yield table(list(saving(saved, way)))
    yield "=== COMMAND ===\n" + command(settings, cluster, way, kept)


def basics(model: Model, step: Step, cluster: Cluster) -> Iterator[tuple[str, str]]:
    """What is computed, on what."""
    shape, tokens = model.settings, step.tokens * step.micro_batches
    trained = f", {step.trained:,} of them trained" if step.trained < step.weights else ""
    sizes = f"{shape.n_layer} layers, {shape.n_embd} wide, a vocabulary of {shape.vocab_size:,}"
    yield "parameters", f"{step.weights:,}{trained}: {sizes}"
    each = f"{cluster.flops / 1e12:g} TFLOP/s and {amount(cluster.memory, 'B')} each"
    yield "devices", f"{cluster.size}: {cluster.machines} x {cluster.devices}, {each}"
    micro = f"{step.micro_batches} x " if step.micro_batches > 1 else ""
    rows = f"{micro}{step.tokens // shape.block_size} rows of {shape.block_size}"
    yield "tokens a step", f"{tokens * cluster.size:,}; a device {tokens:,}: {rows}"
    flops = step.flops_per_token * tokens * cluster.size / 1e12
    in_all = f"{flops:,.0f}" if flops >= 100 else f"{flops:.3g}"
    yield "operations", f"{step.flops_per_token / 1e9:.3g} GFLOP a token, {in_all} TFLOP a step"
    yield "arithmetic takes", f"{time_of(scaling.compute_seconds(step, cluster))} a step"


def compared(step: Step, cluster: Cluster, both: tuple[Way, Way], wish: str) -> Iterator[tuple[str, ...]]:
    """The two ways side by side."""
    compute, way = scaling.compute_seconds(step, cluster), scaling.chosen(both, cluster, wish)
    sent = [scaling.pass_bytes(each.sent, cluster) for each in both]
    yield "", *(each.name + (f" (DISTRIBUTED={wish})" if each is way else "") for each in both)
    yield "memory of a device", *(f"{amount(each.memory, 'B')}, {'fits' if each.fits else 'too much'}" for each in both)
    yield "a device sends in its machine", *(amount(within, "B") for within, _ in sent)
    yield "a machine sends to others", *(amount(between, "B") for _, between in sent)
    yield "communication", *(time_of(scaling.pass_seconds(each.sent, cluster)) for each in both)
    yield "beside arithmetic of", time_of(compute * scaling.BACKWARD / step.micro_batches), time_of(compute)
    for word, index in (("what can be is hidden", 0), ("nothing is hidden", 1)):
        yield f"a step, if {word}", *(time_of(each.seconds[index]) for each in both)
        yield "  efficiency", *(percent(compute / each.seconds[index]) for each in both)
    enough = scaling.enough_tokens(cluster)
    yield "all can be hidden from", f"{enough:,.0f} tokens", f"of a device at a time; here {step.tokens:,}"


def trend(settings: Config, step: Step, cluster: Cluster) -> Iterator[tuple[str, ...]]:
    """A row for each number of devices: the same steps, so that the length of the run can be compared."""
    steps = f"{settings.training_steps:,} steps"
    yield "devices", "way", "micro-batches", "memory", "efficiency", "a step", "tokens/s", steps
    for part, on in scaling.fewer(step, cluster):
        way, compute = scaling.chosen(scaling.ways(part, on), on, wish_of(settings)), scaling.compute_seconds(part, on)
        best, worst = way.seconds
        tokens = part.tokens * part.micro_batches * on.size
        yield (
            str(on.size),
            (way.name if on.size > 1 else "alone") + ("" if way.fits else ", too large"),
            str(part.micro_batches),
            amount(way.memory, "B"),
            span(percent(compute / worst), percent(compute / best)),
            span(time_of(best), time_of(worst)),
            span(amount(tokens / worst), amount(tokens / best)),
            span(time_of(best * settings.training_steps), time_of(worst * settings.training_steps)),
        )


def failing(settings: Config, step: Step, cluster: Cluster, way: Way, kept: Saving) -> Iterator[tuple[str, str]]:
    """How often it will fail, and what the run takes with that."""
    length = settings.training_steps * way.seconds[1]
    yield "a checkpoint", amount(checkpoint_bytes(settings, step), "B")
    of_each = f", one of {cluster.machines} that fail every {time_of(cluster.machine_mtbf)}"
    yield "a machine fails", f"every {time_of(cluster.mtbf)}{of_each if cluster.machines > 1 else ''}"
    yield "failures to expect", f"{length / cluster.mtbf:.2g} in {time_of(length)}, nothing hidden"
    whole = time_of(length / (1 - kept.lost)) if kept.lost < 1 else "for ever: it fails before it gets on"
    yield "with saves and failures", whole


def saving(saved: list[Saving], way: Way) -> Iterator[tuple[str, ...]]:
    """A row for each way to save."""
    yield "layout", "CHECKPOINT_ASYNC", "training waits", "written in", "save every", "CHECKPOINT_INTERVAL", "time lost"
    for one in saved:
        yield (
            "sharded (fsdp)" if one.together else "unified",
            str(one.background).lower(),
            time_of(one.cost),
            time_of(one.write),
            time_of(one.interval),
            str(steps_between(one, way)),
            f"{100 * one.lost:.2g} %" if one.lost < 1 else "all",
        )


def command(settings: Config, cluster: Cluster, way: Way, kept: Saving) -> str:
    """What to run: on the one machine, or on each of several."""
    interval = min(steps_between(kept, way), settings.training_steps)
    wanted: dict[str, object] = {"CHECKPOINT_KEEP_LAST": 2, **given(settings)}
    wanted |= {"ENABLE_CHECKPOINTS": True, "RESUME": "auto", "CHECKPOINT_INTERVAL": interval}
    wanted |= {"DISTRIBUTED": "fsdp", "CHECKPOINT_LAYOUT": "sharded"} if by_all(settings, way) else {}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in wanted.items()}
    words = [f"{name}={shlex.quote(text)}" for name, text in texts.items()]
    failures = settings.training_steps * way.seconds[1] / cluster.mtbf
    restarts = f"--max-restarts={SPARE_RESTARTS + math.ceil(2 * min(failures, MOST_FAILURES))}"
    torchrun = f"torchrun --nproc-per-node={cluster.devices} {restarts}"
    if cluster.machines == 1:
        return f"{' '.join(words)} \\\n  {torchrun} --standalone training.py"
    meeting = f"--nnodes={cluster.machines} --rdzv-backend=c10d --rdzv-id=milepost --rdzv-endpoint=HOST:29400"
    where = "# On each machine; HOST is one of them, and all see the same checkpoints and text."
    return f"{where}\n{' '.join(words)} \\\n  {torchrun} {meeting} training.py"


# ---------------------------------------------------------------------------------------------------------------------
# What several of them ask for.


def wish_of(settings: Config) -> str:
    """DISTRIBUTED."""
    return settings.distributed


def given(settings: Config) -> dict[str, object]:
    """What the user set of what training.py reads."""
    named = [name for name, each in config.VARIABLES.items() if each.metadata["group"] not in OTHERS]
    return {name: getattr(settings, name.lower()) for name in named if settings.given(name) and name != "ENV_FILE"}


def by_all(settings: Config, way: Way) -> bool:
    """Whether every process saves its part: where it has one, unless another layout is asked for."""
    return way.name == "fsdp" and (settings.checkpoint_layout == "sharded" or not settings.given("CHECKPOINT_LAYOUT"))


def checkpoint_bytes(settings: Config, step: Step) -> int:
    """Weights, or the trained ones alone, and of these AdamW's two moments."""
    weights = step.trained if settings.checkpoint_adapters_only else step.weights
    return scaling.BYTES * (weights + (0 if settings.checkpoint_model_only else 2 * step.trained))


def steps_between(one: Saving, way: Way) -> int:
    """CHECKPOINT_INTERVAL: the interval in steps, at least one."""
    return max(1, round(one.interval / way.seconds[1]))


def percent(share: float) -> str:
    """A share in whole percents."""
    return f"{100 * share:.0f} %"


def time_of(seconds: float) -> str:
    """Seconds in words, also those that are parts of one, or days."""
    if seconds > NEVER:
        return "for ever"
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return duration(seconds) if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def span(low: str, high: str) -> str:
    """Two ends, or one where they are the same; what both end with is said once."""
    unit = high[-2:] if low[-2:] == high[-2:] == " %" else ""
    return high if low == high else f"{low.removesuffix(unit)} to {high}"


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
