"""Every setting of the project, declared once: name, type, default, limits and one line of documentation.

To add a setting, add a field to `Config`, and run `python3 -m milepost.config`, which writes .env.example and
docs/configuration.md.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal

from milepost.registry import layouts_to_save
from milepost.runtime.optimizers import OPTIMIZERS
from milepost.runtime.schedule import SCHEDULES
from milepost.runtime.trackers import TRACKERS
from milepost.screen import harmless
from milepost.text.registry import TOKENIZERS
from models import MODELS

Json = str | int | float | bool | None


# Options of an adapter, which mean nothing unless LORA_RANK or TTT_LAYERS turns it on.
LORA_OPTIONS = ("LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGETS")
TTT_OPTIONS = ("TTT_BASE_LR", "TTT_MINI_BATCH_SIZE", "TTT_INITIAL_GATING_ALPHA")

LAYOUTS = layouts_to_save()
MAX_INT = 2**63 - 1  # the largest seed of torch's generators; no count comes near it
ALLOW_BLANK = ("PROMPT", "STOP")  # white space is a value of these

ADDRESS_FORMS = ("source", "address", "folder", "paths")  # of values that may hold addresses, shown without passwords
SECRET_FORMS = ("secret", "webhook")  # whose values are neither stored nor shown
DERIVED_SOURCES = ("default", "checkpoint")  # of values that the user did not set
DIRECT_SOURCES = ("environment", "argument")  # of values set for this very run; argument: a keyword in Python
DATA_VARIABLES = (
    "TRAINING_DATA_SOURCE",
    "TEXT_FIELD",
    "DOCUMENT_SEPARATOR",
    "PROMPT_FIELD",
    "ANSWER_FIELD",
    "VALIDATION_FRACTION",
    "VALIDATION_DATA",
)

# May differ between machines that train together: places on their disks, and files that training never reads. The text and the base of
# adapters are compared by hash.
PER_MACHINE = (
    "DEVICE", "ENV_FILE", "TRAINING_DATA_SOURCE", "VALIDATION_DATA", "BASE_CHECKPOINT", "CHECKPOINT_DIR",
    "CHECKPOINT_FALLBACK_DIR", "RUNS_DIR", "NOTIFY_URL", "PROMPT_FILE", "EVAL_DATA", "BENCHMARK_DATA", "COMPARE_WITH", "OUTPUT",
    "PORT", "SERVE_HOST", "API_KEY",
)  # fmt: skip

DEFAULT_MODEL = "bigram"
BY_MODEL = MODELS[DEFAULT_MODEL].defaults

# fmt: off
# Ten times the learning rate of full fine-tuning (Schulman et al. 2025, "LoRA without regret").
LORA_DEFAULTS = {"learning_rate": 5e-4, "optimizer": "adamw"}

# A model's `adamw_learning_rate` holds up to this N_EMBD; above, it falls as 1 / N_EMBD (Yang et al. 2022, arXiv 2203.03466).
ADAMW_N_EMBD = 128

# Muon is the default from this many tokens per step and unit of N_EMBD; below, orthogonalizing costs more time than it saves in steps.
MUON_MIN_TOKENS = 10

SCOPES = {  # scope -> what a resume does with the setting
    "identity": "must match",      # RESUME=auto takes only a checkpoint with the same value
    "math": "saved, else a child run",  # changes the trained weights: a new value starts a child run
    "habit": "saved",              # changes no weight; taken from the checkpoint unless set
    "session": "as set",           # never taken from a checkpoint
}
# fmt: on


class ConfigError(Exception):
    """Invalid settings: one sentence per mistake in `problems`. Exit code 2."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = [harmless(problem, one_line=True) for problem in problems]
        super().__init__("\n".join(self.problems))


# fmt: off
def var(default: Any, doc: str, *, group: str, scope: str = "session", form: str = "", choices: Collection[str] = (),
        words: tuple[str, ...] = (), minimum: float | None = None, above: float | None = None,
        maximum: float | None = None, below: float | None = None, needs: str = "") -> Any:
    """Declare a variable. `words` are accepted besides values of its type and its `choices`; `form` names its parser in parse.FORMS.

    `choices` may be a registry: what is added to it later is accepted too. `needs` is a condition of effects.py on other
    variables, without which this one has no effect.
    """
    return field(default=default, metadata={
        "doc": doc, "group": group, "scope": scope, "form": form, "choices": choices, "words": words,
        "minimum": minimum, "above": above, "maximum": maximum, "below": below, "needs": needs})
