"""Measure generation with GPT-2 (124M parameters) on a CPU: one text, 256 new tokens, against transformers with its cache.

    python3 benchmarks/generation.py      # about three minutes

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
from measure import compare, header, not_measured, row  # noqa: E402

from milepost.generation.decoder import Decoder  # noqa: E402
from milepost.generation.sampling import generate  # noqa: E402
from milepost.runtime.hardware import decode_dtype  # noqa: E402
from milepost.text.tokenization import Gpt2Tokenizer  # noqa: E402
from models.gpt2 import GPT2, SIZES  # noqa: E402

NEW, READ = 256, 32  # tokens generated, and passes that only read
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
LEARNED, STEPS = 192, 36  # tokens of a passage that the model learns by heart, so that there is something to look up


def main() -> None:
    """Print the rows."""
    torch.manual_seed(0)
    header()
    model = GPT2(SIZES["gpt2"]).eval()
    default = decode_dtype("auto", torch.device("cpu"), width=model.settings.n_embd, tokens=NEW)
    decoders = {weights: Decoder(model, weights=weights) for weights in dict.fromkeys((default, "int8", "float32"))}
    against_transformers(model, decoders, default)
    with_lookup(model)


def against_transformers(model: GPT2, decoders: dict[str, Decoder], default: str) -> None:
    """Measure tokens per second of greedy decoding, and their share of the rate at which the matrices can be read."""
    prompt = [464, 3290]
    arms: dict[str, Callable[[], object]] = {
        name: lambda decoder=decoder: tokens(decoder, prompt, temperature=0.0) for name, decoder in decoders.items()
    }
    theirs = peer(model)
    if theirs is not None:
        arms["transformers"] = lambda: theirs(prompt)
    numbers = matrix_numbers(model)
    for name in decoders:
        buffer = torch.ones(BYTES[name] * numbers // 8, dtype=torch.int64)
        arms[f"reading, {name}"] = lambda buffer=buffer: [buffer.sum() for _ in range(READ)]
    rate = {name: (READ if "reading" in name else NEW) / taken for name, taken in compare(arms).items()}
    for name, bound in {"float32": "2 by default", default: "2", "int8": "4"}.items():
        metric, limit = f"decode 124M, {'default, ' if name == default else ''}{name}", rate[f"reading, {name}"]
        shared = {"ours": f"{rate[name]:.0f} tok/s", "limit": f"{limit:.0f} tok/s", "share": rate[name] / limit}
        if theirs is None:
            row(metric, **shared)
            not_measured(f"{metric} / transformers", "transformers is not installed")
        else:
            ratio = rate[name] / rate["transformers"]
            row(metric, peer=f"{rate['transformers']:.0f} tok/s", ratio=ratio, bound=bound, **shared)


def matrix_numbers(model: GPT2) -> int:
    """Return how many weights multiply one token: the matrices of all layers and the head."""
    return sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "wpe.weight")


def tokens(model: GPT2 | Decoder, prompt: list[int], **how: Any) -> list[int]:
    """Return NEW tokens, sampled with the same seed at every call."""
    return list(generate(model, prompt, max_new_tokens=NEW, generator=torch.Generator().manual_seed(1), **how))


def peer(model: GPT2) -> Callable[[list[int]], object] | None:
    """Return transformers' generate() for a model of the same shape, in float32; None without transformers."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    theirs: Any = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.generation_config.eos_token_id = None  # it must not end sooner
    asked = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run(prompt: list[int]) -> object:
        ids = torch.tensor([prompt])
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **asked)

    return run


def with_lookup(model: GPT2) -> None:
    """Measure speculative decoding of a passage from the prompt, of another passage, and of noise."""
    noise = random.Random(0).sample(range(50257), LEARNED)
    untrained = Decoder(model, weights="bfloat16")
    passage = Gpt2Tokenizer().encode((ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")[:4000])[:LEARNED]
    learn(model, passage)
    trained = Decoder(model, weights="bfloat16")
    sets = {
        "a passage of the prompt again": (trained, passage + passage[:8], 0.0, "1"),
        "prose that is not in the prompt": (trained, passage[:8], 1.0, "0.95"),
        "noise": (untrained, noise, 1.0, "0.95"),
    }
    for name, (decoder, prompt, temperature, bound) in sets.items():
        arms = {
            "plain": lambda: tokens(decoder, prompt, temperature=temperature),  # noqa: B023
            # As scripts/load_checkpoint.py does, it is first tried whether drafts can be verified here.
            "lookup": lambda: tokens(decoder, prompt, temperature=temperature, lookup=decoder.agrees()),  # noqa: B023
        }
        assert arms["plain"]() == arms["lookup"](), "lookup changed the text"
        taken = compare(arms, warmups=0)
        figures = {kind: f"{NEW / one:.0f} tok/s" for kind, one in taken.items()}
        ratio = taken["plain"] / taken["lookup"]
        row(f"lookup, {name}", ours=figures["lookup"], peer=figures["plain"], ratio=ratio, bound=bound)


def learn(model: GPT2, passage: list[int]) -> None:
    """Overfit the model to a repeated passage."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    window = torch.tensor([passage + passage[:65]])
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 6e-4 * min(1, (number + 1) / 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(window[:, :-1], window[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  learning a passage, step {number}: {loss.item():.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
