"""What one update does: the state, the objectives, the optimizer and the jitted step.

An objective is `objective(params, batch) -> (loss_sum, weight_sum, metrics)`, where every
metric is a `(sum, count)` of its own: sums and counts are added over micro-batches, rows
and devices, and divided once at the end, so no split of a batch changes a number. SFT and
DPO differ in this argument and in nothing else.

Left out: files, clocks and the order of things (`train`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxdpo import losses, pythia, qfunction, sharding
from jaxdpo.batching import Batch
from jaxdpo.pythia_config import PythiaConfig

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count), scalars
Objective = Callable[[Any, Batch], tuple[jax.Array, jax.Array, Metrics]]


class TrainState(NamedTuple):
    """All that an update changes."""

    step: jax.Array  # int32: batches consumed, skipped ones included
    params: Any
    opt_state: Any
    skipped: jax.Array  # int32: steps left out because something was not finite
    skipped_in_a_row: jax.Array  # int32


def token_logps(config: PythiaConfig, params: Any, batch: Batch) -> Float[Array, "B S"]:
    """The model's log-probability of each scored token of a batch, [B, S] float32."""
    hidden = pythia.hidden_states(
        config, params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids
    )
    hidden = qfunction.scored_hidden(hidden, batch.scored_positions)
    return qfunction.token_logps(
        hidden, params["unembedding"], batch.targets, logits_memory=config.logits_memory
    )


def sft_objective(config: PythiaConfig) -> Objective:
    """Maximum likelihood of the chosen response; weights are pairs.

    loss = -(1 / pairs) sum_pairs sum_t log pi(y_t | x, y_<t); the metric
    `loss_per_token` divides the same sum by the scored tokens instead.
    """

    def objective(params, batch):
        logps = qfunction.response_sums(
            token_logps(config, params, batch), batch.slots, batch.examples
        )[..., 0]
        pair_losses, real = losses.sft_loss(logps), batch.examples >= 0
        metrics = _pair_means({"loss": pair_losses, "logps/chosen": logps}, real)
        loss_sum, pairs = metrics["loss"]
        tokens = (batch.slots >= 0).sum().astype(jnp.float32)
        return loss_sum, pairs, metrics | {"loss_per_token": (loss_sum, tokens)}

    return objective


def preference_objective(
    config: PythiaConfig, pair_loss: Callable[..., jax.Array], *, beta: float
) -> Objective:
    """A preference loss over the batch's pairs against the cached reference.

    `pair_loss` takes the four sums of log-probabilities, e.g.
    `partial(losses.dpo_loss, beta=0.1)`; `beta` scales the reported rewards. Metrics
    follow the official DPO code; `accuracies` counts strictly greater rewards.
    """

    def objective(params, batch):
        policy, reference = (
            qfunction.response_sums(values, batch.slots, batch.examples)
            for values in (token_logps(config, params, batch), batch.reference_token_logps)
        )
        pair_losses = pair_loss(
            policy[..., 0], policy[..., 1], reference[..., 0], reference[..., 1]
        )
        rewards = losses.implicit_rewards(policy, reference, beta=beta)
        margins = rewards[..., 0] - rewards[..., 1]
        values = {
            "loss": pair_losses,
            "rewards/chosen": rewards[..., 0],
            "rewards/rejected": rewards[..., 1],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
            "logps/chosen": policy[..., 0],
            "logps/rejected": policy[..., 1],
        }
        metrics = _pair_means(values, batch.examples >= 0)
        return *metrics["loss"], metrics

    return objective


def _pair_means(values: dict[str, jax.Array], real: jax.Array) -> Metrics:
    count = real.sum().astype(jnp.float32)
    return {name: (jnp.where(real, value, 0.0).sum(), count) for name, value in values.items()}


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics as plain numbers: each sum over its count."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


