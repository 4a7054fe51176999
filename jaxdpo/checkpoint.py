"""Checkpoints of a stage: save, resume, load parameters alone. Orbax v1 behind one door.

Saving is asynchronous and atomic: a run killed at any moment finds the last complete step.
The parameters and the rest of the state are two items of a checkpoint, so a later stage
reads the parameters without the moments.

Left out: what a checkpoint means for a run (`train`), and export (`convert`).
"""

import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxdpo import InputError
from jaxdpo.step import TrainState


class Checkpoints:
    """The checkpoints in `folder`: the latest `keep` and the one with the lowest `loss`.

    Used as a context manager, which waits for saves under way. `clean` deletes what a killed
    save left behind, and is for the one who writes: a save under way looks the same.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, clean: bool = False):
        policies = ocp.training.preservation_policies
        lowest_loss = policies.BestN(
            n=1, get_metric_fn=_loss, reverse=True, keep_checkpoints_without_metrics=False
        )
        self.folder = Path(os.path.abspath(folder))  # Orbax fails later on a relative path
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
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss among those kept, or None."""
        scored = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        return min(scored, key=lambda c: _loss(c.metrics)).step if scored else None

    def save(self, step: int, state: TrainState, *, loss: float | None) -> None:
        """Start saving; the state may be donated at once. `loss` ranks the checkpoint."""
        metrics = None if loss is None else {"loss": loss}
        self._checkpointer.save_checkpointables_async(step, _items(state), metrics=metrics)

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state of `step`, with the shapes, dtypes and shardings of `state`'s leaves."""
        loaded = self._load(step, _items(state))
        return loaded["rest"]._replace(params=loaded["params"])

    def restore_params(self, step: int, params: Any) -> Any:
        """The parameters alone, with the shapes, dtypes and shardings of `params`' leaves."""
        return self._load(step, {"params": params})["params"]

    def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._checkpointer.load_checkpointables(step, abstract)
        except (jax.errors.JaxRuntimeError, MemoryError):  # no room: the checkpoint is good
            raise
        except Exception as error:  # Orbax wraps the cause in a misleading "no entry"
            cause = error.__context__ or error
            raise InputError(
                f"{self.folder / str(step)}: this checkpoint cannot be read ({cause}); move the "
                "folder away to go on from the one before it"
            ) from error

    def wait(self) -> None:
        """Block until every save is on disk; errors of earlier saves surface here."""
        self._checkpointer.wait()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._checkpointer.close()  # waits for a save under way


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "rest": state._replace(params=())}


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def abstract(tree: Any, shardings: Any) -> Any:
    """The tree's shapes and dtypes placed by `shardings`: what `restore` is told to make."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )
