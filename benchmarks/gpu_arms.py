"""The processes of gpu.py: each sets up one arm, then answers requests on stdin, lines of JSON, on stdout.

python3 benchmarks/gpu_arms.py compiled [--small]
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from milepost import config  # noqa: E402

SMALL = "--small" in sys.argv[1:]
DEVICE = "cpu" if SMALL else "cuda"
FOLDER = Path(os.environ.get("GPU_BENCHMARK_FOLDER", "."))
ROWS = int(os.environ.get("GPU_BENCHMARK_ROWS", "12"))  # as nanoGPT's bench.py has; its vocabulary is padded
LAYERS, WIDTH, LENGTH, VOCABULARY = (2, 96, 64, 256) if SMALL else (12, 768, 1024, 50304)
SHAPE = f"{'small' if SMALL else '124M'}, T={LENGTH}, B={ROWS}"
SETTINGS = {
    "MODEL_TYPE": "gpt2", "TOKENIZER": "byte" if SMALL else "gpt2", "N_LAYER": str(LAYERS), "N_HEAD": "12", "N_EMBD": str(WIDTH), "DROPOUT": "0",
    "BIAS": "false", "BLOCK_SIZE": str(LENGTH), "BATCH_SIZE": str(ROWS), "DEVICE": DEVICE, "PYTHON_DOTENV_DISABLED": "1",
    "TRAINING_DATA_SOURCE": str(ROOT / "data" / "dear_wren.md"), "ENABLE_CHECKPOINTS": "true", "CHECKPOINT_KEEP_LAST": "1",
    "CHECKPOINT_KEEP_BEST": "0", "CHECKPOINT_DIR": str(FOLDER / "checkpoints"), "RUNS_DIR": str(FOLDER / "runs"),
}  # fmt: skip
COMPILE = "false" if SMALL else "true"
TRAINED = {
    "compiled": {"COMPILE": COMPILE, "OPTIMIZER": "adamw"},
    "compiled, DETERMINISTIC=false": {"COMPILE": COMPILE, "OPTIMIZER": "adamw", "DETERMINISTIC": "false"},
    "eager, muon": {"COMPILE": "false", "OPTIMIZER": "muon"},
}
CLIENTS, ANSWER = 16, 8 if SMALL else 48

import torch  # noqa: E402
from steps import nanogpt_folder  # noqa: E402
from time_to_loss import (  # noqa: E402
    NANOGPT_STEPS,
    OURS,
    validation_loss,
)
from time_to_loss import nanogpt as learn_as_nanogpt  # noqa: E402
from time_to_loss import train as learn_all  # noqa: E402

import training  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.generation.decoder import Decoder  # noqa: E402
from milepost.generation.sampling import generate  # noqa: E402
from milepost.generation.texts import choose_decoder  # noqa: E402
from milepost.run import Run, fresh, to_record  # noqa: E402
from milepost.run_checkpoints import save_checkpoint  # noqa: E402
from milepost.runtime import hardware  # noqa: E402
from milepost.runtime.progress import Log, Metrics  # noqa: E402
from models import parameter_count  # noqa: E402
from models.gpt2 import GPT2, SIZES, GPT2Settings  # noqa: E402

Actions = dict[str, Callable[..., Any]]


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """Return the wall time of a call, and of what it left to the device."""
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


def gemm_rate() -> float:
    """Return the FLOP/s of a large square product in bfloat16, the best of ten."""
    size = 256 if SMALL else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(11))


def copy_rate() -> float:
    """Return the bytes/s of memory that a copy reads and writes, the best of ten."""
    source = torch.ones(2**20 if SMALL else 2**30, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(11))


# ---------------------------------------------------------------------------------------------------------------------
# Training.


def stepping(step: Callable[[], object], count: int) -> Actions:
    """Return the actions of an arm that trains, after the steps that compile and fill caches."""
    for _ in range(3):
        step()
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    flops = 6 * (count - LENGTH * WIDTH) + 12 * LAYERS * WIDTH * LENGTH  # a token, counted as nanoGPT counts
    facts = {"tokens": ROWS * LENGTH, "flops_per_token": flops, "shape": SHAPE}
    return {
        "facts": lambda: facts,
        "product": gemm_rate,
        "steps": lambda count: seconds(lambda: [step() for _ in range(count)]),
        "memory": lambda: torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0,
    }


def ours(changes: dict[str, str]) -> Actions:
    """Return the actions of our training step."""
    run = fresh(config.read(SETTINGS | changes), Log())
    run.metrics = Metrics(FOLDER / "metrics.jsonl")
    hardware.keep_freed_memory()

    def step() -> None:
        training.training_step(run, 1e-4)

    return stepping(step, parameter_count(run.model)) | {
        "steps_after": lambda save, count: steps_after(run, step, save=save, count=count)
    }


def steps_after(run: Run, step: Callable[[], None], *, save: bool, count: int) -> dict[str, float]:
    """Return the seconds inside save(), of it with `count` steps behind it, and of the rest of its writing."""
    inside = [0.0]

    def work() -> None:
        if save:
            began = time.perf_counter()
            save_checkpoint(run, regular=True)
            inside[0] = time.perf_counter() - began
        for _ in range(count):
            step()

    taken = seconds(work)
    return {"steps": taken, "inside": inside[0], "drain": seconds(run.writer.wait)}


def nanogpt() -> Actions:
    """Return the actions of the loop of nanoGPT's bench.py: random tokens, TF32, bfloat16, compiled, no clipping."""
    sys.path.insert(0, str(nanogpt_folder()))
    from model import GPT, GPTConfig

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    shape = {"n_layer": LAYERS, "n_head": 12, "n_embd": WIDTH, "block_size": LENGTH, "vocab_size": VOCABULARY}
    model = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(DEVICE)
    optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), DEVICE)
    count, forward = parameter_count(model), model if SMALL else torch.compile(model)
    x, y = torch.randint(VOCABULARY, (2, ROWS, LENGTH), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = forward(x, y)[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return stepping(step, count)


# ---------------------------------------------------------------------------------------------------------------------
# Generating.


def gpt2() -> GPT2:
    """Return a GPT-2 with random weights on the device."""
    torch.manual_seed(0)
    small = GPT2Settings(vocab_size=VOCABULARY, block_size=LENGTH, n_layer=LAYERS, n_head=12, n_embd=WIDTH)
    return GPT2(small if SMALL else SIZES["gpt2"]).eval().to(DEVICE)


def generating() -> Actions:
    """Return the actions of generating greedily, by what the commands choose for so many tokens."""
    model = gpt2()
    decoder, _ = choose_decoder(model, device=torch.device(DEVICE), dtype="auto", quantize="none", tokens=256)
    weights = decoder.weights if isinstance(decoder, Decoder) else "float32"
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")
    size = matrices * (2 if weights == "bfloat16" else 4)
    facts = {"bytes": size, "weights": weights, "shape": "small" if SMALL else "124M"}

    def tokens(count: int) -> float:
        return seconds(lambda: list(generate(decoder or model, [64, 90], max_new_tokens=count, temperature=0.0)))

    tokens(8)
    return {"facts": lambda: facts, "tokens": tokens, "bandwidth": copy_rate}


def transformers() -> Actions:
    """Return the actions of transformers' generate(), in bfloat16 with its cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": LAYERS, "n_head": 12, "n_embd": WIDTH, "n_positions": 1024, "vocab_size": 50257}
    model = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=None)).eval().to(DEVICE, torch.bfloat16)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[464, 3290]], device=DEVICE)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def tokens(count: int) -> float:
        return seconds(lambda: model.generate(ids, max_new_tokens=count, **how))

    tokens(8)
    return {"tokens": tokens}


def serve() -> Actions:
    """Return the actions of a server of such a model, and of CLIENTS clients."""
    from model_server import serving  # of the tests; needs starlette and uvicorn

    run = fresh(config.read(SETTINGS | {"COMPILE": "false", "OPTIMIZER": "adamw"}), Log())
    ckpt.save(to_record(run), FOLDER / "served" / "checkpoints")
    held = contextlib.ExitStack()  # the server ends with it
    served = held.enter_context(serving(FOLDER / "served", CHECKPOINT_PATH="latest", DEVICE=DEVICE))
    together = served.server.catalogue.models["latest"].together

    def answer(seed: int) -> int:
        return int(served.complete("Dear Wren", seed=seed, max_tokens=ANSWER).value["usage"]["completion_tokens"])

    def requests(at_once: bool) -> dict[str, Any]:
        counts: list[int] = []
        with ThreadPoolExecutor(CLIENTS if at_once else 1) as pool:
            taken = seconds(lambda: counts.extend(pool.map(answer, range(CLIENTS))))
        return {"seconds": taken, "tokens": sum(counts), "how": "read together" if together else "in turn"}

    answer(0)
    return {"requests": requests, "stop": held.close}


# ---------------------------------------------------------------------------------------------------------------------
# Learning.


def learning(arm: str) -> Actions:
    """Return the action of a whole training to its validation loss; see time_to_loss.py."""
    kind = {
        "MODEL_TYPE": "gpt2",
        "TOKENIZER": "char",
        "N_LAYER": "4",
        "N_HEAD": "4",
        "N_EMBD": "128",
        "BLOCK_SIZE": "64",
    }
    text = {"TRAINING_DATA_SOURCE": os.environ["TINYSHAKESPEARE"], "DROPOUT": "0", "ENABLE_CHECKPOINTS": "false"}
    few = {"TRAINING_STEPS": "4", "EVAL_STEPS": "2"} if SMALL else {}
    run = fresh(config.read(SETTINGS | kind | text | OURS | few), Log())

    def learn() -> dict[str, float]:
        if arm == "nanogpt":
            hardware.make_deterministic(False, run.device)  # as it is shipped
            took, loss = learn_as_nanogpt(run, steps=4 if SMALL else NANOGPT_STEPS)
            return {"seconds": took, "loss": loss}
        took = seconds(lambda: learn_all(run))
        return {"seconds": took, "loss": validation_loss(run)}

    return {"learn": learn}


def actions_of(name: str) -> Actions:
    """Set up an arm and return its actions."""
    if name in TRAINED:
        return ours(TRAINED[name])
    others = {"nanogpt": nanogpt, "generate": generating, "transformers": transformers, "serve": serve}
    return others[name]() if name in others else learning("nanogpt" if "nanogpt" in name else "ours")


def main() -> None:
    """Answer the requests."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    actions = {"start": lambda: True} | actions_of(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(actions[request.pop("do")](**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
