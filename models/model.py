"""What every model declares: the base class of the models, and what a forward pass returns.

A trait that the rest of the project reads is an attribute or a method here. Those without a default must be declared by
each model; `models.load` refuses a class that lacks one, by its name.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn


class Output(NamedTuple):
    """The result of a forward pass.

    logits are (B, T, V), (B, 1, V) with last_only, and may be None with targets. `loss` is what training minimises,
    0-dim, in nats per token; None without targets. `metrics` are further 0-dim tensors to log, by name, such as the
    parts of the loss: training detaches them and averages them over micro-batches and processes.
    """

    logits: Tensor | None
    loss: Tensor | None
    metrics: dict[str, Tensor]


class Cache(Protocol):
    """What a model keeps of the `length` tokens it has seen, so that it need not compute them again."""

    length: int


class Model(nn.Module):
    """A language model over token ids, built from its settings.

    In the shapes below B is the batch, T the tokens, V the vocabulary.
    """

    # A frozen dataclass with at least vocab_size and block_size. A field that has the name of a variable (N_EMBD) takes
    # its value; at a resume the checkpoint's, unless the variable's scope is math (DROPOUT).
    settings_type: ClassVar[type[Any]]
    # Tables with a row for each position of block_size: a smaller block_size crops them.
    position_tables: ClassVar[tuple[str, ...]] = ()
    # Whether compiling the training step on CUDA saves more time than it takes, from a thousand steps on.
    compile_pays: ClassVar[bool] = False
    # The settings of pretrained models by their name on the hub.
    published: ClassVar[Mapping[str, Any]] = {}

    settings: Any  # of settings_type

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @property
    def max_length(self) -> int | None:
        """The most tokens that forward() takes, including those in the cache; None for no limit."""
        return None

    @property
    def packs(self) -> bool:
        """Whether a row may hold several texts: forward() then takes the `positions` (B, T) of the ids as a third argument,
        where 0 begins another text, of which nothing before it may be seen.
        """
        return False

    def forward(
        self, ids: Tensor, targets: Tensor | None = None, *, cache: Any = None, last_only: bool = False
    ) -> Output:
        """Return the logits of each next token, and with targets the loss; ids and targets are int64 (B, T).

        The loss is the mean over the targets that are not below 0; of conversations, only some count.

        With a cache the ids follow the tokens it holds, and it grows by T. With last_only the logits are those after
        the last token.
        """
        raise NotImplementedError

    def new_cache(self, batch_size: int) -> Cache | None:
        """Return an empty cache for forward(), or None if the model has none:
        it then reads the whole window for each token.
        """
        return None

    def activation_bytes(self, batch_size: int, *, bytes_per_value: int, device_type: str | None = None) -> int:
        """Return about how many bytes a training step needs besides weights, gradients and optimizer state.

        bytes_per_value is that of activations, 4 or 2; device_type the device's, by default that of the weights.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the modules whose parameters FSDP gathers together, one module at a time;
        with none it gathers the whole model.
        """
        return []

    def probe_settings(self) -> Any:
        """Return the settings of the smallest model that computes as this one does, at the same widths: one block."""
        return self.settings

    def muon_matrices(self) -> dict[str, int]:
        """Return the names of the matrices whose updates Muon may orthogonalize, and of how many matrices,
        stacked by rows, each consists.
        """
        return {}

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Return whether weight decay applies to the parameter: to what multiplies, not to biases and norms."""
        return parameter.dim() >= 2


# Traits without a default, and what they are for.
REQUIRED = {
    "settings_type": "the dataclass of its settings",
    "forward": "the forward pass, which returns an Output",
    "activation_bytes": "the memory of a training step",
}


def undeclared(model: type[Model]) -> str | None:
    """Return one sentence naming the traits that a class of model must declare and does not;
    None if it declares all.
    """
    lacks = [name for name in REQUIRED if getattr(model, name, None) is getattr(Model, name, None)]
    if not lacks:
        return None
    named = ", ".join(f"{name} ({REQUIRED[name]})" for name in lacks)
    return f"{model.__module__}.{model.__name__} does not declare {named}; see models/model.py"
