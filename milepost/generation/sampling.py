"""Sampling: pure functions on one row of logits (V,), and generate(), which yields token ids."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile, zip_longest
from typing import Final

import torch
from torch import Tensor, nn

from milepost.generation.decoder import DecodeCache, Decoder
from milepost.generation.lookup import Lookup
from models.model import Cache, Model

# In a larger vocabulary, the best tokens are tried first: sorting all takes milliseconds.
BEST: Final = 1024
# An extreme penalty makes no logit larger: a temperature of 1e-6 would overflow float32.
LARGEST: Final = 1e30


def penalize(logits: Tensor, ids: Collection[int], penalty: float) -> Tensor:
    """Return logits (V,) with those of the seen ids divided by penalty if positive and multiplied by it if negative.

    A penalty of 1 changes nothing; above 1 the text repeats less. Keskar et al. 2019, "CTRL", section 4.1.
    """
    if penalty == 1.0 or not ids:
        return logits
    seen = torch.tensor(sorted(ids), device=logits.device)
    scores = logits[seen]
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty).clamp(-LARGEST, LARGEST)
    return logits.index_copy(0, seen, torch.where(scores.isfinite(), penalized, scores))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (V,) with all below the k-th best set to -inf. Ties with it stay; k = 0 keeps all."""
    if k == 0 or k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (V,) with all set to -inf except the fewest best ones whose probabilities sum to at least p > 0.

    At least the best logit stays; p >= 1 keeps all. Nucleus sampling: Holtzman et al. 2019, "The Curious Case of
    Neural Text Degeneration".
    """
    if p >= 1.0:
        return logits
    best, order = _best_first(logits, p)
    probs = (best - logits.logsumexp(-1)).exp()
    surplus = probs.cumsum(-1) - probs >= p  # better tokens already sum to p
    surplus[0] = False  # a p that is 0 in float32
    kept = order[~surplus]
    return torch.full_like(logits, -torch.inf).index_copy(0, kept, logits[kept])


def _best_first(logits: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the logits in descending order, and their ids: only the first BEST if their probabilities surely sum to
    p.
    """
    if logits.numel() > BEST:
        best, order = logits.topk(BEST)
        if (best - logits.logsumexp(-1)).exp().sum() > p + 1e-4:  # a margin far above rounding errors
            return best, order
    return logits.sort(descending=True, stable=True)


def draw(probs: Tensor, generator: torch.Generator) -> int:
    """Return an index drawn with probabilities probs (V,): where a uniform number falls in their cumulative sum.

    It takes one number from the generator whatever V is, so surplus rows change no draw. Uniform numbers are the same
    on every processor; those that torch.multinomial draws are not.
    """
    mass = probs.double().cumsum(-1)
    uniform = torch.rand((), dtype=torch.float64, generator=generator)  # below 1, so the index is below V
    return int(torch.searchsorted(mass, uniform * mass[-1], right=True))


def next_token(logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Return an id drawn from logits (V,), or the best id if temperature is below 1e-6, where dividing would overflow.

    Runs in float32 on the CPU with a CPU generator, so equal logits draw the same id on every device. Raise ValueError
    if the logits are not finite.
    """
    logits = logits.float().cpu()
    if not logits.max().isfinite():
        raise ValueError(
            f"the model's best logit is {logits.max().item()}: training diverged or the file is damaged; "
            "use an earlier checkpoint"
        )
    if temperature < 1e-6:
        return int(logits.argmax())
    logits = logits / temperature
    if not 0 < top_k < logits.numel():
        return draw(keep_top_p(logits, top_p).softmax(-1), generator)
    kept = keep_top_k(logits, top_k).isfinite().nonzero()[:, 0]  # the rest have probability 0
    return int(kept[draw(keep_top_p(logits[kept], top_p).softmax(-1), generator)])


def generate(
    model: Model | Decoder,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
    cache: Cache | None = None,
    on_slide: Callable[[], None] | None = None,
    on_logits: Callable[[Tensor], None] | None = None,
    lookup: bool = False,
) -> Iterator[int]:
    """Yield up to max_new_tokens ids that continue `ids`; stop before one of stop_ids.

    vocab_size: the tokenizer's, if the model's head has surplus rows, which are then never drawn.
    generator: a CPU generator; None creates a fresh one, so torch's global generator is never touched.
    cache: one of the model's new_cache(), empty or with a beginning of `ids`; None creates one.
    Between two ids the model is in the mode (train or eval) in which the caller left it.

    The model sees a window of at most model.max_length tokens. When it is full, the oldest tokens are dropped: the
    window is cut to its last max_length // 2 tokens, whose keys and values are recomputed, because positions are
    learned and absolute. on_slide() is called the first time. With and without use_cache the model sees the same
    windows. The repetition penalty counts every token of prompt and continuation, as in transformers.

    on_logits(logits) is called with the logits (V,) of each token just before it is drawn.

    lookup: verify several drafted tokens at a time (generate.lookup), with a Decoder only. The text is the same: each
    token is drawn from its own logits, and a draft only decides which logits are computed early.

    Raise ValueError at the call for invalid arguments.
    """
    rows = model.settings.vocab_size
    vocab_size = rows if vocab_size is None else min(vocab_size, rows)
    _check_prompt(ids, vocab_size)
    _check_options(max_new_tokens, temperature, top_k, top_p, repetition_penalty)
    if generator is None:
        generator = torch.Generator()
        generator.seed()

    def choose(logits: Tensor, seen: Collection[int]) -> int:
        if on_logits is not None:
            on_logits(logits[:vocab_size])
        logits = penalize(logits[:vocab_size], seen, repetition_penalty)
        return next_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)

    if cache is None and use_cache:
        cache = model.new_cache(batch_size=1)
    drafts = Lookup(longest=model.longest_draft) if lookup and isinstance(model, Decoder) else None
    drawn = _stream(model, list(ids), choose=choose, cache=cache, on_slide=on_slide, lookup=drafts)
    stops = frozenset(stop_ids)
    return takewhile(lambda i: i not in stops, islice(drawn, max_new_tokens))


def _check_prompt(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise ValueError("the prompt has no tokens: pass at least one, such as the end-of-text token")
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(
            f"the prompt holds token {outside[0]}, but the vocabulary ends at {vocab_size - 1}; "
            "encode it with the tokenizer of the model"
        )


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> None:
    options = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", top_k, top_k >= 0, "0 (off) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (off)"),
        ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0, with 1 for off"),
    ]
    for name, value, valid, expected in options:
        if not valid:
            raise ValueError(f"{name}={value!r}: expected a number {expected}")


def _stream(
    model: Model | Decoder,
    history: list[int],
    *,
    choose: Callable[[Tensor, Collection[int]], int],
    cache: Cache | None,
    on_slide: Callable[[], None] | None,
    lookup: Lookup | None,
) -> Iterator[int]:
    """Yield ids without end. `history` is the prompt and grows; the window is history[start:]."""
    modules, seen, start = list(model.modules()), set(history), 0
    while True:
        if model.max_length is not None and len(history) - start > model.max_length:
            start = len(history) - max(1, model.max_length // 2)
            if cache is not None:
                cache.length = 0
            if on_slide is not None:
                on_slide()
                on_slide = None
        draft = _draft(lookup, history, start, cache, model.max_length)
        with _evaluating(modules):
            rows = _last_logits(model, history[start:] + draft, cache, last=1 + len(draft))
        taken = 0
        for logits, guess in zip_longest(rows, draft):
            chosen = choose(logits, seen)
            history.append(chosen)
            seen.add(chosen)
            taken += 1
            yield chosen
            if chosen != guess:
                break
        if lookup is not None and cache is not None and draft:
            lookup.learn(len(draft), taken - 1)
            cache.length -= 1 + len(draft) - taken  # drop the states of rejected tokens


def _draft(lookup: Lookup | None, history: list[int], start: int, cache: Cache | None, room: int | None) -> list[int]:
    """Return the tokens to verify after the window: none while the prompt is unread, and none that would not fit."""
    window = len(history) - start
    if lookup is None or cache is None or room is None or cache.length < window - 1:
        return []
    return lookup.draft(history, room - window)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Turn dropout off, then restore the mode of each module: a model in training may hold some in eval mode."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def _last_logits(model: Model | Decoder, window: list[int], cache: Cache | None, *, last: int) -> Iterable[Tensor]:
    """Return the logits (V,) after each of the window's `last` tokens, float32 on the CPU.

    Tokens in the cache are not recomputed.
    """
    fresh = window if cache is None else window[cache.length :]
    if isinstance(model, Decoder):
        return model.rows(fresh, cache if isinstance(cache, DecodeCache) else model.new_cache(), last=last)
    device = next(model.parameters()).device
    logits: Tensor = model(torch.tensor([fresh], device=device), cache=cache, last_only=True).logits  # (1, 1, V)
    return logits[0].float().cpu()
