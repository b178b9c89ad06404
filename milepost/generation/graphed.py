"""The fast decoder on a GPU: a pass of one token is captured once as a CUDA graph, and replayed for every further token.

Such a pass is some hundred small kernels, and to start each of them from Python takes longer than to compute it. A graph
fixes every address and every shape. So keys and values lie in one buffer, of which a token attends to the whole and masks
what is not there yet, and the token and its position are read from the device. Where the buffer grows, the pass is captured
again. On a CPU the same pass runs without a graph, for tests.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from milepost.generation.decoder import DecodeCache, Decoder
from models.linears import cast_linear
from models.model import Model

WARM_UPS: Final = 2  # passes before the capture, in which libraries allocate what they keep
FEWEST_TOKENS: Final = 32  # a capture takes about as long as it saves on so many tokens


class GraphCache(DecodeCache):
    """Keys and values, zero where no token was seen, and the pass that reads and writes them where they are now."""

    def __init__(self, shape: tuple[int, int, int], block_size: int, device: torch.device) -> None:
        super().__init__(shape, block_size, device)
        self.states.zero_()
        self.replay: Callable[[int, int], Tensor] | None = None

    def states_for(self, tokens: int) -> Tensor:
        """Return the buffer with room for so many tokens; a larger one needs a pass of its own."""
        before, states = self.states, super().states_for(tokens)
        if states is not before:
            states[..., self.length :, :] = 0  # a weight of zero does not hide what is not a number
            self.replay = None
        return states


class GraphDecoder(Decoder):
    """A trained model on a GPU for sampling.generate(). `weights` is the dtype of the stored matrices."""

    chunk = sys.maxsize  # a prompt is read in one pass: small products would leave most of a GPU idle

    def __init__(self, model: Model, *, weights: str) -> None:
        super().__init__(model, weights=weights, linear=partial(cast_linear, dtype=getattr(torch, weights)))
        self.device = self.parts.head_weight.device

    def new_cache(self, batch_size: int = 1) -> GraphCache:
        """Return an empty cache for rows()."""
        return GraphCache(self.parts.cache_shape, self.settings.block_size, self.device)

    def agrees(self, rows: int | None = None) -> bool:
        """Return False: a pass of several tokens has other kernels here, and so other bits."""
        return False

    @torch.inference_mode()
    def rows(self, ids: Sequence[int], cache: DecodeCache, *, last: int = 1) -> Iterable[Tensor]:
        """Return the float32 logits (V,) after each of the `last` ids, in main memory. The ids follow the tokens in the
        cache, which grows.
        """
        if not isinstance(cache, GraphCache) or len(ids) > 1 or cache.length == 0:
            return [logits.cpu() for logits in super().rows(ids, cache, last=last)]
        (token,), position = ids, cache.length
        states = cache.states_for(position + 1)
        if cache.replay is None:
            cache.replay = self._prepared(states, token, position)
        cache.length += 1
        return [cache.replay(token, position).cpu()]

    def _prepared(self, states: Tensor, token: int, position: int) -> Callable[[int, int], Tensor]:
        """Return a function of a token and its position that returns the logits (V,) after it. Preparing it takes the pass
        of this token at this position.
        """
        ids, positions = (torch.tensor([value], device=self.device) for value in (token, position))
        places = torch.arange(states.size(4), device=self.device)

        def step() -> Tensor:
            x = self._read(ids, positions, lambda number, q, k, v: _attend(q, k, v, states[number], positions, places))
            (logits,) = self._logits(x)
            return logits

        run = _captured(step, self.device)

        def replay(token: int, position: int) -> Tensor:
            ids.fill_(token)
            positions.fill_(position)
            return run()

        return replay


def _captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return a function that replays the kernels of a step; its result is overwritten by the next call. On a CPU, and where
    a step cannot be captured, return the step itself.
    """
    if device.type != "cuda":
        return step
    beside, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(beside)
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step()
    except RuntimeError:
        return step

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def _attend(q: Tensor, k: Tensor, v: Tensor, states: Tensor, position: Tensor, places: Tensor) -> Tensor:
    """Return the attention's output (1, H hs) of one token for its heads: q (1, H, hs), k and v (1, KV, hs).

    Keys and values are written to states (2, 1, KV, room, hs) at `position` (1,), and read up to it; `places` are (room,).
    """
    (_, H, hs), KV = q.shape, k.size(1)
    keys, values = states[:, 0].unbind()  # each (KV, room, hs)
    keys.index_copy_(1, position, k.transpose(0, 1))
    values.index_copy_(1, position, v.transpose(0, 1))
    scores = q.view(KV, H // KV, hs) @ keys.transpose(1, 2) / math.sqrt(hs)  # (KV, H / KV, room)
    weights = scores.masked_fill(places > position, -torch.inf).softmax(-1)
    return (weights @ values).view(1, -1)
