"""What the benchmarks of decoding share: one text, greedily, by our decoders, transformers and llama.cpp, each in a process of its own.

Programs in one process would keep threads beside each other, and wait with one for what the other computes.
"""

import contextlib
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import compare, not_measured, row

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.ckpt import Checkpoint  # noqa: E402
from milepost.generation.decoder import Decoder  # noqa: E402
from milepost.generation.sampling import generate  # noqa: E402
from milepost.runtime.hardware import decode_dtype  # noqa: E402
from models.model import Model  # noqa: E402

Arm = Callable[[], object]
READ = 16  # passes that only read
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
ALIKE = {"float32": "f32", "bfloat16": "f16", "int8": "q8_0"}  # llama.cpp's dtypes of as many bytes
COMPILED = importlib.util.find_spec("numba") is not None


def rows(
    label: str, model_type: str, build: Callable[[], Model], theirs: Callable[..., Arm], *, prompt: list[int], new: int
) -> None:
    """Print the rows of one model: each dtype against transformers, llama.cpp and the decoder without numba.

    `theirs` makes transformers' arm of a prompt and a number of new tokens. With one new token, reading the prompt is measured.
    """
    model = build()
    default = decode_dtype("auto", torch.device("cpu"), width=model.settings.n_embd, tokens=new, compiled=COMPILED)
    kinds = tuple(dict.fromkeys((default, "int8", "float32")))
    arms = {kind: in_process(decoder_arm, build, kind, COMPILED, prompt, new) for kind in kinds}
    if COMPILED:
        arms |= {f"PyTorch, {kind}": in_process(decoder_arm, build, kind, False, prompt, new) for kind in kinds}
    if importlib.util.find_spec("transformers"):
        arms["transformers"] = in_process(theirs, prompt, new)
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        arms |= {
            f"llama.cpp, {ALIKE[kind]}": in_process(cpp_arm, model_type, build, kind, prompt, new) for kind in kinds
        }
    numbers = matrix_numbers(model)
    for kind in kinds:
        buffer = torch.ones(BYTES[kind] * numbers // 8, dtype=torch.int64)
        arms[f"reading, {kind}"] = lambda buffer=buffer: [buffer.sum() for _ in range(READ)]
    counted = new if new > 1 else len(prompt)
    rate = {name: (READ if "reading" in name else counted) / taken for name, taken in compare(arms).items()}
    for kind in kinds:
        fast = {"float32": "2 by default", "int8": "4"}.get(kind, "2") if new > 1 else "1"
        for peer, bound in (("transformers", fast), (f"llama.cpp, {ALIKE[kind]}", "1"), (f"PyTorch, {kind}", "-")):
            if peer in rate:
                limit = {
                    "limit": f"{rate[f'reading, {kind}']:.0f} tok/s",
                    "share": rate[kind] / rate[f"reading, {kind}"],
                }
                figures = {"ours": f"{rate[kind]:.0f} tok/s", "peer": f"{rate[peer]:.0f} tok/s"} | (
                    limit if new > 1 else {}
                )
                row(f"{label}, {kind} / {peer}", ratio=rate[kind] / rate[peer], bound=bound, **figures)
            else:
                not_measured(f"{label}, {kind} / {peer}", "it is not installed")


def matrix_numbers(model: torch.nn.Module) -> int:
    """Return how many weights multiply one token: the matrices of all layers and the head, which is the embedding."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")


def in_process(make: Callable[..., Arm], *how: Any) -> Arm:
    """Return an arm that runs what make(*how) returns, in a process of its own, which is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_answer, args=(there, make, how), daemon=True).start()
    here.recv()

    def run() -> None:
        here.send(None)
        here.recv()

    return run


def _answer(pipe: Any, make: Callable[..., Arm], how: tuple[Any, ...]) -> None:
    run = make(*how)
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while True:
            pipe.send(None)
            pipe.recv()
            run()


def decoder_arm(build: Callable[[], Model], kind: str, compiled: bool, prompt: list[int], new: int) -> Arm:
    """Return a function that generates by a fast decoder, which is compiled or PyTorch's."""
    make: type[Decoder] = Decoder
    if compiled:
        from milepost.generation.compiled import CompiledDecoder as make  # type: ignore[no-redef]
    decoder = make(build(), weights=kind)
    return lambda: list(generate(decoder, prompt, max_new_tokens=new, temperature=0.0))


def transformers_arm(theirs: Any, prompt: list[int], new: int) -> Arm:
    """Return a function that generates by a model of transformers, in float32 with its cache."""
    ids = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None  # it must not end sooner
    how = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)


def cpp_arm(model_type: str, build: Callable[[], Model], kind: str, prompt: list[int], new: int) -> Arm:
    """Return a function that generates by llama.cpp from the exported model, greedily."""
    from llama_cpp import Llama

    model, threads = build(), torch.get_num_threads()
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    fields = {"model_type": model_type, "model_settings": models.plain(model.settings), "tokenizer": {"kind": "byte"}}
    record = Checkpoint(model_state=state, step=1, run_id="benchmark", **fields)
    with tempfile.TemporaryDirectory() as folder:
        path = ckpt.exporter("gguf", gguf_type=ALIKE[kind]).write(record, Path(folder), "model")
        how = {"n_ctx": model.settings.block_size, "n_threads": threads, "n_threads_batch": threads}
        cpp = Llama(str(path), verbose=False, **how)

    def run() -> None:
        cpp.reset()
        for count, _ in enumerate(cpp.generate(prompt, temp=0.0), 1):
            if count == new:
                return

    return run
