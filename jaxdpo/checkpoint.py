"""Checkpoints of a stage: save, resume, load parameters alone. Orbax v1 behind one door.

Saving is asynchronous and atomic: a run killed at any moment finds the last complete step. Orbax
does not see a bit that changed on the disk, so what was saved is fingerprinted and what is loaded
compared (`fingerprint`). A step that cannot be trusted is set aside, as `STEP.spoilt`, and
training goes on from the one before it. The parameters and the rest of the state are two items
of a checkpoint, so a later stage reads the parameters without the moments.

Left out: what a checkpoint means for a run (`train`), and export (`convert`).
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdpo import InputError, processes
from jaxdpo.fingerprint import fingerprints, kind
from jaxdpo.step import TrainState


class Spoilt(InputError):
    """A checkpoint that is not what was saved."""


class Checkpoints:
    """The checkpoints in `folder`: the latest `keep` and the one with the lowest `loss`.

    Used as a context manager, which waits for saves under way. `clean` is for the one who writes:
    it deletes what a killed save left behind (a save under way looks the same) and sets aside,
    telling `say`, what cannot be trusted, where others raise `Spoilt`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        clean: bool = False,
        say: Callable[[str], None] = print,
    ):
        policies = ocp.training.preservation_policies
        lowest_loss = policies.BestN(
            n=1, get_metric_fn=_loss, reverse=True, keep_checkpoints_without_metrics=False
        )
        self.folder = Path(os.path.abspath(folder))  # Orbax fails later on a relative path
        self._clean, self._say = clean, say
        processes.from_first(self._check_metrics)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep), lowest_loss]
            ),
            cleanup_tmp_directories=clean,
        )

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss among those kept, or None."""
        losses = {step: self._record(step)["loss"] for step in self._steps()}
        scored = [step for step, loss in losses.items() if loss is not None]
        return min(scored, key=losses.__getitem__, default=None)

    def save(self, step: int, state: TrainState, *, loss: float | None) -> None:
        """Start saving; the state may be donated at once. `loss` ranks the checkpoint.

        Raises `InputError` where there is no room for it, or was none for the one before.
        """
        self._check_room(state)
        items = _items(state)
        record = {"loss": loss, "fingerprints": fingerprints(items)}
        with self._room_is_told():
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                metrics=None if loss is None else {"loss": loss},
                custom_metadata=record | {"sha256": _sha256(record)},
            )

    def restore_latest(self, state: TrainState) -> tuple[int, TrainState] | None:
        """The newest step that is what was saved, and its state; None where nothing was saved.

        Raises `InputError` where something was and none of it can be trusted.
        """
        for step in sorted(self._steps(), reverse=True):
            try:
                return step, self.restore(step, state)
            except Spoilt as error:
                processes.from_first(functools.partial(self._set_aside, step, error))
                self._checkpointer.reload()  # the step is to be saved again
        if any(self.folder.glob("*.spoilt")):
            raise InputError(
                f"{self.folder}: none of its checkpoints can be trusted; delete "
                f"{self.folder.parent} to begin the stage anew"
            )
        return None

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of `step`, with the shapes, dtypes and shardings of `state`'s leaves.

        Raises `Spoilt` where it cannot be read or is not what was saved, and `InputError` where
        it is of another model.
        """
        loaded = self._load(step, _items(state))
        return loaded["rest"]._replace(params=loaded["params"])

    def restore_params(self, step: int, params: Any) -> Any:
        """The parameters alone, with the shapes, dtypes and shardings of `params`' leaves."""
        return self._load(step, {"params": params})["params"]

    def _steps(self) -> list[int]:
        """As the first process sees them: a network's file system may show others less."""
        return processes.from_first(lambda: [c.step for c in self._checkpointer.checkpoints])

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        saved = self._record(step)["fingerprints"]
        _check_kinds(self._named(step), abstract, saved)
        fault, loaded = None, {}
        try:
            loaded = self._checkpointer.load_checkpointables(step, abstract)
        except (jax.errors.JaxRuntimeError, MemoryError):  # no room: the checkpoint is good
            raise
        except Exception as error:  # Orbax wraps the cause in a misleading "no entry"
            fault = error.__context__ or error
        # Each process has read its own parts, but all must take the same step.
        if processes.of_each(np.array([fault is not None])).any():
            raise self._unreadable(step, fault or "so another process says") from fault
        for path, found in fingerprints(loaded).items():
            if found != saved[path]:
                raise Spoilt(f"{self._named(step)} is not what was saved: {path} has changed")
        return loaded

    def _record(self, step: int) -> dict[str, Any]:
        """What was written beside a step: its loss, and the fingerprints of what was saved."""
        try:
            found = self._checkpointer.checkpointables_metadata(step).custom_metadata
            claimed = found.pop("sha256")
        except Exception as error:
            raise self._unreadable(step, error) from error
        if _sha256(found) != claimed:
            raise self._unreadable(step, "its record is not what was written")
        return found

    def _check_metrics(self) -> None:
        """Set aside steps whose metrics Orbax cannot read: it opens no folder with such a step."""
        for file in sorted(self.folder.glob("*[0-9]/metrics/metrics")):  # none that is set aside
            step = file.parent.parent.name
            try:
                json.loads(file.read_text())["loss"] + 0.0
            except (ValueError, KeyError, TypeError) as error:
                self._set_aside(step, self._unreadable(step, error))

    def _set_aside(self, step: int | str, fault: Spoilt) -> None:
        if not self._clean:
            raise fault
        aside = self.folder / f"{step}.spoilt"
        os.replace(self.folder / str(step), aside)
        self._say(f"warning: {fault}; it is set aside as {aside.name}")

    def _unreadable(self, step: int | str, why: object) -> Spoilt:
        said = str(why).partition("\n")[0].partition(" See full")[0]
        return Spoilt(f"{self._named(step)} cannot be read ({said})")

    def _named(self, step: int | str) -> str:
        return f"{self.folder / str(step)}: this checkpoint"

    def wait(self) -> None:
        """Block until every save is on disk; errors of earlier saves surface here."""
        with self._room_is_told():
            self._checkpointer.wait()

    def _check_room(self, state: TrainState) -> None:
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._no_room(f"needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} are free")

    @contextlib.contextmanager
    def _room_is_told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever class the writer's thread met it as
            if "No space left" not in f"{error} {error.__cause__} {error.__context__}":
                raise
            raise self._no_room("did not fit on the disk") from error

    def _no_room(self, why: str) -> InputError:
        step = "the beginning" if self.latest_step is None else f"step {self.latest_step}"
        return InputError(
            f"{self.folder}: a checkpoint {why}; make room there, and the same command goes on "
            f"from {step}"
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._room_is_told():
            self._checkpointer.close()  # waits for a save under way


def _check_kinds(checkpoint: str, abstract: Any, saved: dict[str, str]) -> None:
    """Refuse a checkpoint of other arrays: Orbax would cast them without a word."""
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = saved.get(name, "missing").split()[0]
        if found != kind(leaf):
            raise InputError(
                f"{checkpoint} is of another model: {name} is {found}, not {kind(leaf)}"
            )


def _sha256(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "rest": state._replace(params=())}


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def abstract(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and dtypes placed by `shardings`: what `restore` is told to make."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )
