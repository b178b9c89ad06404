"""The layouts of torch archives: a single `.pt` file, or one for the model and one for the optimizer.

Each archive carries its metadata as a JSON member, so that listing a folder unpickles nothing, and a CRC-32 for each
member. The two archives of a pair carry the same save id, so that files of different saves are never combined.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milepost.ckpt import archive
from milepost.ckpt.foreign.importing import adopted, adopted_metadata
from milepost.ckpt.foreign.keys import WEIGHTS, keys_seen, number_of
from milepost.ckpt.layouts.base import Layout, raise_first
from milepost.ckpt.manifest import check_finished, plain_metadata
from milepost.ckpt.record import (
    EARLIER,
    Checkpoint,
    CheckpointError,
    Json,
    check_metadata,
    from_metadata,
    note_missing_optimizer,
    without_optimizer,
)
from milepost.ckpt.tensors import NO_OPTIMIZER_STATE, checked_tensors, is_optimizer_state
from milepost.ckpt.torch_pickle import Header
from milepost.files import new_file, new_group, written
from milepost.paths import is_real_file

Values = dict[str, Json]


@dataclass(frozen=True, kw_only=True, eq=False)
class ArchiveLayout(Layout):
    """A layout of one or two torch archives; the last of `suffixes` holds the model and makes them visible."""

    # The keys that programs find with torch.load, from the record and its metadata.
    model_keys: Callable[[Checkpoint, Values], dict[str, Any]] | None = None
    optimizer_keys: Callable[[Checkpoint, Values], dict[str, Any]] | None = None  # of a separate archive
    optimizer_state: Callable[[dict[Any, Any], Path], Any] | None = None  # from the keys of the archive that holds it

    writable = True

    def __post_init__(self) -> None:
        """Check that nothing is undeclared that reading and writing need."""
        super().__post_init__()
        self.require(suffixes=self.suffixes, model_keys=self.model_keys, optimizer_state=self.optimizer_state)
        if self.is_pair:
            self.require(optimizer_keys=self.optimizer_keys)

    # -----------------------------------------------------------------------------------------------------------------
    # Which files.

    @property
    def is_pair(self) -> bool:
        """Whether the optimizer's state is in an archive of its own."""
        return len(self.suffixes) == 2

    def detect(self, path: Path) -> bool:
        """Whether `path` is a torch archive; of a pair, whether it is one of its two files by what it holds."""
        if not archive.is_archive(path):
            return False
        return not self.is_pair or (path.name.endswith(self.suffixes) and self._half(path) is not None)

    def _half(self, path: Path) -> str | None:
        """Return `model` or `optimizer`, by what the archive holds; None if it is not part of a pair."""
        by_name = "optimizer" if path.name.endswith(self.suffixes[0]) else "model"
        try:
            half = archive.pair_role(path)
        except CheckpointError:
            return by_name  # damaged: for this layout to refuse
        if half in ("model", "optimizer"):
            return half
        words = archive.pickle_strings(path)  # of another program's archive; empty for ours
        if by_name == "optimizer":
            return "optimizer" if "optimizer_states" in words and not words & set(WEIGHTS) else None
        is_model = {"model_state_dict", "global_step"} <= words and "optimizer_states" not in words
        return "model" if is_model and self.locate(path, self.suffixes[0]).is_file() else None

    def optimizer_file(self, path: Path) -> Path | None:
        """Return the optimizer's archive, if it is separate."""
        return self.locate(path, self.suffixes[0]) if self.is_pair else None

    def parts_of(self, primary: Path, folder: Path) -> list[Path]:
        """Return the visible optimizer's archive in `folder` if it has the save id of `primary`, a model's archive."""
        if not self.is_pair or not primary.name.endswith(self.suffixes[-1]):
            return []
        optimizer = self.locate(folder / primary.name, self.suffixes[0])
        if not (is_real_file(primary) and is_real_file(optimizer)):
            return []
        try:
            model, other = (archive.read_metadata(file) for file in (primary, optimizer))
        except CheckpointError:
            return []
        if not isinstance(model, dict) or not isinstance(other, dict) or other.get("half") != "optimizer":
            return []
        return [optimizer] if model.get("save_id") == other.get("save_id") is not None else []

    def _model(self, path: Path) -> Path:
        return self.locate(path, self.suffixes[-1]) if self.is_pair else path

    def _existing_model(self, path: Path) -> Path:
        model = self._model(path)
        check_finished(model)
        if self.is_pair and not model.is_file():
            problem = f"holds only an optimizer's state, and the model file {model.name} is missing"
            raise CheckpointError(path, problem, f"put {model.name} beside it", kind="lacking")
        return model

    # -----------------------------------------------------------------------------------------------------------------
    # Reading.

    def read_metadata(self, path: Path) -> Values:
        """Return the metadata of the JSON member. Only an archive of another program is unpickled, its tensors mapped."""
        model = self._existing_model(path)
        values = archive.read_metadata(model)
        if values is None:
            return self._metadata_without_member(model)
        member, values = values, check_metadata(values, str(model))
        optimizer = self.optimizer_file(path)
        if optimizer is None:
            return _of_a_pair(values, member)
        if not optimizer.is_file():
            return without_optimizer(values)
        _check_same_save(model, optimizer)
        return values

    def _metadata_without_member(self, model: Path) -> Values:
        content, _ = archive.load(model)
        values = self._saved_again(content)
        if values is not None:
            return check_metadata(values, str(model))
        return adopted_metadata(model, self._foreign_keys(model, content), layout=self.name)

    def _saved_again(self, content: dict[Any, Any]) -> Json:
        """Return the metadata among the keys: torch.save of a loaded archive drops the JSON member."""
        return None if self.is_pair else content.get("metadata")

    def read(self, path: Path, *, optimizer: bool = True, verify: bool = False) -> Checkpoint:
        """Return the record, by either archive of a pair. Without the optimizer's it only generates, with a note.

        Raises CheckpointError, also for two archives of different saves. Never runs code from them.
        """
        if verify:
            raise_first(self.problems(path) if optimizer else self._problems_of_model(path))
        model, separate = self._existing_model(path), self.optimizer_file(path)
        content, values = archive.load(model)
        values = self._saved_again(content) if values is None else values
        if values is None:
            keys = self._foreign_keys(model, content) if optimizer else content
            return adopted(model, keys, layout=self.name, optimizer=optimizer)
        record = _without_optimizer(model, content, {name: value for name, value in values.items() if name != "half"})
        if separate is None:
            record.optimizer_state = self._state(content, model) if optimizer else None
            record.parts = _of_a_pair({"parts": record.parts}, values)["parts"]
        elif not separate.is_file():
            note_missing_optimizer(record, separate)
        elif optimizer:
            _check_same_save(model, separate)
            record.optimizer_state = self._state(archive.load(separate)[0], separate)
        else:
            record.notes += _damage_of_optimizer(model, separate)
        record.path, record.layout = model, self.name
        return record

    def _problems_of_model(self, path: Path) -> list[CheckpointError]:
        """Compare the bytes of the model with their CRC-32; of an archive of ours, not those of the optimizer beside it."""
        model = self._existing_model(path)
        if self.is_pair or archive.read_metadata(model) is None:
            return archive.verify(model)
        assert self.optimizer_state is not None
        content = archive.headers(model)
        state = self.optimizer_state(content, model)
        others = [value for value in content.values() if value is not state]
        return archive.verify(model, spared=_storages(state) - _storages(others))

    def _state(self, content: dict[Any, Any], path: Path) -> Any:
        assert self.optimizer_state is not None
        state = self.optimizer_state(content, path)
        if state is not None and not is_optimizer_state(state):
            raise CheckpointError(path, NO_OPTIMIZER_STATE, EARLIER, kind="damaged")
        return state

    def _foreign_keys(self, model: Path, content: dict[Any, Any]) -> dict[Any, Any]:
        """Return another program's keys as if in a single archive; a pair belongs together by its step."""
        separate = self.optimizer_file(model)
        if separate is None or not separate.is_file():
            return content
        rest, _ = archive.load(separate)
        if number_of(rest.get("global_step")) != number_of(content.get("global_step")):
            problem = f"belongs to another step than {model.name}"
            raise CheckpointError(separate, problem, _move_away(model), kind="refused")
        return {**rest, **content}

    def problems(self, path: Path) -> list[CheckpointError]:
        """Compare the bytes of each archive with their CRC-32."""
        try:
            self._existing_model(path)
        except CheckpointError as error:
            return [error]
        return [problem for file in self.files(path) for problem in archive.verify(file)]

    # -----------------------------------------------------------------------------------------------------------------
    # Writing.

    def write(self, record: Checkpoint, folder: Path, stem: str) -> Path:
        """Write the archives; without an optimizer, only the model's."""
        assert self.model_keys is not None
        values = plain_metadata(record)
        *_, model = paths = self.targets(folder, stem)
        if not self.is_pair:
            with new_file(model) as file:
                archive.dump(self.model_keys(record, values), file, metadata=values)
            return model
        if record.optimizer_state is None:
            paths = [model]
        with new_group(folder, [path.name for path in paths]) as hidden:
            if record.optimizer_state is not None:
                self._write_optimizer(hidden / paths[0].name, record, values)
            with written(hidden / model.name) as file:
                archive.dump(self.model_keys(record, values), file, metadata=values | {"half": "model"})
        return model

    def _write_optimizer(self, path: Path, record: Checkpoint, values: Values) -> None:
        assert self.optimizer_keys is not None
        member = {"save_id": record.save_id, "run_id": record.run_id, "step": record.step, "half": "optimizer"}
        with written(path) as file:
            archive.dump(self.optimizer_keys(record, values), file, metadata=member)


