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
from decoding import matrix_numbers, rows, transformers_arm  # noqa: E402
from measure import compare, gemm_rate, header, not_measured, row  # noqa: E402

from milepost.runtime.hardware import multiplies_bfloat16  # noqa: E402
from milepost.text.corpus import open_corpus  # noqa: E402
from milepost.text.examples import prepare_examples  # noqa: E402
from milepost.text.packing import packed, validation_batches  # noqa: E402
from milepost.text.scan import scan  # noqa: E402
from milepost.text.tokenization import Gpt2Tokenizer  # noqa: E402
from models.llama import Llama, LlamaSettings  # noqa: E402

SHAPE = LlamaSettings(49152, 1024, n_layer=30, n_head=9, n_embd=576, n_kv_head=3, n_inner=1536)  # SmolLM2-135M
ROWS, TOKENS = 2, 256  # of a training step
NEW = 96  # tokens generated
PROMPT = [5, 7]
TALKS = ("conversations.jsonl", "ask_wren.jsonl")
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Print the rows."""
    torch.manual_seed(0)
    header()
    training_step(Llama(SHAPE), in_transformers())
    rows("decode 135M", "llama", untrained, theirs, prompt=PROMPT, new=NEW)
    packing()


def untrained() -> Llama:
    """Return the model, the same at every call."""
    torch.manual_seed(0)
    return Llama(SHAPE).eval()


def theirs(prompt: list[int], new: int) -> Callable[[], object]:
    """Return transformers' generate() for a model of the same shape."""
    return transformers_arm(in_transformers().eval(), prompt, new)


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
