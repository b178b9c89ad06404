"""Match another program's optimizer state with the parameters of its model, and translate it as their weights are.

torch numbers the parameters and, but for `named_parameters()`, stores no names. The number of a parameter is known from
the order of the weights and the ways in which programs group them; a match counts only if every shape fits, and only if
no other way gives another match. Pure functions; no value is trusted.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from milepost.ckpt.foreign.keys import number_of, plain, short
from milepost.ckpt.record import CheckpointError
from milepost.ckpt.tensors import check_dense
from milepost.lazy import Tensor, torch

OPTIMIZERS = (
    *("optimizer", "optimizer_state_dict", "optimizer_states", "optim_state", "optimizer_state", "optim"),
    *("optim_state_dict", "opt_state", "opt", "optimizers"),
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW, besides the step
Shapes = Mapping[str, tuple[int, ...]]
Translate = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Found = tuple[dict[str, Any] | None, str | None]


class _Unusable(Exception):
    """The state is there but cannot be used; the text completes "it is present but cannot be used: ..."."""


def saved_optimizer(content: Mapping[Any, Any]) -> Any:
    """Return the optimizer's state in `content`, or None: also for an empty list, and for a list of None."""
    saved = next((content[word] for word in OPTIMIZERS if content.get(word) is not None), None)
    if isinstance(saved, list | tuple):
        states = [state for state in saved if state is not None]
        saved = states[0] if len(states) == 1 else states or None
    return saved


def matched(
    saved: Any,
    theirs: Shapes,
    ours: Shapes,
    translate: Translate,
    *,
    whole: bool = True,
    ways: Iterable[list[list[str]]] | None = None,
) -> Found:
    """Return torch's AdamW state for our parameters, with `param_names` in its groups, or None and the reason.

    `theirs` and `ours` have the parameters in their order; `translate` turns tensors under their names into tensors
    under ours, as it does with the weights. If not `whole`, no tensor is read and only the groups are right. `ways` are the
    program's ways to group its parameters, if it is known; else all ways that any program has are tried.
    """
    if saved is None:
        return None, None
    try:
        groups, state = _parts(saved)
        names = _names(groups, state, theirs, ways)
        moments = {names[index]: _moments(kinds, theirs[names[index]], names[index]) for index, kinds in state.items()}
        values = _translated(moments, theirs, ours, translate, whole=whole)
    except (_Unusable, CheckpointError) as error:
        problem = error.problem if isinstance(error, CheckpointError) else error
        return None, f"its optimizer state is present but cannot be used: {problem}"
    numbered = {name: number for number, name in enumerate(ours)}
    return {
        "state": {numbered[name]: kinds for name, kinds in values.items()},
        "param_groups": list(_our_groups(groups, names, theirs, ours, numbered)),
    }, None


# ---------------------------------------------------------------------------------------------------------------------
# torch's form.


def _parts(saved: Any) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Return groups and state; raise _Unusable unless they have torch's form."""
    if isinstance(saved, list):
        raise _Unusable(f"it is of {len(saved)} optimizers, and AdamW's alone is restored")
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    state = saved.get("state") if isinstance(saved, Mapping) else None
    if not isinstance(groups, list) or not groups or not isinstance(state, Mapping):
        raise _Unusable("it has no param_groups and state as torch's optimizers have")
    numbers: list[int] = []
    for group in groups:
        params = group.get("params") if isinstance(group, dict) else None
        if not isinstance(params, list) or any(type(number) is not int for number in params):
            raise _Unusable("its param_groups list no parameters")
        if not all(isinstance(word, str) and word.isprintable() for word in group):
            raise _Unusable("its param_groups have fields without a name")
        numbers += params
    if len(set(numbers)) != len(numbers) or not state.keys() <= set(numbers):
        raise _Unusable("its state and its param_groups list different parameters")
    if not state:
        raise _Unusable("it is empty, as before the first step")
    return groups, dict(state)