def _of_a_pair(values: Values, member: Values) -> Values:
    """Return the metadata of an archive: a pair's model file holds no optimizer, whatever it is now named."""
    return without_optimizer(values) if member.get("half") == "model" else values


def _without_optimizer(path: Path, content: dict[Any, Any], values: Json) -> Checkpoint:
    if "model_state_dict" not in content and "optimizer_states" in content:
        problem = "holds only an optimizer's state, and its name is not that of a pair"
        raise CheckpointError(path, problem, "name it <name>-optimizer.pt, beside <name>-model.pt", kind="lacking")
    if "model_state_dict" not in content:
        problem = (
            f"does not contain model_state_dict (keys seen: {keys_seen(content)}): it is damaged, or another program's"
        )
        raise CheckpointError(path, problem, EARLIER, kind="not understood")
    model_state = checked_tensors(content["model_state_dict"], str(path))
    return from_metadata(values, model_state=model_state, optimizer_state=None, where=str(path))


def _check_same_save(model: Path, optimizer: Path) -> None:
    ids = [(archive.read_metadata(file) or {}).get("save_id") for file in (model, optimizer)]
    if ids[0] != ids[1]:
        problem = f"belongs to another save than {model.name} ({ids[1]!r:.40}, not {ids[0]!r:.40})"
        raise CheckpointError(optimizer, problem, _move_away(model), kind="refused")


def _damage_of_optimizer(model: Path, optimizer: Path) -> list[str]:
    """Return a note if the optimizer's file is damaged, which only a resume needs; raise if it is of another save."""
    try:
        _check_same_save(model, optimizer)
    except CheckpointError as error:
        if error.path != optimizer or error.kind == "refused":
            raise
        return [f"{error}; {model.name} is whole and is used without it"]
    return []


def _move_away(model: Path) -> str:
    return f"move it away to open {model.name} without an optimizer"


def _storages(value: Any) -> set[str]:
    """Return the keys of the storages of all tensors in nested values, whose tensors are headers."""
    if isinstance(value, Header):
        return {value.storage}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_storages, parts))
