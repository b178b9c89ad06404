"""Measure generation with GPT-2 (124M parameters) on a CPU: one text, 96 new tokens, against transformers with its cache, and llama.cpp.

    python3 benchmarks/generation.py      # about five minutes; with numba, and with llama.cpp: pip install -r requirements-llama.txt

The limit is the time to read as many bytes as the matrices have, by torch's fastest read. Lookup is measured against the same decoder without it;
the text must be equal.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from decoding import COMPILED, rows, transformers_arm  # noqa: E402
from measure import compare, header, row  # noqa: E402

from milepost.generation.decoder import Decoder  # noqa: E402
from milepost.generation.sampling import generate  # noqa: E402
from milepost.runtime.hardware import multiplies_bfloat16  # noqa: E402
from milepost.text.tokenization import Gpt2Tokenizer  # noqa: E402
from models.gpt2 import GPT2, SIZES  # noqa: E402

NEW, READ, REPEATED = 96, 512, 256  # tokens generated, read, and generated with drafts
LEARNED, STEPS = 192, 36  # tokens of a passage that the model learns by heart, so that there is something to look up


def main() -> None:
    """Print the rows."""
    header()
    rows("decode 124M", "gpt2", untrained, theirs, prompt=[464, 3290], new=NEW)
    prompt = Gpt2Tokenizer().encode((ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")[:8000])[:READ]
    rows(f"read {READ} tokens, 124M", "gpt2", untrained, theirs, prompt=prompt, new=1)
    with_lookup(untrained())


def untrained() -> GPT2:
    """Return the model, the same at every call."""
    torch.manual_seed(0)
    return GPT2(SIZES["gpt2"]).eval()


def theirs(prompt: list[int], new: int) -> Callable[[], object]:
    """Return transformers' generate() for a model of the same shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return transformers_arm(GPT2LMHeadModel(GPT2Config()).eval(), prompt, new)


def decoder_of(model: GPT2) -> Decoder:
    """Return the decoder that a user gets in bfloat16."""
    if not COMPILED:
        return Decoder(model, weights="bfloat16")
    from milepost.generation.compiled import CompiledDecoder

    return CompiledDecoder(model, weights="bfloat16")


def tokens(model: GPT2 | Decoder, prompt: list[int], **how: Any) -> list[int]:
    """Return REPEATED tokens, sampled with the same seed at every call."""
    return list(generate(model, prompt, max_new_tokens=REPEATED, generator=torch.Generator().manual_seed(1), **how))


def with_lookup(model: GPT2) -> None:
    """Measure speculative decoding of a passage from the prompt, of another passage, and of noise."""
    noise = random.Random(0).sample(range(50257), LEARNED)
    before = decoder_of(model)
    passage = Gpt2Tokenizer().encode((ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")[:4000])[:LEARNED]
    learn(model, passage)
    trained = decoder_of(model)
    sets = {
        "a passage of the prompt again": (trained, passage + passage[:8], 0.0, "1"),
        "prose that is not in the prompt": (trained, passage[:8], 1.0, "0.95"),
        "noise": (before, noise, 1.0, "0.95"),
    }
    for name, (text, prompt, temperature, bound) in sets.items():
        arms = {
            "plain": lambda: tokens(text, prompt, temperature=temperature),  # noqa: B023
            # As scripts/load_checkpoint.py does, it is first tried whether drafts can be verified here.
            "lookup": lambda: tokens(text, prompt, temperature=temperature, lookup=text.agrees()),  # noqa: B023
        }
        assert arms["plain"]() == arms["lookup"](), "lookup changed the text"
        taken = compare(arms, warmups=0)
        figures = {kind: f"{REPEATED / one:.0f} tok/s" for kind, one in taken.items()}
        ratio = taken["plain"] / taken["lookup"]
        row(f"lookup, {name}", ours=figures["lookup"], peer=figures["plain"], ratio=ratio, bound=bound)


def learn(model: GPT2, passage: list[int]) -> None:
    """Overfit the model to a repeated passage."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    window = torch.tensor([passage + passage[:65]])
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 6e-4 * min(1, (number + 1) / 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=multiplies_bfloat16()):
            loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  learning a passage, step {number}: {loss.item():.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