# fmt: on


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The resolved settings: one field per variable, in lower case. None means "not set". `read()` builds it."""

    # fmt: off
    training_data_source: str = var("data/dear_wren.md", "text to train on: a file (.txt .md .jsonl .json .csv .tsv, each also .gz or .zst, .parquet .arrow, source code, .bin of nanoGPT or llm.c), folder, glob, "
        "code: and a folder of source code, https URL, hf://datasets/owner/name, the named set tinyshakespeare, or several joined by commas; with weights, as in a.txt*3,b.txt*1, a mixture",
        group="Data", scope="identity", form="source")
    text_field: str = var("text", "column of a CSV, or member of each JSON object, that holds the text",
        group="Data", scope="identity")
    prompt_field: str | None = var(None, "column or member that holds the question of each row, which is then a conversation; not set: rows with messages, with "
        "prompt and completion, or with instruction and output are conversations", group="Data", scope="identity")
    answer_field: str | None = var(None, "column or member that holds the answer to PROMPT_FIELD; not set: completion",
        group="Data", scope="identity")
    document_separator: str | None = var(None, "text that ends a document within a .txt or .md file, such as <|endoftext|>: the tokenizer's "
        "end-of-text token takes its place; not set: each file is a document", group="Data", scope="identity")
    tokenizer: str = var("auto", "auto is gpt2 with GPT2_MODEL_NAME, else char for up to 256 different characters, else bpe",
        group="Data", scope="identity", words=("auto",), choices=TOKENIZERS)
    bpe_vocab_size: int = var(1024, "vocabulary size of a BPE trained on the text; small, so that a small model sees each token often",
        group="Data", scope="identity", minimum=257, maximum=1_000_000, needs="TOKENIZER=auto|bpe|sentencepiece")
    validation_fraction: float = var(0.1, "fraction of the text, taken from its end, held out for validation",
        group="Data", scope="identity", minimum=0, below=1)
    validation_data: str | None = var(None, "text to validate on, in the forms of TRAINING_DATA_SOURCE, which is then trained on whole; not set: VALIDATION_FRACTION of it",
        group="Data", scope="identity", form="source")
    unknown_characters: str = var("refuse", "what to do with characters of a new text or prompt that the vocabulary of a char tokenizer lacks; "
        "replace takes a character such as ?; how many there are is logged", group="Data", scope="habit", choices=("refuse", "skip", "replace"), needs="TOKENIZER=auto|char|sentencepiece")
    loss_on: str = var("answers", "tokens of conversations that the model learns to write: those of the assistant, or all",
        group="Data", scope="math", choices=("answers", "all"))
    packing: bool = var(True, "put several conversations into each window of BLOCK_SIZE tokens, none of which sees another; false pads one to it",
        group="Data", scope="math")
    env_file: str | None = var(None, "file of settings to read instead of the repository's .env; only from the process environment",
        group="Data", form="path")

    model_type: str = var(DEFAULT_MODEL, "bigram trains in seconds, gpt2 and llama in minutes",
        group="Model", scope="identity", choices=MODELS)
    gpt2_model_name: str | None = var(None, "pretrained weights to start from, with MODEL_TYPE=gpt2: gpt2, gpt2-medium, gpt2-large, gpt2-xl, "
        "another hub name, or a Hugging Face folder", group="Model", scope="identity", form="hub")
    pretrained: str | None = var(None, "model of the hub to start from, whose kind, sizes and tokenizer the run takes over: owner/name, such as "
        "HuggingFaceTB/SmolLM2-135M, also with @ and a branch, a tag or a commit; its commit is recorded", group="Model", scope="identity", form="hub_model")
    n_layer: int | None = var(4, "transformer blocks; 4 with N_EMBD=128 have 0.8 million parameters, 3 MB, and train in "
        "minutes on a CPU; pretrained weights bring their own", group="Model", scope="identity", minimum=1)
    n_head: int | None = var(4, "attention heads per block; must divide N_EMBD",
        group="Model", scope="identity", minimum=1)
    n_embd: int | None = var(128, "embedding dimension",
        group="Model", scope="identity", minimum=1)
    n_kv_head: int | None = var(None, "heads of keys and values of a llama; must divide N_HEAD; fewer make its cache smaller; not set: N_HEAD",
        group="Model", scope="identity", minimum=1)
    n_inner: int | None = var(None, "width of the MLP of a llama; not set: 8/3 of N_EMBD, which has as many parameters as GPT-2's",
        group="Model", scope="identity", minimum=1)
    block_size: int = var(BY_MODEL["block_size"], "context length in tokens; pretrained GPT-2 allows 1024, which is slow on a laptop",
        group="Model", scope="identity", minimum=1)
    dropout: float = var(0.0, "dropout probability, against overfitting; a small model needs none in its first epochs, "
        "and trains faster without", group="Model", scope="math", minimum=0, below=1)
    bias: bool = var(True, "biases in linear layers and layer norms, as published", group="Model", scope="identity")

    lora_rank: int = var(0, "rank of the LoRA adapters; the base of PRETRAINED, GPT2_MODEL_NAME or INIT_FROM is frozen and only adapters train; "
        "8 is usual; 0 = no adapters", group="Adapters", scope="identity", minimum=0)
    lora_alpha: float = var(16.0, "scale of the adapters: their output is multiplied by LORA_ALPHA / LORA_RANK", group="Adapters",
        scope="identity", above=0)
    lora_dropout: float = var(0.0, "dropout probability of the adapters' inputs", group="Adapters",
        scope="identity", minimum=0, below=1)
    lora_targets: str = var("c_attn,c_proj,c_fc", "layers with adapters, joined by commas; all of the model's unless set. c_attn is query, key "
        "and value in one, c_proj is in attention and in the MLP", group="Adapters", scope="identity", form="layers")
    ttt_layers: str | None = var(None, "blocks of a GPT-2, counted from 0, with a TTT layer, which learns while it reads, like 1,5,10; "
        "not set: none", group="Adapters", scope="identity", form="blocks")
    ttt_base_lr: float = var(1.0, "inner learning rate of a TTT layer, before the trained factor",
        group="Adapters", scope="identity", above=0)
    ttt_mini_batch_size: int = var(16, "tokens per inner update of a TTT layer: more is faster, fewer follow the text more closely; 16 as "
        "published", group="Adapters", scope="identity", minimum=1)
    ttt_initial_gating_alpha: float = var(0.1, "initial gate of a TTT layer: its output is multiplied by tanh of this, which training "
        "changes; 0 starts as the model without the layer", group="Adapters", scope="identity")
    checkpoint_adapters_only: bool = var(False, "freeze the base and save only the adapters: a hundredth of the bytes; opening such a "
        "checkpoint needs its base and refuses another", group="Adapters", scope="identity")
    base_checkpoint: str | None = var(None, "checkpoint of the base, for a checkpoint that holds only adapters; GPT2_MODEL_NAME names a "
        "pretrained base", group="Adapters", form="folder", words=("latest", "best"))

    training_steps: int = var(BY_MODEL["training_steps"], "optimizer steps in total, including those of an interrupted run",
        group="Training", scope="math", minimum=1)
    batch_size: int = var(BY_MODEL["batch_size"], "sequences of BLOCK_SIZE tokens per micro-batch, of all processes together; the default "
        "fits a laptop's memory", group="Training", scope="math", minimum=1)
    gradient_accumulation_steps: int = var(1, "micro-batches per optimizer step: a larger batch in the same memory",
        group="Training", scope="math", minimum=1)
    learning_rate: float = var(BY_MODEL["learning_rate"], "peak learning rate; with MODEL_TYPE=gpt2 OPTIMIZER=adamw the default is 3e-3 up to "
        "N_EMBD=128 and falls as 1 / N_EMBD, with LORA_RANK it is 5e-4", group="Training", scope="math", above=0)
    min_learning_rate: float | None = var(None, "learning rate at the end of the schedule; not set: 0 for linear, else a tenth of "
        "LEARNING_RATE, as for GPT-3", group="Training", scope="math", minimum=0, needs="LR_SCHEDULE!=constant")
    warmup_steps: int = var(BY_MODEL["warmup_steps"], "optimizer steps of linear warm-up to LEARNING_RATE, while Adam's averages fill; the "
        "default is at most a tenth of TRAINING_STEPS", group="Training", scope="math", minimum=0)
    lr_schedule: str = var(BY_MODEL["lr_schedule"], "learning-rate schedule after the warm-up; wsd is constant and decays at the end; linear "
        "decays to zero, which learns most from few steps", group="Training", scope="math", choices=SCHEDULES)
    optimizer: str = var(BY_MODEL["optimizer"], "muon orthogonalizes the updates of hidden matrices and leaves the rest to AdamW: fewer "
        "steps, but below 10 x N_EMBD tokens per step it costs more than it saves, and adamw is the default",
        group="Training", scope="math", choices=OPTIMIZERS)
    weight_decay: float = var(0.1, "decoupled weight decay, on matrices only; 0.1 as for GPT-3",
        group="Training", scope="math", minimum=0)
    beta1: float = var(0.9, "decay rate of Adam's first moment",
        group="Training", scope="math", minimum=0, below=1)
    beta2: float = var(0.99, "decay rate of Adam's second moment; above GPT-3's 0.95 because small batches are noisy",
        group="Training", scope="math", minimum=0, below=1)
    grad_clip: float = var(1.0, "maximum norm of the gradient; 0 = no clipping",
        group="Training", scope="math", minimum=0)

    eval_interval: int = var(250, "optimizer steps between validations; 0 = only at the end",
        group="Logging", scope="habit", minimum=0)
    eval_steps: int = var(20, "batches per validation, always the same; 0 = the whole validation text",
        group="Logging", scope="habit", minimum=0)
    sample_interval: int | None = var(None, "optimizer steps between text samples, saved in the run's folder; not set: EVAL_INTERVAL, except "
        "at step 0; 0 = only at the end", group="Logging", scope="habit", minimum=0)
    log_interval: int = var(10, "optimizer steps between lines of metrics.jsonl",
        group="Logging", scope="habit", minimum=1)
    run_name: str | None = var(None, "name of a new run, which its folder, its checkpoints' metadata, lists and plots show, and RUN takes; not set: "
        "model and text", group="Logging", form="name")
    run_note: str | None = var(None, "a note on the run, such as what it is to show; its checkpoints, lists and plots carry it",
        group="Logging", scope="habit")
    tracker: str = var("none", "also send the metrics to this tracker (pip install it first); never asks for a login: wandb logs offline unless "
        "WANDB_API_KEY or WANDB_MODE is set", group="Logging", scope="habit", words=("none",), choices=TRACKERS)
    notify_url: str | None = var(None, "webhook to notify when a training resumes, ends, fails or cannot be saved: of Slack, Discord or ntfy, or any server "
        "that takes JSON; stored nowhere", group="Logging", form="webhook")

    seed: int = var(1337, "seed of the initial weights, the data order and dropout; 1337 as in nanoGPT",
        group="Hardware and seed", scope="math", minimum=0)
    device: str = var("auto", "auto takes cuda, else mps, else cpu; gpu takes cuda or mps; CUDA_VISIBLE_DEVICES selects among several GPUs",
        group="Hardware and seed", choices=("auto", "cpu", "cuda", "mps", "gpu"))
    distributed: str = var("auto", "how the processes of torchrun share the work: ddp, a full model in each; fsdp, weights sharded over all; "
        "auto takes fsdp only if model and optimizer do not fit otherwise", group="Hardware and seed", choices=("auto", "ddp", "fsdp"))
    dtype: str = var("auto", "dtype of matrix products; trained weights stay float32; auto is bfloat16 where that is fast",
        group="Hardware and seed", scope="math", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = var("auto", "torch.compile the training step; auto compiles on cuda where that saves time",
        group="Hardware and seed", scope="math", choices=("auto", "true", "false"))
    deterministic: bool = var(True, "use deterministic kernels, so that a resumed run ends bit-identical to an uninterrupted one",
        group="Hardware and seed", scope="math")
    device_check: bool = var(True, "before training, generating or evaluating on a device other than the CPU, compare what it computes with the CPU, on a sample; "
        "false goes on without", group="Hardware and seed")
    replay_check_interval: int = var(1000, "optimizer steps between those that are taken twice from the same state and must be equal bit for bit, "
        "which shows a device or memory that errs now and then; 0 = none", group="Hardware and seed", scope="habit", minimum=0)

    enable_checkpoints: bool = var(False, "save checkpoints while training", group="Checkpoints", scope="habit")
    checkpoint_interval: int = var(500, "optimizer steps between checkpoints; 0 = only at the end",
        group="Checkpoints", scope="habit", minimum=0)
    checkpoint_dir: str = var("checkpoints", "folder of the checkpoints; for scripts that only read them, also the address of a mirror",
        group="Checkpoints", form="folder")
    checkpoint_fallback_dir: str | None = var(None, "folder on another disk, for the last step if it cannot be saved in CHECKPOINT_DIR; "
        "RESUME=auto looks there too", group="Checkpoints", form="path")
    checkpoint_mirror: str | None = var(None, "address of a store that gets a copy of each checkpoint, such as s3://bucket/path or file:///path; "
        "RESUME=auto looks there too", group="Checkpoints", form="address")
    mirror_keep_last: int = var(0, "latest checkpoints to keep per run in CHECKPOINT_MIRROR, besides its final one and those of best/; 0 = all",
        group="Checkpoints", minimum=0, needs="CHECKPOINT_MIRROR")
    mirror_mb_s: float = var(0.0, "megabytes per second sent to CHECKPOINT_MIRROR at most; 0 = any number",
        group="Checkpoints", minimum=0, needs="CHECKPOINT_MIRROR")
    checkpoint_layout: str = var("unified", "file layout of checkpoints; a resumed run keeps its layout",
        group="Checkpoints", choices=LAYOUTS)
    checkpoint_model_only: bool = var(False, "leave the optimizer out: a third of the bytes (half with muon), but no bit-exact resume",
        group="Checkpoints", scope="habit")
    checkpoint_prefix: str = var("checkpoint", "prefix of checkpoint names; models are kept apart by CHECKPOINT_DIR, not by it", group="Checkpoints", scope="habit", form="name")
    checkpoint_keep_last: int = var(0, "latest checkpoints to keep per run, besides its final one; 0 = all",
        group="Checkpoints", scope="habit", minimum=0)
    checkpoint_keep_every: int = var(0, "of those older than CHECKPOINT_KEEP_LAST, keep multiples of this many optimizer steps, without "
        "their optimizer; 0 = none", group="Checkpoints", scope="habit", minimum=0)
    checkpoint_keep_best: int = var(1, "checkpoints of lowest validation loss to keep per run, in best/; 0 = none",
        group="Checkpoints", scope="habit", minimum=0, needs="VALIDATION_FRACTION!=0 or VALIDATION_DATA")
    checkpoint_async: bool = var(True, "write checkpoints in the background from a copy in memory; the bytes are the same",
        group="Checkpoints")
    runs_dir: str = var("runs", "folder of the runs: metrics, log, resolved settings, samples",
        group="Checkpoints", form="path")

    resume: str = var("never", "auto resumes from the latest matching checkpoint of CHECKPOINT_DIR, or starts a new run; a path, an address in a mirror, "
        "latest or best resumes from that checkpoint", group="Resuming", form="folder", words=("never", "auto", "latest", "best"))
    resume_step: int | None = var(None, "resume from the checkpoint of this optimizer step instead of the latest",
        group="Resuming", minimum=0)
    init_from: str | None = var(None, "checkpoint whose weights and tokenizer start a new run at step 0, with a fresh optimizer",
        group="Resuming", form="folder", words=("latest", "best"))
    resume_training_steps: int = var(5000, "optimizer steps that MODE=resume adds; 0 prints the plan and stops",
        group="Resuming", minimum=0, needs="MODE=resume")
    resume_learning_rate: float | Literal["keep"] = var(3e-4, "peak learning rate of the added steps; keep = the saved schedule",
        group="Resuming", words=("keep",), above=0, needs="MODE=resume")

    mode: str = var("inference", "what scripts/load_checkpoint.py does: generate text, or train further",
        group="Generation", choices=("inference", "resume"))
    checkpoint_path: str = var("latest", "checkpoint to open: a file, folder or glob, latest or best of CHECKPOINT_DIR, or in a mirror, as s3://bucket/path/latest; scripts that "
        "take several accept a list joined by commas, a whole folder, or every match of a glob; scripts/serve_checkpoint.py also name=path", group="Generation", form="paths",
        words=("latest", "best"))
    prompt: str | None = var(None, "text to continue; not set: start from nothing", group="Generation")
    prompt_file: str | None = var(None, "file with the prompt; - is standard input",
        group="Generation", form="path", words=("-",))
    raw_prompt: bool = var(False, "continue PROMPT as it is; else a model with a chat template takes it as a question and answers",
        group="Generation")
    max_new_tokens: int = var(300, "maximum number of tokens to generate", group="Generation", minimum=1)
    temperature: float = var(0.8, "0 takes the most likely token, 1 samples as trained; 0.8 as in nanoGPT: small models ramble at 1",
        group="Generation", scope="habit", minimum=0)
    top_k: int = var(200, "sample from this many most likely tokens; 0 = all; 200 as in nanoGPT cuts the long tail of a large vocabulary",
        group="Generation", scope="habit", minimum=0, needs="TEMPERATURE!=0")
    top_p: float = var(1.0, "sample from the most likely tokens that hold this probability; 1 = all", group="Generation", scope="habit", above=0, maximum=1, needs="TEMPERATURE!=0")
    repetition_penalty: float = var(1.0, "above 1 makes tokens that occurred before less likely; 1 = off, as small vocabularies must repeat",
        group="Generation", scope="habit", above=0)
    stop: tuple[str, ...] = var((), r"text that ends the generation and is not shown, with \n, \t and \\ as escapes; several as a JSON list",
        group="Generation", form="list")
    num_samples: int = var(1, "texts to generate", group="Generation", minimum=1)
    sample_seed: int | None = var(None, "seed of the generation, and of its first token where there is no prompt; not set: random, and printed",
        group="Generation", minimum=0, needs="TEMPERATURE!=0 or not PROMPT")
    quantize: str = var("none", "int8 stores a GPT-2's matrices in 8 bits to generate faster on a CPU; perplexity changes by less than 1 %",
        group="Generation", choices=("none", "int8"))
    speculate: str = var("none", "lookup decodes speculatively from n-grams that occurred before: the same text, faster where it repeats "
        "itself", group="Generation", choices=("none", "lookup"))
    stream: bool = var(True, "print text while it is generated", group="Generation")

    eval_type: str = var("standard", "what scripts/evaluate_checkpoint.py measures: standard is loss, perplexity and bits per byte on "
        "EVAL_DATA, benchmark the accuracy on BENCHMARK_DATA", group="Evaluation", choices=("standard", "benchmark", "both"))
    eval_data: str | None = var(None, "text to evaluate on, in the forms of TRAINING_DATA_SOURCE; not set: the validation text of each "
        "checkpoint", group="Evaluation", form="source", needs="EVAL_TYPE=standard|both")
    eval_stride: int = var(0, "tokens between the starts of evaluated windows; 0 = BLOCK_SIZE; fewer give each token more context and take "
        "longer", group="Evaluation", minimum=0, needs="EVAL_TYPE=standard|both")
    benchmark_data: str | None = var(None, "files of questions (.jsonl .csv): HellaSwag, minimal pairs such as BLiMP, story cloze",
        group="Evaluation", form="source", needs="EVAL_TYPE=benchmark|both")

    format: str = var("text", "what scripts that list, inspect, verify, evaluate and prune print on stdout: tables, or one JSON object whose "
        "fields docs/checkpoints.md describes", group="Tools", choices=("text", "json"))
    sort: str = var("saved", "order in which scripts/list_checkpoints.py lists, the highest last; loss lists the lowest last",
        group="Tools", choices=("saved", "step", "loss", "size", "name"))
    run: str = var("latest", "runs that scripts/plot_run.py draws: a run's name or its beginning, a glob of names, a run's folder, latest, or "
        "several joined by commas. Of scripts/list_checkpoints.py, the runs to list; not set: all", group="Tools")
    compare_with: str | None = var(None, "checkpoint that scripts/inspect_checkpoint.py compares CHECKPOINT_PATH with",
        group="Tools", form="folder", words=("latest", "best"))
    replay: bool = var(False, "scripts/verify_checkpoint.py trains again from the previous checkpoint and compares every byte",
        group="Tools")
    cache_gb: float = var(20.0, "GB that checkpoints of mirrors may take in the user's folder of caches; the least recently used are deleted first",
        group="Tools", above=0)
    convert_to: str | None = var(None, "what scripts/convert_checkpoint.py writes: a checkpoint layout, or an export for another program, "
        "from which no run resumes bit-exactly; not set: CHECKPOINT_LAYOUT", group="Tools", choices=(*LAYOUTS, "gguf", "nanogpt", "lecture", "peft"))
    gguf_type: str = var("f16", "dtype of the matrices that CONVERT_TO=gguf writes; q8_0 has half the bytes of f16 and is nearly as good",
        group="Tools", choices=("f32", "f16", "q8_0"), needs="CONVERT_TO=gguf")
    output: str | None = var(None, "folder or file that scripts/convert_checkpoint.py writes; not set: beside the checkpoint, or exports/ for an "
        "export; required for a whole folder. File that scripts/plot_run.py draws into (.html .png .svg .pdf) instead of the terminal, and that "
        "scripts/compare_samples.py (.json .md) and scripts/evaluate_checkpoint.py (.json) write", group="Tools", form="path")
    prune_others: str | None = var(None, "beginnings of the names of other programs' checkpoint files, joined by commas, to which "
        "scripts/prune_checkpoints.py applies the policy too: ckpt_ for ckpt_1000.pt, ckpt_2000.pt, ...; not set: they stay", group="Tools")
    dry_run: bool = var(True, "scripts/prune_checkpoints.py only lists what it would delete, scripts/publish_checkpoint.py and a run with PUSH_TO_HUB only "
        "show what they would upload", group="Tools")
    push_to_hub: str | None = var(None, "model on the Hugging Face hub to which a finished run uploads its last checkpoint, or scripts/publish_checkpoint.py "
        "any: owner/name",
        group="Tools", form="hub_name")
    hub_private: bool = var(True, "publish to a private model; false to a public one", group="Tools")

    port: int = var(8000, "TCP port that scripts/serve_checkpoint.py and scripts/watch_runs.py listen on; 0: any free one, which is logged",
        group="Serving", minimum=0, maximum=65535)
    serve_host: str = var("127.0.0.1", "address or host name that they listen on; 0.0.0.0: all of this machine, so that others reach it",
        group="Serving")
    api_key: str | None = var(None, "key that requests to scripts/serve_checkpoint.py must carry, as Authorization: Bearer KEY; never shown or stored; "
        "not set: none", group="Serving", form="secret")
    serve_slots: int = var(16, "texts that are generated at the same time, each with a key/value cache in memory", group="Serving", minimum=1, maximum=256)
    serve_queue: int = var(64, "requests that wait for their first slot; further ones get status 429", group="Serving", minimum=0)
    serve_timeout: int = var(300, "seconds that a request may take, waiting included; then it ends with an error", group="Serving", minimum=1)
    # fmt: on

    # Where each value came from: "environment", "argument", the env file's name, "checkpoint" or "default".
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    # What to report once the run logs: names of the process environment that are near a variable. And the script's READS.
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    reads: tuple[str, ...] = field(default=(), compare=False, repr=False)
    # What the env file sets otherwise than the process environment, which comes first.
    overridden: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def is_set(self, name: str) -> bool:
        """Return whether the user set the variable, in the environment or in the env file."""
        return self.sources.get(name.upper(), "default") not in DERIVED_SOURCES


VARIABLES: dict[str, Field[Any]] = {each.name.upper(): each for each in fields(Config) if each.metadata}
