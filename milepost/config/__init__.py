"""Every setting of the project, declared once: name, type, default, limits and one line of documentation.

The only module that reads or writes os.environ. `door()` is what every script calls first; `read()` is the same without
printing. Nothing here imports torch, so that mistakes are reported at once, and all of them together.
`python3 config.py` writes .env.example and docs/configuration.md anew from these declarations.
"""

import dataclasses
import difflib
import functools
import glob
import io
import json
import math
import operator
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TextIO, get_args

try:
    from dotenv import dotenv_values
    from dotenv.parser import Binding, parse_stream
except ModuleNotFoundError:
    sys.exit(
        "python-dotenv is not installed for this Python: pip install -r requirements.txt, "
        "or run .venv/bin/python, which make train makes"
    )

Json = str | int | float | bool | None

ROOT = Path(__file__).resolve().parent
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}
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
NEAR_MISS = 0.9  # difflib's ratio from which a name in the process environment is taken for a typing error of ours

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
LAYOUTS = ("unified", "separated", "directory", "stepfiles", "consolidated", "huggingface", "sharded")
BY_MODEL = DEFAULTS_BY_MODEL["bigram"]

# Variables of others that an env file may hold: they go to the process environment before torch is imported.
FOREIGN_PREFIXES = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_", "TIKTOKEN_", "DATA_GYM_", "TQDM_", "MPL",
    "WANDB_", "TRACKIO_", "GRADIO_", "TORCH", "PYTORCH_", "PYTHON", "CUDA_", "CUBLAS_", "CUDNN_", "NVIDIA_", "NCCL_",
    "GLOO_", "MPS_", "TRITON_", "ATEN_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "XDG_", "SSL_CERT_", "LC_",
)
FOREIGN_NAMES = (
    "NO_COLOR", "FORCE_COLOR", "DEBUG", "CI", "TERM", "COLUMNS", "LANG", "TZ", "TMPDIR", "RANK", "LOCAL_RANK",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
    "NO_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)
# What other projects call these settings, and what a bare file name stands for: for "did you mean".
OTHER_WORDS = {
    "LR": "LEARNING_RATE", "STEPS": "TRAINING_STEPS", "MAX_STEPS": "TRAINING_STEPS", "MAX_ITERS": "TRAINING_STEPS",
    "MODEL": "MODEL_TYPE", "CONTEXT_LENGTH": "BLOCK_SIZE", "OUT_DIR": "CHECKPOINT_DIR", "CHECKPOINT": "CHECKPOINT_PATH",
    ".pt": "CHECKPOINT_PATH", ".safetensors": "CHECKPOINT_PATH", ".env": "ENV_FILE", ".txt": "TRAINING_DATA_SOURCE",
    "DATA": "TRAINING_DATA_SOURCE", "DATASET": "TRAINING_DATA_SOURCE", ".md": "TRAINING_DATA_SOURCE",
    "CONFIG": "ENV_FILE", ".yaml": "ENV_FILE", "MODEL_NAME": "CHECKPOINT_PREFIX",
}
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
        self.problems = [_printable(problem) for problem in problems]
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
LONG_NAMES = [name for name in VARIABLES if "_" in name and len(name) >= 8]


def read(environ: Mapping[str, str] | None = None, *, cwd: str | os.PathLike[str] | None = None) -> Config:
    """The settings of `environ` (default: the process environment), then of the env file, then the defaults.

    Given paths are relative to `cwd` (default: the current folder), defaults to the repository. With the process
    environment, variables of others that the env file holds are put into it. Raises ConfigError with every problem.
    """
    variables = os.environ if environ is None else environ
    folder = os.path.abspath(os.getcwd() if cwd is None else cwd)
    problems: list[str] = []
    label, in_file = _read_env_file(variables, folder, problems)
    if environ is None:
        for name in filter(_is_foreign, in_file):
            os.environ.setdefault(name, in_file[name])
        # cuBLAS reads it when it starts; without it, its workspaces may change the order of sums.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    problems += [*_unknown_in_environment(variables), *_unknown_in_file(in_file, label)]
    texts = {name: (in_file[name], label) for name in VARIABLES if _says_something(name, in_file.get(name, ""))}
    for name in VARIABLES:
        text = variables.get(name, "")
        if _says_something(name, text) and (name, text) != ("PROMPT", "$P$G"):  # what Windows' own shell sets
            texts[name] = text, "environment"
    values: dict[str, Any] = {}
    for name, (text, source) in texts.items():
        try:
            values[name] = _parse(VARIABLES[name], text, folder)
        except ValueError:
            problems.append(_refusal(VARIABLES[name], text, source))
    return _finish(values, {name: source for name, (_, source) in texts.items()}, problems)


def _says_something(name: str, text: str) -> bool:
    """Whether a value counts as set: an empty one does not, nor does one of white space, but for texts that may consist of it."""
    return bool(text if name in MAY_BE_BLANK else text.strip())


def from_saved(current: Config, saved: Mapping[str, Any]) -> Config:
    """`current` with every setting of training that was not given taken from `saved`, what `to_dict` once returned.

    Names in `saved` that are unknown, or never taken from a checkpoint, are ignored: another version may have written
    them. Raises ConfigError naming variable and checkpoint where a saved value is none or contradicts a given one.
    """
    values, sources = _given(current)
    problems: list[str] = []
    for name, each in VARIABLES.items():
        if each.metadata["scope"] != "session" and name in saved and not current.given(name):
            sources[name] = "checkpoint"
            try:
                values[name] = _from_json(each, saved[name])
            except ValueError:
                problems.append(_refusal(each, saved[name], "checkpoint"))
    return _finish(values, sources, problems, merged=True)


def frozen_base(config: Config) -> bool:
    """Whether adapters alone are trained, beside a base that stays as it is."""
    return config.lora_rank > 0 or config.checkpoint_adapters_only


def contradictions(current: Config, saved: Mapping[str, Any]) -> list[tuple[str, Json, Json]]:
    """The given settings of model and tokenizer that `saved` has otherwise: name, given and saved value.

    TOKENIZER=auto contradicts nothing. Data is no part of this: a text is known by its hash, not by its name.
    """
    wished = [name for name, each in VARIABLES.items() if each.metadata["scope"] == "identity" and name not in DATA]
    return [(name, now, before) for name, (before, now) in _differences(current, saved, wished).items()]


def changes(current: Config, saved: Mapping[str, Any]) -> dict[str, list[Json]]:
    """The given settings that change the trained weights and that `saved` has otherwise: name -> [saved, given]."""
    return _differences(current, saved, [name for name, each in VARIABLES.items() if each.metadata["scope"] == "math"])


def replaced(current: Config, source: str, **values: Any) -> Config:
    """`current` with `values`, told to come from `source`: neither given nor a default."""
    derived = {name.upper(): source for name, value in values.items() if value != getattr(current, name)}
    return dataclasses.replace(current, **values, sources={**current.sources, **derived})


def without(current: Config, names: Iterable[str]) -> Config:
    """`current` as if `names` had not been given."""
    values, sources = _given(current)
    left = {name: value for name, value in values.items() if name not in set(names)}
    return _build(left, {name: sources[name] for name in left})


def _differences(current: Config, saved: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[Json]]:
    values, _ = _given(current)
    shared = [name for name in names if name in values and name in saved and values[name] != "auto"]
    return {name: [saved[name], values[name]] for name in shared if saved[name] != values[name]}


def _given(config: Config) -> tuple[dict[str, Any], dict[str, str]]:
    """The given values and their sources."""
    values = {name: getattr(config, name.lower()) for name in VARIABLES if config.given(name)}
    return values, {name: config.sources[name] for name in values}


def to_dict(config: Config) -> dict[str, Json]:
    """What a checkpoint keeps: every variable but those of a session, and DEVICE for who reads it.

    A data source inside the repository is kept relative to it, so that the repository may move.
    """
    kept = [name for name, each in VARIABLES.items() if each.metadata["scope"] != "session" or name == "DEVICE"]
    values = {name: getattr(config, name.lower()) for name in kept}
    values["TRAINING_DATA_SOURCE"] = ",".join(map(_portable, config.training_data_source.split(",")))
    return values


def _portable(path: str) -> str:
    return Path(path).relative_to(ROOT).as_posix() if Path(path).is_relative_to(ROOT) else path


def _finish(values: dict[str, Any], sources: dict[str, str], problems: list[str], *, merged: bool = False) -> Config:
    """The Config of `values` and the defaults; raises ConfigError if there are problems or contradictions."""
    bad = sources.keys() - values.keys()
    config = _build(values, sources)
    # What a run that goes on is not given will come from its checkpoint: until then its default proves nothing.
    open_ends = not merged and (config.resume != "never" or config.mode == "resume" or config.init_from is not None)
    for names, sentence in _clashes(config):
        known = [config.given(name) or VARIABLES[name].metadata["scope"] == "session" for name in names]
        if any(map(config.given, names)) and not bad.intersection(names) and (all(known) or not open_ends):
            problems.append(sentence)
    if problems:
        raise ConfigError(problems)
    return config


def _build(values: dict[str, Any], sources: Mapping[str, str]) -> Config:
    resolved = {name.lower(): value for name, value in (_defaults(values) | values).items()}
    return Config(**resolved, sources={name: sources.get(name, "default") for name in VARIABLES})


def _pair(config: Config, one: str, other: str, text: str) -> tuple[tuple[str, ...], str]:
    """Two variables, and the text with both settings in it."""
    said = [f"{name}={_short(getattr(config, name.lower()))} ({config.sources[name]})" for name in (one, other)]
    return (one, other), text.format(*said)


def _clashes(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are each right but not together: the variables concerned and the sentence."""
    pair = functools.partial(_pair, config)
    yield from _adapter_clashes(config)
    heads, width = config.n_head, config.n_embd
    if config.gpt2_model_name and config.model_type != "gpt2":
        yield pair("GPT2_MODEL_NAME", "MODEL_TYPE", "{} needs MODEL_TYPE=gpt2, not {}")
    if config.gpt2_model_name and config.init_from:
        yield pair("GPT2_MODEL_NAME", "INIT_FROM", "{} and {} both name the first weights: unset one")
    if config.model_type == "gpt2" and not config.gpt2_model_name and heads and width and width % heads:
        yield pair("N_EMBD", "N_HEAD", f"{{}} must be a multiple of {{}}: set N_EMBD={-(-width // heads) * heads}")
    if config.optimizer == "muon" and config.model_type != "gpt2":
        yield pair("OPTIMIZER", "MODEL_TYPE", "{} needs MODEL_TYPE=gpt2, not {}, which is one table")
    # MODE=resume plans a schedule of its own, from RESUME_TRAINING_STEPS and RESUME_LEARNING_RATE.
    if config.mode != "resume" and config.warmup_steps > config.training_steps:
        yield pair("WARMUP_STEPS", "TRAINING_STEPS", "{} is more than {}: set fewer WARMUP_STEPS")
    if config.mode != "resume" and (config.min_learning_rate or 0) > config.learning_rate:
        yield pair("MIN_LEARNING_RATE", "LEARNING_RATE", "{} is above {}: set a lower MIN_LEARNING_RATE")
    if config.prompt is not None and config.prompt_file is not None:
        yield pair("PROMPT", "PROMPT_FILE", "{} and {} are both given: unset one")
    if config.checkpoint_keep_every and not config.checkpoint_keep_last:
        yield pair(
            "CHECKPOINT_KEEP_EVERY", "CHECKPOINT_KEEP_LAST", "{} is about those leaving {}, which keeps all: set that"
        )
    if config.resume_step is not None and config.mode == "resume":
        yield pair(
            "RESUME_STEP",
            "MODE",
            "{} is for RESUME in training.py; with {} name the step in CHECKPOINT_PATH: checkpoints/*_step2000_*.pt",
        )
    elif config.resume_step is not None and config.resume == "never":
        yield pair("RESUME_STEP", "RESUME", "{} needs RESUME=auto or RESUME=a path, not {}")


def _adapter_clashes(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """`_clashes` of the adapters' settings."""
    pair = functools.partial(_pair, config)
    if config.lora_rank and config.model_type != "gpt2":
        yield pair("LORA_RANK", "MODEL_TYPE", "{} needs MODEL_TYPE=gpt2, not {}")
    if config.ttt_layers and config.model_type != "gpt2":
        yield pair("TTT_LAYERS", "MODEL_TYPE", "{} needs MODEL_TYPE=gpt2, not {}")
    elif config.ttt_layers and config.n_layer and int(config.ttt_layers.split(",")[-1]) >= config.n_layer:
        there = f"0 to {config.n_layer - 1}"
        yield pair("TTT_LAYERS", "N_LAYER", f"{{}} names a block that is not there: {{}} makes {there}")
    for off, others in (("LORA_RANK", LORA_OTHERS), ("TTT_LAYERS", TTT_OTHERS)):
        for name in others:
            if not getattr(config, off.lower()) and getattr(config, name.lower()) != VARIABLES[name].default:
                yield pair(name, off, f"{{}} says how, but {off} is not set: set it, or unset {name}")
    freezes = "LORA_RANK" if config.lora_rank else "CHECKPOINT_ADAPTERS_ONLY"
    if (
        frozen_base(config)
        and config.resume == "never"
        and config.mode != "resume"
        and not (config.gpt2_model_name or config.init_from)
    ):
        yield pair(
            freezes,
            "GPT2_MODEL_NAME",
            "{} freezes a base: set GPT2_MODEL_NAME or INIT_FROM to the one that is meant",
        )
    if config.checkpoint_adapters_only and not config.lora_rank and not config.ttt_layers:
        yield pair(
            "CHECKPOINT_ADAPTERS_ONLY", "LORA_RANK", "{} saves adapters, and {} adds none: set LORA_RANK or TTT_LAYERS"
        )
    if config.lora_rank and config.checkpoint_layout == "huggingface":
        yield pair(
            "LORA_RANK",
            "CHECKPOINT_LAYOUT",
            "{} and {}: transformers has no place for adapters; train in another layout, and convert "
            "with CONVERT_TO=peft, or merge them first (scripts/merge_adapters.py)",
        )
    if config.ttt_layers and config.checkpoint_layout == "huggingface":
        yield pair(
            "TTT_LAYERS", "CHECKPOINT_LAYOUT", "{} and {}: transformers has no place for them; train in another layout"
        )


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The default of every variable, given the model among `values`; paths are absolute, from the repository."""
    kind = "pretrained" if values.get("GPT2_MODEL_NAME") else values.get("MODEL_TYPE", "bigram")
    row = DEFAULTS_BY_MODEL[kind]
    if kind == "gpt2" and values.get("OPTIMIZER", _fitting_optimizer(values)) == "adamw":
        width = max(ITS_WIDTH, values.get("N_EMBD") or ITS_WIDTH)
        row = row | {"learning_rate": float(f"{ADAMW_RATE * ITS_WIDTH / width:.2g}"), "optimizer": "adamw"}
    if values.get("LORA_RANK"):
        row = row | LORA_DEFAULTS
    defaults = {name: row.get(each.name, each.default) for name, each in VARIABLES.items()}
    for name, each in VARIABLES.items():
        if each.metadata["form"] in ("path", "paths", "source") and defaults[name] not in (
            None,
            *each.metadata["words"],
        ):
            defaults[name] = _path(defaults[name], str(ROOT))
    steps = values.get("TRAINING_STEPS", defaults["TRAINING_STEPS"])
    between = values.get("EVAL_INTERVAL", defaults["EVAL_INTERVAL"])
    return defaults | {"WARMUP_STEPS": min(defaults["WARMUP_STEPS"], steps // 10), "SAMPLE_INTERVAL": between}


def _fitting_optimizer(values: Mapping[str, Any]) -> str:
    """The default optimizer of a gpt2 from random weights: a fixed rule on its width and the tokens of a step."""
    row = DEFAULTS_BY_MODEL["gpt2"]
    sizes = [values.get(name, row[name.lower()]) for name in ("BATCH_SIZE", "BLOCK_SIZE", "N_EMBD")]
    batch_size, block_size, n_embd = sizes
    tokens = batch_size * block_size * values.get("GRADIENT_ACCUMULATION_STEPS", 1)
    return "muon" if tokens >= MUON_PAYS * (n_embd or 0) else "adamw"


# The env file, and names that are no variables


def _read_env_file(environ: Mapping[str, str], folder: str, problems: list[str]) -> tuple[str, dict[str, str]]:
    """The env file's name as shown to the user, and its variables; what is wrong with it goes to `problems`."""
    given = environ.get("ENV_FILE", "") if environ.get("ENV_FILE", "").strip() else None
    label = f"./{given}" if given in ("environment", *DERIVED) else given or ".env"
    if environ.get("PYTHON_DOTENV_DISABLED", "").casefold() in ("1", "true", "t", "yes", "y"):
        if given:
            problems.append(f"ENV_FILE={given!r} is not read while PYTHON_DOTENV_DISABLED is set: unset one of them")
        return label, {}
    path = Path(_path(given, folder) if given else ROOT / ".env")
    if not given and (path.is_dir() or not path.exists()):  # a folder .env is somebody's virtual environment
        return label, {}
    try:
        if path.is_fifo() or (path.is_char_device() and str(path) != os.devnull):  # it could be read for ever
            raise OSError("it is no regular file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        problems.append(f"{label} cannot be read ({error}): expected UTF-8 text, one NAME=value a line")
        return label, {}
    lines = list(parse_stream(io.StringIO(text)))
    bad = [line for line in lines if line.error or "\0" in line.original.string or (line.key and line.value is None)]
    problems += [f"{label}, line {_line(line)}: expected NAME=value" for line in bad]
    readable = io.StringIO("".join(line.original.string for line in lines if line not in bad))
    return label, {name: value or "" for name, value in dotenv_values(stream=readable).items()}


def _line(binding: Binding) -> int:
    """The line on which a statement begins; python-dotenv counts from the empty lines before it."""
    text = binding.original.string
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _is_foreign(name: str) -> bool:
    known = name.upper() in FOREIGN_NAMES or name.upper().startswith(FOREIGN_PREFIXES)
    return known and name not in VARIABLES and "=" not in name


def _unknown_in_file(names: Iterable[str], label: str) -> Iterator[str]:
    for name in names:
        if name == "ENV_FILE":
            yield f"{label}: ENV_FILE can only be set in the process environment"
        elif name not in VARIABLES and not _is_foreign(name):
            meant = _meant(name)
            hint = f"did you mean {meant}?" if meant else "docs/configuration.md lists them"
            yield f"{label}: {name} is not a variable; {hint}"


def _unknown_in_environment(names: Iterable[str]) -> Iterator[str]:
    """Near misses of our longer names alone: the rest of the process environment is other people's."""
    for name in names:
        if "_" in name and len(name) >= 8 and name not in VARIABLES and not _is_foreign(name):
            for close in difflib.get_close_matches(name.upper(), LONG_NAMES, 1, NEAR_MISS):
                yield f"{name} is not a variable; did you mean {close}?"


def _meant(word: str) -> str | None:
    """The variable that somebody who writes `word` probably means."""
    name = word.upper().replace("-", "_")
    return OTHER_WORDS.get(name) or next(iter(difflib.get_close_matches(name, VARIABLES, 1)), None)


# One value: from text, from a checkpoint, and what to say when it is refused


def _parse(variable: Field[Any], text: str, folder: str) -> Any:
    """The value of a variable; ValueError where `text` is not as `expected` says. Relative paths start at `folder`."""
    rules, word = variable.metadata, text.strip().lower()
    text.encode("utf-8")  # bytes that are no UTF-8 arrive as lone surrogates; UnicodeEncodeError is a ValueError
    if word in rules["words"]:
        return word
    if rules["choices"]:
        if "true" in rules["choices"] and word in BOOLEANS:
            word = str(BOOLEANS[word]).lower()
        if word not in rules["choices"]:
            raise ValueError(text)
        return word
    blank = not (text if variable.name.upper() in MAY_BE_BLANK else word)
    if blank or "\0" in text or (variable.name == "resume" and word in BOOLEANS):
        raise ValueError(text)
    if rules["form"]:
        return FORMS[rules["form"]](text, folder)
    value = PARSERS[_kind(variable)](text)
    if not all(holds(value, rules[limit]) for limit, (_, holds) in LIMITS.items() if rules[limit] is not None):
        raise ValueError(text)
    return value


def _from_json(variable: Field[Any], value: object) -> Any:
    """A saved value, held to the same limits; a relative path in a checkpoint starts at the repository."""
    if value is None and NoneType in get_args(variable.type):
        return None
    if not isinstance(value, str | int | float) or (variable.metadata["form"] and not isinstance(value, str)):
        raise ValueError(value)
    return _parse(variable, value if isinstance(value, str) else json.dumps(value), str(ROOT))


def _boolean(text: str) -> bool:
    if text.strip().lower() not in BOOLEANS:
        raise ValueError(text)
    return BOOLEANS[text.strip().lower()]


def _integer(text: str) -> int:
    number = _number(text)  # 1e4 is a whole number too
    value = int(number) if re.search("[.eE]", text) else int(text)
    if not number.is_integer() or abs(value) > BIGGEST:
        raise ValueError(text)
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or not text.isascii():
        raise ValueError(text)
    return value


def _path(text: str, folder: str) -> str:
    """The absolute path; a glob keeps its meaning below a folder whose own name holds brackets."""
    text = os.path.expanduser(text)
    path = os.path.abspath(os.path.join(folder, text))
    if glob.has_magic(text) and not os.path.lexists(path):
        return os.path.abspath(os.path.join(glob.escape(folder), text))
    return path


def _source(text: str, folder: str) -> str:
    """A data source, its paths made absolute; URLs and named sets stay as they are."""
    if os.path.lexists(_path(text, folder)):  # one path, though it may hold a comma
        return _path(text, folder)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(text)
    return ",".join(part if "://" in part or part == "tinyshakespeare" else _path(part, folder) for part in parts)


def _paths(text: str, folder: str) -> str:
    """Paths joined by commas, made absolute; latest and best among them stay as they are."""
    if "," not in text or os.path.lexists(_path(text, folder)):  # one path, though it may hold a comma
        return _path(text, folder)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(text)
    return ",".join(part.lower() if part.lower() in ("latest", "best") else _path(part, folder) for part in parts)


def _hub(text: str, folder: str) -> str:
    """The absolute path of what is a folder or written like one, else the hub name as it is."""
    path = _path(text.strip(), folder)
    return path if text.strip().startswith((".", "/", "~")) or os.path.isdir(path) else text.strip()


def _list(text: str, _folder: str) -> tuple[str, ...]:
    """The strings of a JSON list, or the one string that `text` is, with escapes."""
    if not text.lstrip().startswith("["):
        return (re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text),)
    values = json.loads(text)
    if not all(isinstance(value, str) and value for value in values):
        raise ValueError(text)
    "".join(values).encode("utf-8")
    return tuple(values)


def _name(text: str, folder: str) -> str:
    """The beginning of a file's name: it must not lead out of its folder, nor hide it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", text.strip()):
        raise ValueError(text)
    return text.strip()


def _layers(text: str, _folder: str) -> str:
    """Names of layers joined by commas, in their own order."""
    names = [name.strip() for name in text.split(",")]
    if not names or not set(names) <= set(LAYERS):
        raise ValueError(text)
    return ",".join(name for name in LAYERS if name in names)


def _blocks(text: str, _folder: str) -> str:
    """Numbers joined by commas, each once, in order."""
    numbers = sorted(_integer(word.strip()) for word in text.split(","))
    if numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return ",".join(map(str, numbers))


FORMS: dict[str, Callable[[str, str], Any]] = {
    **{"path": _path, "paths": _paths, "source": _source, "hub": _hub, "list": _list, "name": _name, "layers": _layers},
    **{"blocks": _blocks},
}
PARSERS: dict[type, Callable[[str], Any]] = {bool: _boolean, int: _integer, float: _number, str: str}
NOUNS: dict[Any, str] = {
    **{bool: "true or false", int: "a whole number", float: "a number", str: "text in UTF-8", "path": "a path"},
    **{"paths": "a path, or several joined by commas"},
    **{"source": "files, folders, globs, an https URL or tinyshakespeare", "hub": "a hub name or a folder"},
    **{"list": 'text, or a JSON list like ["a", "b"]', "name": "up to 40 letters, digits, `_`, `.` and `-`"},
    **{"layers": f"some of {', '.join(LAYERS)}, joined by commas"},
    **{"blocks": "different whole numbers from 0, joined by commas"},
}


def _kind(variable: Field[Any]) -> type:
    """bool, int, float or str: the type without None and words."""
    kind: Any = variable.type
    return (get_args(kind) or (kind,))[0]


def expected(variable: Field[Any]) -> str:
    """What a variable takes, in words."""
    rules = variable.metadata
    if rules["choices"]:
        return "one of " + ", ".join(rules["choices"])
    limits = [f"{word} {rules[limit]}" for limit, (word, _) in LIMITS.items() if rules[limit] is not None]
    value = " ".join([NOUNS[rules["form"] or _kind(variable)], " and ".join(limits)]).strip()
    return f"{', '.join(rules['words'])} or {value}" if rules["words"] else value


def _refusal(variable: Field[Any], value: object, source: str) -> str:
    if isinstance(value, int) and abs(value) > BIGGEST:  # Python refuses to print the very large ones
        value = shown = f"(a number of {value.bit_length()} bits)"
    else:
        shown = _clipped(repr(value))
    digits = str(value).strip()
    limit = " below 2**63" if _kind(variable) is int and digits.isdecimal() and int(digits[:40]) > BIGGEST else ""
    options = variable.metadata["choices"] + variable.metadata["words"]
    hint = "".join(f"; did you mean {close}?" for close in difflib.get_close_matches(str(value).lower(), options, 1))
    return f"{variable.name.upper()}={shown} ({source}): expected {expected(variable)}{limit}{hint}"


# Showing settings


def as_env(config: Config) -> str:
    """The settings as the text of an env file that, given as ENV_FILE, sets them all again."""
    lines = ["# The settings of a run, to be used again: ENV_FILE=path/of/this/file python3 training.py"]
    for name in VARIABLES:
        text = "" if name == "ENV_FILE" else _text(getattr(config, name.lower()))
        lines.append(f"{name}={_quoted(text)}" if text else f"# {name}=")
    return "\n".join(lines) + "\n"


def describe(config: Config) -> list[str]:
    """A few lines on the settings that differ from their defaults, each with its source."""
    values = {name: getattr(config, name.lower()) for name in VARIABLES}
    usual = _defaults(values)
    changed = [name for name in VARIABLES if values[name] != usual[name]]
    said = [f"{name}={_short(values[name])} ({config.sources[name]})" for name in changed]
    text = "non-default settings: " + (", ".join(said) or "none")
    return textwrap.wrap(_printable(text), 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _text(value: Any) -> str:
    """A value as an environment variable would hold it; empty is not set."""
    if value is None or value == ():
        return ""
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-").removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    """`text` so that python-dotenv reads exactly it back: there is no escape for ${, but a nameless default will do."""
    if re.fullmatch(r"[\w./:@%+,-]*", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return '"' + escaped.replace("${", "${:-$}{") + '"'


def _short(value: Any) -> str:
    """A value for one line: bare if it is plain, else quoted and clipped."""
    text = _text(value)
    return text if re.fullmatch(r"[\w./:@%+,*-]+", text) else _clipped(repr(text))


def _clipped(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _printable(text: str) -> str:
    """`text` with control characters and lone surrogates spelled out: values of anybody's reach a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def default_text(name: str) -> str:
    """The default of a variable in words, for every model where they differ."""
    rows = {model: row[name.lower()] for model, row in DEFAULTS_BY_MODEL.items() if name.lower() in row}
    by_model = ", ".join(f"{model} {_text(value) or 'its own'}" for model, value in rows.items())
    return by_model or _text(VARIABLES[name].default)


def _meaning(name: str) -> str:
    return f"{VARIABLES[name].metadata['doc']}. Takes {expected(VARIABLES[name])}."


def _groups() -> Iterator[tuple[str, list[str]]]:
    """The groups of variables in the order of their declaration."""
    for group in dict.fromkeys(each.metadata["group"] for each in VARIABLES.values()):
        yield group, [name for name, each in VARIABLES.items() if each.metadata["group"] == group]


def help_text(script: str) -> str:
    """What --help prints."""
    lines = [f"usage: [NAME=value ...] python3 {script}", "Settings are environment variables, or lines of .env."]
    for group, names in _groups():
        lines += ["", group]
        for name in names:
            lines.append(f"  {name}  (default: {default_text(name) or 'not set'})")
            lines += textwrap.wrap(_meaning(name), 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def env_example() -> str:
    """The text of .env.example: every variable with its default, commented out."""
    lines = ["# Copy this file to .env, remove the # before a setting and change it. Made by: python3 config.py"]
    for group, names in _groups():
        lines += ["", f"# --- {group} ---"]
        for name in names:
            by_model = f" Default: {default_text(name)}." if name.lower() in BY_MODEL else ""
            lines += textwrap.wrap(_meaning(name) + by_model, 118, initial_indent="# ", subsequent_indent="# ")
            lines.append(f"#{name}={_quoted(_text(VARIABLES[name].default))}")
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The text of docs/configuration.md."""
    lines = [INTRODUCTION]
    for group, names in _groups():
        lines += [f"## {group}", "", "| Variable | Default | Takes | On going on | Meaning |", "| --- " * 5 + "|"]
        for name in names:
            rules = VARIABLES[name].metadata
            cells = [f"`{name}`", default_text(name) or "not set", expected(VARIABLES[name])]
            lines.append("| " + " | ".join([*cells, SCOPES[rules["scope"]], rules["doc"]]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """# Configuration

Every setting is an environment variable, or a line of the file `.env` in the repository. Scripts take no argument but
`--help`. This page is written by `python3 config.py`; `.env.example` holds the same list to start from.

- The process environment comes first, then `.env`, then the default. `ENV_FILE=other.env` reads that file instead, and
  `PYTHON_DOTENV_DISABLED=1` none. The first lines of a run say where each setting that is not a default came from.
- An empty value counts as unset. Switches take true, false, 1, 0, yes, no, on and off. Whole numbers may be written
  `5_000` or `1e4`. In an env file, `${NAME}` stands for another variable.
- Paths that are given are relative to the current folder, defaults to the repository.
- All mistakes are reported together, and the exit code is 2. In the env file every unknown name is one. In the process
  environment only a name of 8 letters or more with an underscore is, if it nearly is a variable here (difflib's ratio
  is at least 0.9), such as `CHECKPOINT_INTERVALS`.
- "On going on" says what `RESUME` and `MODE=resume` do with a setting. "must match": `RESUME=auto` takes only a
  checkpoint that shares it. "saved": taken from the checkpoint when not given. "saved, else a fork": so too, and a new
  value starts a child run, as it changes the trained weights. "as given": never taken from a checkpoint.
- The variables of others keep their meaning, and may stand in the env file too: `CUDA_VISIBLE_DEVICES`,
  `OMP_NUM_THREADS`, `HF_HOME`, `HF_HUB_OFFLINE`, `TIKTOKEN_CACHE_DIR`, `NO_COLOR`, `TQDM_DISABLE` and such.
  `DEBUG=1` shows the traceback of an error.
"""


# The door


def door(argv: Sequence[str]) -> Config:
    """What every script calls first, with sys.argv: the settings; else help (exit 0) or what is wrong (exit 2)."""
    _take_no_arguments(argv)
    try:
        return read()
    except ConfigError as error:
        if debug():
            raise
        _say(str(error), sys.stderr)
        raise SystemExit(2) from None


def _say(text: str, stream: TextIO) -> None:
    """Prints what every process that torchrun starts would print: the first one of each machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=stream, flush=True)


def _take_no_arguments(argv: Sequence[str]) -> None:
    if {"-h", "--help"}.intersection(argv[1:]):
        try:
            _say(help_text(argv[0]), sys.stdout)
        except BrokenPipeError:  # as by `| head`; without this, Python complains once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if argv[1:]:
        _say(_printable(_instead_of(argv)), sys.stderr)
        raise SystemExit(2)


def _instead_of(argv: Sequence[str]) -> str:
    """The sentence that refuses arguments, with the variables that were probably meant."""
    script, *rest = argv
    settings, unknown = [], []
    while rest:
        argument = rest.pop(0)
        word, equals, value = argument.partition("=")
        named = bool(equals) or argument.startswith("-")
        name = _meant(word.lstrip("-")) if named else OTHER_WORDS.get(Path(argument).suffix)
        if named and not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ("auto" if name == "RESUME" else "true")
        settings += [f"{name}={shlex.quote(value if named else argument)}"] if name else []
        unknown += [] if name else [argument]
    use = f"use {' '.join(settings)} python3 {script}" if settings else f"python3 {script} --help lists them"
    about = f" ({' '.join(unknown)} is none of them)" if unknown else ""
    return f"{script} takes no arguments, settings are environment variables{about}: {use}"


def debug() -> bool:
    """Whether errors show their traceback: DEBUG is exactly 1, as others use the name too."""
    return os.environ.get("DEBUG") == "1"


def torchrun() -> dict[str, int]:
    """What torchrun tells each process that it starts: its rank and their number, in all and on this machine. Empty without it.

    Raises ConfigError if a part of it is missing or no number: other programs set some of these names too.
    """
    wanted = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    if os.environ.get("WORLD_SIZE", "1").strip() in ("", "1"):
        return {}
    names = [*wanted.values(), "MASTER_ADDR", "MASTER_PORT"]
    if wrong := [name for name in names if not os.environ.get(name)] or [
        name for name in wanted.values() if not os.environ[name].isdecimal()
    ]:
        size = os.environ["WORLD_SIZE"]
        raise ConfigError(
            [f"WORLD_SIZE={size:.20} without a valid {', '.join(wrong)}: start with torchrun, or unset WORLD_SIZE"]
        )
    return {field: int(os.environ[name]) for field, name in wanted.items()}


def same_everywhere(config: Config) -> dict[str, Json]:
    """What the processes of one training must have in common: all but where things lie on their machines."""
    return {name: getattr(config, name.lower()) for name in VARIABLES if name not in MACHINE_S_OWN}


def threads_left_at_one() -> bool:
    """Whether OMP_NUM_THREADS is 1, as torchrun leaves it if nobody sets it."""
    return os.environ.get("OMP_NUM_THREADS") == "1"


def restarts() -> int:
    """How often torchrun starts the processes anew if one fails (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)


def restarted() -> bool:
    """Whether torchrun has started the processes before, and one of them failed."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") != "0"


def wandb_wishes() -> dict[str, str]:
    """Mode and project of Weights & Biases: its own variables', else offline, so that it never asks for a login, and `milepost`."""
    usual = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return {"mode": os.environ.get("WANDB_MODE") or usual, "project": os.environ.get("WANDB_PROJECT") or "milepost"}


def colour_unwanted() -> bool:
    """Whether NO_COLOR (https://no-color.org) or a terminal without any asks for none."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def tqdm_disabled() -> bool:
    """Whether TQDM_DISABLE asks for no progress bar; tqdm itself takes any text, 0 included, for yes."""
    text = os.environ.get("TQDM_DISABLE", "").strip().lower()
    return bool(text) and BOOLEANS.get(text, True)


def main(argv: Sequence[str]) -> None:
    """Writes the two generated files anew."""
    _take_no_arguments(argv)
    for name, text in ((".env.example", env_example()), ("docs/configuration.md", reference())):
        (ROOT / name).write_text(text, encoding="utf-8", newline="\n")
        print(f"wrote {name}")


if __name__ == "__main__":
    main(sys.argv)