def _moments(kinds: Any, shape: tuple[int, ...], name: str) -> dict[str, Any]:
    """Return a parameter's moments and its step; raise _Unusable or CheckpointError unless they are Adam's."""
    if not isinstance(kinds, Mapping) or kinds.keys() != {"step", *MOMENTS}:
        words = ", ".join(sorted(map(str, kinds)))[:80] if isinstance(kinds, Mapping) else short(kinds)
        raise _Unusable(f"it holds {words or 'nothing'} for {name:.80}, expected step, exp_avg and exp_avg_sq of AdamW")
    for kind in MOMENTS:
        check_dense(kinds[kind], "", kind)
        if tuple(kinds[kind].shape) != shape:
            raise _Unusable(f"its {kind} of {name:.80} is {tuple(kinds[kind].shape)}, expected {shape}")
    step = kinds["step"]
    plain_step = isinstance(step, int | float) and not isinstance(step, bool)
    if not plain_step and not (isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta):
        raise _Unusable(f"its step of {name:.80} is {short(step)}, expected a number")
    return dict(kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Which parameter has which number.


def _names(
    groups: list[dict[str, Any]], state: Mapping[int, Any], theirs: Shapes, ways: Iterable[list[list[str]]] | None
) -> dict[int, str]:
    """Return the name of each parameter by its number; raise _Unusable if it is not known beyond doubt."""
    numbers = [group["params"] for group in groups]
    if all(isinstance(group.get("param_names"), list) for group in groups):
        known = [[_stripped(group["param_names"], theirs) for group in groups]]
    else:
        known = [way for way in (_ways(theirs) if ways is None else ways) if len(way) == len(groups)]
    fitting: list[dict[int, str]] = []
    for way in known:
        if [len(names) for names in way] != [len(each) for each in numbers]:
            continue
        found = {n: name for each, names in zip(numbers, way, strict=True) for n, name in zip(each, names, strict=True)}
        if found not in fitting and all(_shape_of(kinds) == theirs.get(found[n]) for n, kinds in state.items()):
            fitting.append(found)
    if len(fitting) == 1:
        return fitting[0]
    count, total = len(groups), sum(map(len, numbers))
    described = f"{count} {'groups' if count > 1 else 'group'} of {total} parameters without names"
    reason = "fit in several ways" if fitting else f"do not fit the {len(theirs)} parameters of the model"
    raise _Unusable(f"its {described} {reason}")


def _stripped(names: list[Any], theirs: Shapes) -> list[str]:
    """Return the parameter that each name means: the longest one that it ends with."""
    longest_first = sorted(theirs, key=len, reverse=True)
    return [next((own for own in longest_first if f".{name}".endswith(f".{own}")), str(name)) for name in names]


def _shape_of(kinds: Any) -> tuple[int, ...] | None:
    """Return the shape of the parameter that a state belongs to, by its largest tensor."""
    shapes = (
        [tuple(value.shape) for value in kinds.values() if isinstance(value, Tensor)]
        if isinstance(kinds, Mapping)
        else []
    )
    return max(shapes, key=len, default=None)


def wide_and_flat(theirs: Shapes) -> list[list[str]]:
    """Return the parameters with weight decay, which are those of two dimensions or more, and the others."""
    return [[name for name in theirs if (len(theirs[name]) >= 2) is wide] for wide in (True, False)]


def _ways(theirs: Shapes) -> Iterator[list[list[str]]]:
    """Yield the known ways to group the parameters: all, by dimension (nanoGPT), by kind in alphabetical order (minGPT)."""
    names = list(theirs)
    yield [names]
    wide, flat = wide_and_flat(theirs)
    yield [wide, flat]
    yield [flat, wide]
    linear = {name for name in wide if not name.endswith(("wte.weight", "wpe.weight", "embedding_table.weight"))}
    # minGPT's names but the head's begin with transformer., after which the order is alphabetical.
    yield [sorted(linear, key=lambda name: (name != "lm_head.weight", name)), sorted(set(names) - linear)]


# ---------------------------------------------------------------------------------------------------------------------
# Under our names.


def _translated(
    moments: Mapping[str, dict[str, Any]], theirs: Shapes, ours: Shapes, translate: Translate, *, whole: bool
) -> dict[str, dict[str, Tensor]]:
    """Return moments and step of each of our parameters; of those that theirs lack, as before the first step."""
    if missing := [name for name in theirs if name not in moments]:
        raise _Unusable(f"it holds nothing for {missing[0]:.80}")
    found = {kind: translate({name: kinds[kind] for name, kinds in moments.items()}) for kind in MOMENTS}
    if any(set(values) != set(ours) for values in found.values()):
        raise _Unusable("it is of other parameters than the weights")
    steps = {name: _step(kinds["step"]) if whole else torch.zeros(()) for name, kinds in moments.items()}
    last = max(steps.values(), key=float)
    values = {}
    for name in ours:
        values[name] = {"step": steps.get(name, last), **{kind: found[kind][name] for kind in MOMENTS}}
        if whole and name not in steps and not values[name]["exp_avg_sq"].any():
            values[name]["step"] = torch.zeros(())
    return values


def _step(value: Any) -> Tensor:
    return torch.tensor(float(number_of(value)), dtype=torch.float32)


def _our_groups(
    groups: list[dict[str, Any]], names: Mapping[int, str], theirs: Shapes, ours: Shapes, numbered: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Yield the groups with our parameters: those of one name stay in their group, others join one of their dimensions."""
    place = {names[number]: at for at, group in enumerate(groups) for number in group["params"]}
    by_dimension = {len(theirs[name]): at for name, at in place.items()}
    own = {name: place.get(name, by_dimension.get(len(shape), 0)) for name, shape in ours.items()}
    for at, group in enumerate(groups):
        held = [name for name in ours if own[name] == at]
        fields = {word: plain(value)[1] for word, value in group.items() if plain(value)[0]}
        yield fields | {"params": [numbered[name] for name in held], "param_names": held}
