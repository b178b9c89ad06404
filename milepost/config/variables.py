"""Every setting of the project, declared once: name, type, default, limits and one line of documentation.

To add a setting, add one line to `Config`; help, .env.example and docs/configuration.md follow from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from milepost.registry import layouts_to_save

Json = str | int | float | bool | None


ROOT = Path(__file__).resolve().parent.parent.parent


LORA_OTHERS = ("LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS")


TTT_OTHERS = ("TTT_BASE_LR", "TTT_MINI_BATCH_SIZE", "TTT_INITIAL_GATING_ALPHA")


LAYERS = ("c_attn", "c_proj", "c_fc")  # that adapters may stand beside


BIGGEST = 2**63 - 1  # the largest seed of torch's generators; no count comes near it


DERIVED = ("default", "checkpoint", "weights", "plan")  # sources of values that nobody gave


MACHINE_S_OWN = (
    "DEVICE",
    "TRAINING_DATA_SOURCE",
    "CHECKPOINT_DIR",
    "RUNS_DIR",
)  # may differ between machines that train together


MAY_BE_BLANK = ("PROMPT", "STOP")  # white space is text to them


# Defaults that depend on the model; `pretrained` is GPT2_MODEL_NAME set: None is what its weights bring.
# fmt: off
DEFAULTS_BY_MODEL: dict[str, dict[str, Any]] = {
    "bigram": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0, "training_steps": 2000,
               "batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 0, "lr_schedule": "cosine", "optimizer": "adamw"},
    "gpt2": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "dropout": 0.0, "training_steps": 1000,
             "batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 100, "lr_schedule": "linear", "optimizer": "muon"},
    "pretrained": {"n_layer": None, "n_head": None, "n_embd": None, "block_size": 256, "dropout": 0.1, "training_steps": 2000,
                   "batch_size": 4, "learning_rate": 5e-5, "warmup_steps": 100, "lr_schedule": "cosine", "optimizer": "adamw"},
}


LORA_DEFAULTS = {"learning_rate": 5e-4, "optimizer": "adamw"}  # ten times what all weights bear (Schulman et al. 2025, "LoRA without regret")


ADAMW_RATE, ITS_WIDTH = 3e-3, 128  # a gpt2's from random weights; wider ones bear less, as 1 / N_EMBD (Yang et al. 2022, arXiv 2203.03466)


MUON_PAYS = 10  # tokens a step for each of N_EMBD, below which orthogonalizing takes longer than it saves steps


LAYOUTS = layouts_to_save()


BY_MODEL = DEFAULTS_BY_MODEL["bigram"]


SCOPES = {  # scope -> what becomes of the value when a run goes on from a checkpoint
    "identity": "must match",      # RESUME=auto takes only a checkpoint that shares it with the wish
    "math": "saved, else a fork",  # changes the trained weights: a new value starts a child run
    "habit": "saved",              # changes no bit of the weights; taken from the checkpoint when not given
    "session": "as given",         # never taken from a checkpoint
}
# fmt: on


class ConfigError(Exception):
    """Everything that is wrong with the settings, one sentence each in `problems`. Exit code 2 at the door."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [printable(problem) for problem in problems]
        super().__init__("\n".join(self.problems))