def warmup(peak: float, warmup_steps: int) -> optax.Schedule:
    """The official learning rate: peak * min(1, (s + 1) / (warmup_steps + 1)), no decay.

    >>> [float(warmup(1.0, 3)(step)) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return lambda step: peak * jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))


def decayed(schedule: optax.Schedule, final: float, num_steps: int) -> optax.Schedule:
    """The schedule times a line from 1 at the first step down to `final` after the last.

    >>> [float(decayed(warmup(1.0, 0), 0.5, 4)(step)) for step in (0, 2, 4)]
    [1.0, 0.75, 0.5]
    """
    return lambda step: schedule(step) * (1.0 - (1.0 - final) * step / num_steps)


def rmsprop(schedule: optax.Schedule) -> optax.GradientTransformation:
    """RMSprop as PyTorch defines it: decay 0.99, eps 1e-8 outside the root, zero start.

    optax's defaults (0.9, inside) make the first update three times smaller.
    """
    return optax.rmsprop(schedule, decay=0.99, eps=1e-8, eps_in_sqrt=False, initial_scale=0.0)


def clipped(grads: Any, norm: jax.Array, max_norm: float) -> Any:
    """Gradients scaled to a global norm of at most `max_norm`, as PyTorch does it."""
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads)


def initial_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update; jit it with `state_shardings` as out_shardings."""
    zero = lambda: jnp.zeros((), jnp.int32)  # one each: a buffer cannot be donated twice
    # Gradients are summed in float32, so moments are kept in it, whatever the parameters'.
    opt_state = tx.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    return TrainState(zero(), params, opt_state, zero(), zero())


def state_shardings(params: Any, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A state of shardings: the optimizer's moments lie where their parameters do.

    `params` may be shapes. Without this, jit leaves the moments unsharded.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_params = sharding.param_shardings(params, mesh)
    of_opt_state = optax.tree_map_params(
        tx,
        lambda _, place: place,
        jax.eval_shape(tx.init, params),
        of_params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, of_params, of_opt_state, everywhere, everywhere)


def sums_and_grads(
    objective: Objective, params: Any, batch: Batch, micro_batches: int
) -> tuple[Any, jax.Array, Metrics]:
    """The gradient of the batch's summed loss, its weight and its metrics.

    The groups of the batch are dealt to the micro-batches in turn (a device keeps its own
    rows) and the sums accumulated in float32: any `micro_batches` gives the same result.
    """

    def one(params, batch):
        def loss_first(params):
            loss_sum, weight_sum, metrics = objective(params, batch)
            return loss_sum, (weight_sum, metrics)

        (_, (weight_sum, metrics)), grads = jax.value_and_grad(loss_first, has_aux=True)(params)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (grads, weight_sum, metrics))

    if micro_batches == 1:
        return one(params, batch)
    groups = batch.examples.shape[0]

    def deal(x):  # [groups * r, ...] -> [micro_batches, groups / micro_batches * r, ...]
        x = x.reshape(groups // micro_batches, micro_batches, x.shape[0] // groups, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(micro_batches, -1, *x.shape[3:])

    dealt = jax.tree.map(deal, batch)
    first = jax.tree.map(lambda x: x[0], dealt)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, params, first)
    )
    add = lambda total, micro: (jax.tree.map(jnp.add, total, one(params, micro)), None)
    return jax.lax.scan(add, zeros, dealt)[0]


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    max_grad_norm: float,
    micro_batches: int = 1,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One jitted update that takes over its state's memory: (state, batch) -> (state, metrics).

    The gradient of the mean loss over pairs is clipped to `max_grad_norm` and handed to
    `tx`. A step whose loss or gradient norm is not finite changes no parameter and no
    moment; it is counted in the state.
    """

    def train_step(state, batch):
        grads, weight_sum, metrics = sums_and_grads(objective, state.params, batch, micro_batches)
        grads = jax.tree.map(lambda g: g / weight_sum, grads)
        norm = optax.tree.norm(grads)
        grads = clipped(grads, norm, max_grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"][0])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (optax.apply_updates(state.params, updates), opt_state),
            (state.params, state.opt_state),
        )
        bad = (~finite).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
        )
        gauges = {"grad_norm": norm, "skipped_in_a_row": state.skipped_in_a_row}
        gauges |= {"skipped": state.skipped}
        return state, metrics | {name: (value, jnp.ones(())) for name, value in gauges.items()}

    out_shardings = None if shardings is None else (shardings, shardings.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
