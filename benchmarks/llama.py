"""Measure a Llama of the shape of SmolLM2-135M on a CPU: a training step and decoding against transformers, decoding against llama.cpp.

    python3 benchmarks/llama.py      # about ten minutes; with llama.cpp: pip install -r requirements-llama.txt

Limits as in generation.py and steps.py. Last, what packing saves on the lengths of two files of conversations.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from measure import compare, gemm_rate, header, not_measured, row  # noqa: E402

import models  # noqa: E402
from milepost import ckpt  # noqa: E402
from milepost.ckpt import Checkpoint  # noqa: E402
from milepost.generation.decoder import Decoder  # noqa: E402
from milepost.generation.sampling import generate  # noqa: E402
from milepost.runtime.hardware import decode_dtype, multiplies_bfloat16  # noqa: E402
from milepost.text.corpus import open_corpus  # noqa: E402
from milepost.text.examples import prepare_examples  # noqa: E402
from milepost.text.packing import packed, validation_batches  # noqa: E402
from milepost.text.scan import scan  # noqa: E402
from milepost.text.tokenization import Gpt2Tokenizer  # noqa: E402
from models.llama import Llama, LlamaSettings  # noqa: E402

SHAPE = LlamaSettings(49152, 1024, n_layer=30, n_head=9, n_embd=576, n_kv_head=3, n_inner=1536)  # SmolLM2-135M
ROWS, TOKENS = 2, 256  # of a training step
NEW, READ = 256, 16  # tokens generated, and passes that only read
PROMPT = [5, 7]
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
TALKS = ("conversations.jsonl", "ask_wren.jsonl")
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Print the rows."""
    torch.manual_seed(0)
    header()
    model, theirs = Llama(SHAPE), in_transformers()
    training_step(model, theirs)
    decoding(model.eval(), theirs)
    packing()


def in_transformers() -> Any:
    """Return transformers' model of the same shape; None without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.n_embd, intermediate_size=SHAPE.n_inner, num_hidden_layers=SHAPE.n_layer,
        num_attention_heads=SHAPE.n_head, num_key_value_heads=SHAPE.n_kv_head, max_position_embeddings=SHAPE.block_size,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# ---------------------------------------------------------------------------------------------------------------------
# A training step: forward, backward and AdamW, in bfloat16 where the processor multiplies it.


def training_step(model: Llama, theirs: Any) -> None:
    """Measure a step against transformers' and against the rate of matrix products."""
    ids = torch.randint(SHAPE.vocab_size, (ROWS, TOKENS + 1))
    arms = {"ours": stepper(model, lambda x, y: model(x, y).loss, ids)}
    if theirs is not None:
        arms["transformers"] = stepper(theirs, lambda x, y: theirs(input_ids=x, shift_labels=y, labels=y).loss, ids)
    taken = compare(arms)
    dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    limit = 6 * matrix_numbers(model) * ROWS * TOKENS / gemm_rate(dtype)
    metric = f"step 135M, B={ROWS}, T={TOKENS}, {str(dtype).removeprefix('torch.')}"
    shared = {"ours": f"{taken['ours']:.2f} s", "limit": f"{limit:.2f} s", "share": limit / taken["ours"]}
    if theirs is None:
        row(metric, **shared)
        not_measured(f"{metric} / transformers", "transformers is not installed")
    else:
        peer = taken["transformers"]
        row(metric, peer=f"{peer:.2f} s", ratio=peer / taken["ours"], bound="1", **shared)


def stepper(model: torch.nn.Module, loss_of: Step, ids: torch.Tensor) -> Callable[[], None]:
    """Return a function that trains the model by one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bfloat16()):
            loss = loss_of(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_numbers(model: torch.nn.Module) -> int:
    """Return how many weights multiply one token: the matrices of all layers and the head, which is the embedding."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding: one text, greedily, NEW tokens.


def decoding(model: Llama, theirs: Any) -> None:
    """Measure tokens per second, and their share of the rate at which the matrices can be read."""
    default = decode_dtype("auto", torch.device("cpu"), width=SHAPE.n_embd, tokens=NEW)
    kinds = tuple(dict.fromkeys((default, "int8", "float32")))
    arms: dict[str, Callable[[], object]] = {kind: decoder_arm(Decoder(model, weights=kind)) for kind in kinds}
    if theirs is not None:
        arms["transformers"] = transformers_arm(theirs.eval())
    with tempfile.TemporaryDirectory() as folder:
        peers = llama_cpp_arms(model, Path(folder))
        arms |= peers
        for kind in kinds:
            buffer = torch.ones(BYTES[kind] * matrix_numbers(model) // 8, dtype=torch.int64)
            arms[f"reading, {kind}"] = lambda buffer=buffer: [buffer.sum() for _ in range(READ)]
        taken = compare(arms)
    rate = {name: (READ if "reading" in name else NEW) / seconds for name, seconds in taken.items()}
    for kind, peer, bound in [(kind, "transformers", "1") for kind in kinds] + [
        (default, "llama.cpp, f16", "1"), ("int8", "llama.cpp, q8_0", "1"),
    ]:  # fmt: skip
        metric, limit = f"decode 135M, {kind} / {peer}", rate[f"reading, {kind}"]
        if peer not in rate:
            not_measured(metric, f"{peer.partition(',')[0]} or the package gguf is not installed")
            continue
        figures = {"ours": f"{rate[kind]:.0f} tok/s", "peer": f"{rate[peer]:.0f} tok/s", "limit": f"{limit:.0f} tok/s"}
        row(metric, ratio=rate[kind] / rate[peer], bound=bound, share=rate[kind] / limit, **figures)


def decoder_arm(decoder: Decoder) -> Callable[[], object]:
    """Return a function that generates by a fast decoder."""
    return lambda: list(generate(decoder, PROMPT, max_new_tokens=NEW, temperature=0.0))


def transformers_arm(theirs: Any) -> Callable[[], object]:
    """Return a function that generates by transformers, in float32 with its cache."""
    ids = torch.tensor([PROMPT])
    how = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)


def llama_cpp_arms(model: Llama, folder: Path) -> dict[str, Callable[[], object]]:
    """Return functions that generate by llama.cpp from the exported model; none without its Python packages."""
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama as Cpp
    except ImportError:
        return {}
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    fields = {"model_type": "llama", "model_settings": models.plain(model.settings), "tokenizer": {"kind": "byte"}}
    record = Checkpoint(model_state=state, step=1, run_id="benchmark", **fields)
    arms: dict[str, Callable[[], object]] = {}
    for kind in ("f16", "q8_0"):
        path = ckpt.exporter("gguf", gguf_type=kind).write(record, folder, f"model-{kind}")
        cpp = Cpp(str(path), n_ctx=SHAPE.block_size, n_threads=torch.get_num_threads(), verbose=False)
        arms[f"llama.cpp, {kind}"] = lambda cpp=cpp: cpp_tokens(cpp)
    return arms


def cpp_tokens(cpp: Any) -> list[int]:
    """Return NEW tokens of llama.cpp, greedily."""
    cpp.reset()
    found: list[int] = []
    for token in cpp.generate(PROMPT, temp=0.0):
        found.append(token)
        if len(found) == NEW:
            break
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Packing: an epoch in packed windows against one conversation in each.


def packing() -> None:
    """Measure the time of an epoch with and without packing, by the windows of each and the time of a step."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TALKS:
            epoch_of(name, Path(folder))


def epoch_of(name: str, folder: Path) -> None:
    """Print the row of one file: windows, padding and the time of an epoch of a small Llama with the GPT-2 tokenizer."""
    corpus = open_corpus(str(ROOT / "data" / name), data_dir=folder)
    tokenizer = Gpt2Tokenizer()
    how = {"template": None, "validation_fraction": 0.0, "cache_dir": folder / name}
    split = prepare_examples(corpus, scan(corpus), tokenizer, **how)
    ways = {
        kind: packed(split.train, block_size=512, pack=kind == "packed", answers=True) for kind in ("packed", "padded")
    }
    torch.manual_seed(0)
    model = Llama(LlamaSettings(tokenizer.vocab_size, 512, n_layer=4, n_head=4, n_embd=128))
    batches = {
        kind: next(iter(validation_batches(way, batch_size=8, steps=1, positions=True))) for kind, way in ways.items()
    }
    taken = compare({kind: lambda batch=batch: model(*batch).loss.backward() for kind, batch in batches.items()})
    epochs = {kind: way.windows / len(batches[kind][0]) * taken[kind] for kind, way in ways.items()}
    shown = {kind: f"{epochs[kind]:.1f} s, {way.padding:.0%} pad" for kind, way in ways.items()}
    metric = f"an epoch of {name}, T=512"
    row(metric, ours=shown["packed"], peer=shown["padded"], ratio=epochs["padded"] / epochs["packed"], bound="1")


if __name__ == "__main__":
    main()