# fmt: off
def var(default: Any, doc: str, *, group: str, scope: str = "session", form: str = "", choices: tuple[str, ...] = (),
        words: tuple[str, ...] = (), minimum: float | None = None, above: float | None = None,
        maximum: float | None = None, below: float | None = None) -> Any:
    """One variable: `words` are taken besides the values of its type, `form` names its reader in FORMS."""
    return field(default=default, metadata={
        "doc": doc, "group": group, "scope": scope, "form": form, "choices": choices, "words": words,
        "minimum": minimum, "above": above, "maximum": maximum, "below": below})
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The resolved settings: one field for each variable, in lower case. None means "not set". Made by `read()`."""

    # fmt: off
    training_data_source: str = var("data/dear_wren.md", "text to train on: a file (.txt .md .jsonl .csv, each also "
        ".gz), folder, glob, several joined by commas, https URL, or the named set tinyshakespeare",
        group="Data", scope="identity", form="source")
    tokenizer: str = var("auto", "auto is gpt2 with GPT2_MODEL_NAME, else char up to 256 different characters, else "
        "bpe", group="Data", scope="identity", choices=("auto", "char", "byte", "bpe", "gpt2"))
    bpe_vocab_size: int = var(1024, "tokens of a BPE trained on the text; small, so that a small model meets each "
        "token often", group="Data", scope="identity", minimum=257, maximum=1_000_000)
    validation_fraction: float = var(0.1, "share of the characters, taken from the end, that is kept for validation",
        group="Data", scope="identity", minimum=0, below=1)
    env_file: str | None = var(None, "file of settings to read instead of the repository's .env; only from the "
        "process environment", group="Data", form="path")

    model_type: str = var("bigram", "bigram trains in seconds, gpt2 in minutes",
        group="Model", scope="identity", choices=("bigram", "gpt2"))
    gpt2_model_name: str | None = var(None, "pretrained weights to start from, with MODEL_TYPE=gpt2: gpt2, "
        "gpt2-medium, gpt2-large, gpt2-xl, another hub name, or a Hugging Face folder",
        group="Model", scope="identity", form="hub")
    n_layer: int | None = var(BY_MODEL["n_layer"], "transformer blocks; 4 of width 128 are 0.8 million parameters, 3 "
        "MB, trained in minutes on a CPU; pretrained weights bring their own",
        group="Model", scope="identity", minimum=1)
    n_head: int | None = var(BY_MODEL["n_head"], "attention heads a block; must divide N_EMBD",
        group="Model", scope="identity", minimum=1)
    n_embd: int | None = var(BY_MODEL["n_embd"], "width of the model: numbers for each token",
        group="Model", scope="identity", minimum=1)
    block_size: int = var(BY_MODEL["block_size"], "context length in tokens; pretrained GPT-2 could use 1024, too "
        "slow on a laptop", group="Model", scope="identity", minimum=1)
    dropout: float = var(BY_MODEL["dropout"], "share of activations dropped in training, against learning a small "
        "text by heart; a small model needs none for its first epochs, and none is faster", group="Model", scope="math", minimum=0, below=1)
    bias: bool = var(True, "biases in linear layers and layer norms, as published", group="Model", scope="identity")

    lora_rank: int = var(0, "rank of adapters beside each matrix, which alone learn; the base of GPT2_MODEL_NAME or INIT_FROM "
        "is frozen; 8 is usual; 0 = none", group="Adapters", scope="identity", minimum=0)
    lora_alpha: float = var(16.0, "what the adapters add is scaled by LORA_ALPHA / LORA_RANK", group="Adapters",
        scope="identity", above=0)
    lora_dropout: float = var(0.0, "share of the adapters' inputs dropped in training", group="Adapters",
        scope="identity", minimum=0, below=1)
    lora_targets: str = var("c_attn,c_proj,c_fc", "layers that get adapters, joined by commas: c_attn (query, key, value), "
        "c_proj (both of a block), c_fc", group="Adapters", scope="identity", form="layers")
    ttt_layers: str | None = var(None, "blocks of a GPT-2, counted from 0, that get a TTT layer, which learns while it "
        "reads, like 1,5,10; not set: none", group="Adapters", scope="identity", form="blocks")
    ttt_base_lr: float = var(1.0, "step size of what a TTT layer learns while it reads, before the share of it that "
        "training learns", group="Adapters", scope="identity", above=0)
    ttt_mini_batch_size: int = var(16, "tokens from which a TTT layer learns at once: more is faster, fewer follow the "
        "text more closely; 16 as published", group="Adapters", scope="identity", minimum=1)
    ttt_initial_gating_alpha: float = var(0.1, "a TTT layer's output counts times tanh of this at first, and training "
        "moves it; 0 begins as the model without the layer", group="Adapters", scope="identity")
    checkpoint_adapters_only: bool = var(False, "freeze the base, and save the adapters without it: a hundredth of the bytes; "
        "opening one asks for the base, and refuses another", group="Adapters", scope="identity")
    base_checkpoint: str | None = var(None, "checkpoint of the base, for one that holds adapters alone; GPT2_MODEL_NAME "
        "names a pretrained one", group="Adapters", form="path", words=("latest", "best"))

    training_steps: int = var(BY_MODEL["training_steps"], "optimizer steps in all, those of an interrupted run included",
        group="Training", scope="math", minimum=1)
    batch_size: int = var(BY_MODEL["batch_size"], "windows of BLOCK_SIZE tokens a micro-batch, of all processes together; fits a laptop's memory",
        group="Training", scope="math", minimum=1)
    gradient_accumulation_steps: int = var(1, "micro-batches an optimizer step: a larger batch in the same memory",
        group="Training", scope="math", minimum=1)
    learning_rate: float = var(BY_MODEL["learning_rate"], "peak learning rate; high for a table, gentle on pretrained "
        "weights; of a gpt2 with OPTIMIZER=adamw the default is 3e-3 up to N_EMBD=128 and falls as 1 / N_EMBD, with LORA_RANK it is 5e-4", group="Training", scope="math", above=0)
    min_learning_rate: float | None = var(None, "learning rate at the end of the schedule; not set: 0 for linear, "
        "else a tenth of LEARNING_RATE, as in GPT-3's training", group="Training", scope="math", minimum=0)
    warmup_steps: int = var(BY_MODEL["warmup_steps"], "optimizer steps of linear rise to LEARNING_RATE, while Adam's "
        "averages fill; the default is never more than a tenth of TRAINING_STEPS",
        group="Training", scope="math", minimum=0)
    lr_schedule: str = var(BY_MODEL["lr_schedule"], "course of the learning rate after the warm-up; wsd holds it and "
        "falls at the end; linear falls to zero, which learns most from few steps",
        group="Training", scope="math", choices=("constant", "cosine", "linear", "wsd"))
    optimizer: str = var(BY_MODEL["optimizer"], "muon orthogonalizes the updates of hidden matrices and leaves the rest "
        "to AdamW: fewer steps, but below 10 x N_EMBD tokens a step each costs more than it saves, and adamw is the default",
        group="Training", scope="math", choices=("adamw", "muon"))
    weight_decay: float = var(0.1, "decoupled weight decay, on matrices only; 0.1 as for GPT-3",
        group="Training", scope="math", minimum=0)
    beta1: float = var(0.9, "Adam's decay of the gradient's average",
        group="Training", scope="math", minimum=0, below=1)
    beta2: float = var(0.99, "Adam's decay of the squared gradient's average; above GPT-3's 0.95 because small "
        "batches are noisy", group="Training", scope="math", minimum=0, below=1)
    grad_clip: float = var(1.0, "largest norm of the whole gradient; 0 = no clipping",
        group="Training", scope="math", minimum=0)

    eval_interval: int = var(250, "optimizer steps between validations; 0 = only at the end",
        group="Watching", scope="habit", minimum=0)
    eval_steps: int = var(20, "batches of validation windows a validation, always the same ones; 0 = all",
        group="Watching", scope="habit", minimum=0)
    sample_interval: int | None = var(None, "optimizer steps between text samples, kept in the run's folder; not set: "
        "EVAL_INTERVAL, so that each validation but the one at step 0 has its sample; 0 = none before the end",
        group="Watching", scope="habit", minimum=0)
    log_interval: int = var(10, "optimizer steps between lines of metrics.jsonl",
        group="Watching", scope="habit", minimum=1)
    tracker: str = var("none", "also shows the figures of metrics.jsonl in tensorboard, wandb or trackio (pip install the "
        "one you choose); never asks for a login: wandb records offline unless WANDB_API_KEY or WANDB_MODE says otherwise",
        group="Watching", scope="habit", choices=("none", "tensorboard", "wandb", "trackio"))
    run: str = var("latest", "runs that scripts/plot_run.py draws: the beginning of a run's name, a glob of names, a run's "
        "folder, latest, or several of these joined by commas", group="Watching")
    seed: int = var(1337, "decides initial weights, data order and dropout; 1337 as in nanoGPT",
        group="Machine", scope="math", minimum=0)
    device: str = var("auto", "auto takes cuda, else mps, else cpu; CUDA_VISIBLE_DEVICES chooses among several",
        group="Machine", choices=("auto", "cpu", "cuda", "mps"))
    distributed: str = var("auto", "how the processes that torchrun starts share the work: ddp, each with the whole model; fsdp, "
        "each with a part of every weight; auto takes fsdp only if the model and its optimizer do not fit otherwise",
        group="Machine", choices=("auto", "ddp", "fsdp"))
    dtype: str = var("auto", "number format of matrix products; weights that are trained stay float32; auto is bfloat16 where "
        "that is fast", group="Machine", scope="math", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = var("auto", "torch.compile of the training step; auto compiles on cuda when it pays back",
        group="Machine", scope="math", choices=("auto", "true", "false"))
    deterministic: bool = var(True, "kernels that give the same bits at every run, so that a resumed run ends as the "
        "uninterrupted one", group="Machine", scope="math")

    enable_checkpoints: bool = var(False, "whether training keeps checkpoints", group="Checkpoints", scope="habit")
    checkpoint_interval: int = var(500, "optimizer steps between checkpoints; 0 = only at the end",
        group="Checkpoints", scope="habit", minimum=0)
    checkpoint_dir: str = var("checkpoints", "folder of the checkpoints", group="Checkpoints", form="path")
    checkpoint_layout: str = var("unified", "how a checkpoint is laid out on disk; a resume keeps the layout it came from",
        group="Checkpoints", choices=LAYOUTS)
    checkpoint_model_only: bool = var(False, "leave the optimizer out: a third of the bytes (half with muon), but it cannot go on exactly",
        group="Checkpoints", scope="habit")
    checkpoint_prefix: str = var("checkpoint", "how the names of checkpoints begin", group="Checkpoints", scope="habit",
        form="name")
    checkpoint_keep_last: int = var(0, "newest checkpoints of a run to keep, its final one besides; 0 = all",
        group="Checkpoints", scope="habit", minimum=0)
    checkpoint_keep_every: int = var(0, "of those leaving CHECKPOINT_KEEP_LAST, keep the ones at multiples of so many "
        "optimizer steps, without their optimizer; 0 = none", group="Checkpoints", scope="habit", minimum=0)
    checkpoint_keep_best: int = var(1, "checkpoints of lowest validation loss to keep of a run under best/; 0 = none",
        group="Checkpoints", scope="habit", minimum=0)
    checkpoint_async: bool = var(True, "write checkpoints while training goes on, from a copy in memory; the bytes are "
        "the same", group="Checkpoints")
    runs_dir: str = var("runs", "folder of the runs: metrics, log, resolved settings, samples",
        group="Checkpoints", form="path")
    resume: str = var("never", "auto goes on exactly from the newest fitting checkpoint of CHECKPOINT_DIR; a path (or "
        "latest, best) from that one", group="Checkpoints", form="path", words=("never", "auto", "latest", "best"))
    resume_step: int | None = var(None, "go on from the checkpoint of this optimizer step instead of the newest",
        group="Checkpoints", minimum=0)
    init_from: str | None = var(None, "checkpoint whose weights and tokenizer start a new run, with a fresh optimizer "
        "at step 0", group="Checkpoints", form="path", words=("latest", "best"))

    mode: str = var("inference", "what scripts/load_checkpoint.py does: generate text, or train on",
        group="Generating", choices=("inference", "resume"))
    checkpoint_path: str = var("latest", "checkpoint to open: a file, a folder, a glob, latest or best of "
        "CHECKPOINT_DIR; scripts that look at several take them joined by commas, all of a folder or all that a glob "
        "matches", group="Generating", form="paths", words=("latest", "best"))
    prompt: str | None = var(None, "text to go on from; not set: the model begins by itself", group="Generating")
    prompt_file: str | None = var(None, "file that holds the prompt; - is the standard input",
        group="Generating", form="path", words=("-",))
    max_new_tokens: int = var(300, "most tokens to generate", group="Generating", minimum=1)
    temperature: float = var(0.8, "0 takes the likeliest token, 1 draws as trained; 0.8 as in nanoGPT: small models "
        "ramble at 1", group="Generating", minimum=0)
    top_k: int = var(200, "draw among this many likeliest tokens; 0 = all; 200 as in nanoGPT cuts the long tail of a "
        "large vocabulary", group="Generating", minimum=0)
    top_p: float = var(1.0, "draw among the likeliest tokens that hold this probability; 1 = all: TOP_K suffices",
        group="Generating", above=0, maximum=1)
    repetition_penalty: float = var(1.0, "above 1 makes tokens seen before less likely; 1 = off, as small "
        "vocabularies must repeat", group="Generating", above=0)
    stop: tuple[str, ...] = var((), r"text that ends the generation and is not shown, with \n, \t and \\ as escapes; "
        r"several as a JSON list", group="Generating", form="list")
    num_samples: int = var(1, "texts to generate", group="Generating", minimum=1)
    sample_seed: int | None = var(None, "seed of the generation; not set: drawn anew and printed",
        group="Generating", minimum=0)
    quantize: str = var("none", "int8 keeps a GPT-2's matrices in 8 bits while it generates on a CPU: faster, and nearly "
        "as good", group="Generating", choices=("none", "int8"))
    speculate: str = var("none", "lookup drafts what followed the same tokens before: the same text, sooner where it "
        "repeats itself", group="Generating", choices=("none", "lookup"))
    stream: bool = var(True, "show text while it is generated", group="Generating")

    resume_training_steps: int = var(5000, "optimizer steps that MODE=resume adds; 0 prints the plan and stops",
        group="Going on", minimum=0)
    resume_learning_rate: float | Literal["keep"] = var(3e-4, "peak learning rate of the added steps; keep = the "
        "saved schedule", group="Going on", words=("keep",), above=0)

    eval_type: str = var("standard", "what scripts/evaluate_checkpoint.py measures: standard is loss, perplexity and bits "
        "per byte on EVAL_DATA, benchmark the accuracy on BENCHMARK_DATA", group="Evaluating", choices=("standard", "benchmark", "both"))
    eval_data: str | None = var(None, "text to evaluate on, named as TRAINING_DATA_SOURCE is; not set: what each checkpoint's "
        "own text keeps for validation", group="Evaluating", form="source")
    eval_stride: int = var(0, "tokens that a window of the evaluated text lies behind the one before; 0 = a whole window; "
        "fewer give each token more context and take longer", group="Evaluating", minimum=0)
    benchmark_data: str | None = var(None, "files of questions to answer (.jsonl .csv): HellaSwag, minimal pairs as "
        "BLiMP's, story cloze", group="Evaluating", form="source")

    compare_with: str | None = var(None, "checkpoint that scripts/inspect_checkpoint.py compares CHECKPOINT_PATH with",
        group="Looking after", form="path", words=("latest", "best"))
    replay: bool = var(False, "scripts/verify_checkpoint.py trains again from the checkpoint before and compares every "
        "byte", group="Looking after")
    convert_to: str | None = var(None, "what scripts/convert_checkpoint.py writes: a layout of checkpoints, or what another "
        "program opens and no run goes on from; not set: CHECKPOINT_LAYOUT", group="Looking after",
        choices=(*LAYOUTS, "gguf", "nanogpt", "peft"))
    gguf_type: str = var("f16", "number format of the matrices that CONVERT_TO=gguf writes; q8_0 is half of f16, and "
        "nearly as good", group="Looking after", choices=("f32", "f16", "q8_0"))
    output: str | None = var(None, "folder that scripts/convert_checkpoint.py writes to; not set: beside the one "
        "checkpoint, or exports/ for what is none; a whole folder needs it. File that scripts/plot_run.py draws into (.png .svg .pdf) instead of the "
        "terminal, and that scripts/compare_samples.py (.json .md) and scripts/evaluate_checkpoint.py (.json) write besides",
        group="Looking after", form="path")
    dry_run: bool = var(True, "scripts/prune_checkpoints.py only says what it would do", group="Looking after")

    machines: int = var(1, "machines that train together, in the plan of scripts/plan_scaling.py, as all of this group; what is assumed "
        "here stands with its sources in docs/scaling.md", group="Scaling", minimum=1, maximum=1_000_000)
    devices_per_machine: int = var(8, "devices (GPUs) of a machine, with a process each", group="Scaling", minimum=1, maximum=10_000)
    device_tflops: float = var(400.0, "TFLOP/s that a device reaches in training, not its peak: 40 % of an H100's in bfloat16",
        group="Scaling", minimum=1e-3, maximum=1e6)
    device_memory_gb: float = var(80.0, "memory of a device in GB", group="Scaling", minimum=1e-3, maximum=1e6)
    device_gb_s: float = var(400.0, "GB/s that a device sends to the others of its machine, one way",
        group="Scaling", minimum=1e-3, maximum=1e6)
    machine_gb_s: float = var(50.0, "GB/s that a machine sends to the others, one way, all its network cards together: 50 is 400 Gbit/s",
        group="Scaling", minimum=1e-3, maximum=1e6)
    copy_gb_s: float = var(20.0, "GB/s at which a device's state is copied to main memory, to be saved in the background",
        group="Scaling", minimum=1e-3, maximum=1e6)
    disk_gb_s: float = var(2.0, "GB/s at which one machine writes checkpoints", group="Scaling", minimum=1e-3, maximum=1e6)
    machine_mtbf_hours: float = var(6000.0, "mean time between failures of one machine in hours",
        group="Scaling", minimum=1e-2, maximum=1e9)
    restart_minutes: float = var(5.0, "minutes from a failure until training goes on: noticing it, starting, loading",
        group="Scaling", minimum=0, maximum=1e6)
    # fmt: on

    # Where each value came from: "environment", the env file's name, "checkpoint" or "default".
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def given(self, name: str) -> bool:
        """Whether the user set the variable, in the environment or the env file."""
        return self.sources.get(name.upper(), "default") not in DERIVED


VARIABLES: dict[str, Field[Any]] = {each.name.upper(): each for each in fields(Config) if each.metadata}


DATA = ("TRAINING_DATA_SOURCE", "VALIDATION_FRACTION")


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates spelled out: values of anybody's reach a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
