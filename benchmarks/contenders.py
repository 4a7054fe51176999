"""One DPO update, as several stacks do it: what the benchmarks of a step run against each other.

    jaxdpo             as a run does it: packed rows, one prompt for both responses, the reference's
                       log-probabilities cached, logits at scored positions only, donated state
    official           the official DPO code in PyTorch: chosen and rejected concatenated and padded
                       to the longest, whole log-softmaxes, the reference forward in every step
    official+onednn    with every linear layer on oneDNN, forward and backward: on some processors
                       MKL, which PyTorch calls otherwise, takes twice as long
    best-torch         what can be made of it in eager PyTorch, short of packing and shared prompts:
                       the reference cached, logits at response positions, fused attention
    best-torch+onednn  the same on oneDNN
    compiled-torch     the same under torch.compile: the best PyTorch is the fastest of these three
    trl                the training step of trl's DPOTrainer in float32, without checkpointing
    trl+checkpointing  with activations computed again in the backward pass, as is its default

All run in float32: forward, backward, clipping at 10, RMSprop as PyTorch defines it, at a constant
learning rate. A contender is a function from a `Task` to a `Ready`. Libraries are imported inside,
so that a process loads only what its own contender needs. `RUNGS` are jaxdpo with a lever left out.
"""

import contextlib
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 5e-7, 10.0
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")
BEST = ("best-torch", "best-torch+onednn", "compiled-torch")


class Task(NamedTuple):
    """The same for all contenders: a folder with `policy`, `reference` and `pairs.json`.

    The file holds a data set, of which the first `num_batches` batches are trained on.
    """

    folder: str
    batch_size: int
    num_batches: int
    threads: int

    def pairs(self) -> list:
        return json.loads((Path(self.folder) / "pairs.json").read_text())

    def batches(self) -> list:
        pairs, size = self.pairs(), self.batch_size
        return [pairs[i * size : (i + 1) * size] for i in range(self.num_batches)]


class Ready(NamedTuple):
    """A contender with its weights loaded.

    `step(i)` updates on batch i, from ids in memory to new parameters, and returns `METRICS`;
    `gradients()` are those of batch 0, before clipping, by Hugging Face's names.
    """

    step: Callable[[int], dict[str, float]]
    gradients: Callable[[], dict[str, np.ndarray]]
    shapes: list  # of each batch: rows; of a row positions, those with logits, keys to a query
    reference_seconds: float | None  # one pass over the pairs of all batches, where it is cached


def warm(reference_pass: Callable[[], list]) -> tuple[list, float]:
    """What a pass returns, and the seconds it takes; the first, which compiles, is not counted."""
    reference_pass()
    began = time.perf_counter()
    return reference_pass(), time.perf_counter() - began


# --- PyTorch ---------------------------------------------------------------------------


def _load(task: Task, name: str, attention: str):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    model = transformers.GPTNeoXForCausalLM.from_pretrained(
        Path(task.folder) / name, dtype=torch.float32, attn_implementation=attention
    )
    return model.train()  # Pythia has no dropout


def _padded(pairs: list):
    """Ids [2B, T], right-padded, chosen above rejected; which of them are responses, [2B, T]."""
    import torch

    sequences = [(x, y) for x, y, _ in pairs] + [(x, z) for x, _, z in pairs]
    longest = max(len(x) + len(y) for x, y in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    attended, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (x, y) in enumerate(sequences):
        ids[row, : len(x) + len(y)] = torch.tensor(x + y)
        attended[row, : len(x) + len(y)] = 1
        scored[row, len(x) : len(x) + len(y)] = True
    return ids, attended, scored


def _whole_logps(model, padded):
    """Sums of log-probabilities as the official code takes them, [2B]."""
    ids, attended, scored = padded
    logits = model(ids, attention_mask=attended, use_cache=False).logits.float()[:, :-1]
    targets, scored = ids[:, 1:], scored[:, 1:]
    logps = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (logps * scored).sum(-1)


def _scored_logps(model, padded):
    """The same from the logits of response positions alone; padding on the right needs no mask."""
    import torch

    ids, _, scored = padded
    hidden = model.gpt_neox(ids, use_cache=False).last_hidden_state[:, :-1]
    scored, targets = scored[:, 1:], ids[:, 1:]
    logits = model.get_output_embeddings()(hidden[scored])
    logps = -torch.nn.functional.cross_entropy(logits, targets[scored], reduction="none")
    rows = scored.nonzero()[:, 0]
    return torch.zeros(len(ids)).index_add(0, rows, logps)


def _backward(logps, reference_logps):
    """Leave the gradients; returns the loss and the mean rewards."""
    import torch

    chosen, rejected = (BETA * (logps - reference_logps)).chunk(2)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    loss.backward()
    return loss.detach(), chosen.detach().mean(), rejected.detach().mean()


def _torch_ready(policy, backward, batches, everywhere=True, reference_seconds=None) -> Ready:
    """`backward(i)` leaves the gradients of batch i and returns loss and rewards."""
    import torch

    optimizer = torch.optim.RMSprop(policy.parameters(), lr=LEARNING_RATE)

    def step(i):
        values = backward(i)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return dict(zip(METRICS, (*map(float, values), float(norm)), strict=True))

    def gradients():
        backward(0)
        grads = {name: p.grad.numpy().copy() for name, p in policy.named_parameters()}
        optimizer.zero_grad()
        grads["embed_out.weight"] = grads.pop("lm_head.weight", grads.get("embed_out.weight"))
        return grads

    shapes = []
    for ids, _, scored in map(_padded, batches):
        rows, length = ids.shape
        # Fused attention leaves out blocks of keys that come later.
        keys = length if everywhere else (length + 1) / 2
        shapes.append((rows, length, length if everywhere else float(scored.sum()) / rows, keys))
    return Ready(step, gradients, shapes, reference_seconds)


def official(task: Task, onednn: bool = False) -> Ready:
    import torch

    policy, reference = (_load(task, name, "eager") for name in ("policy", "reference"))
    batches = task.batches()
    if onednn:
        onednn_linears(policy)
        onednn_linears(reference)

    def backward(i):
        padded = _padded(batches[i])
        logps = _whole_logps(policy, padded)
        with torch.no_grad():
            reference_logps = _whole_logps(reference, padded)
        return _backward(logps, reference_logps)

    return _torch_ready(policy, backward, batches)


def best_torch(task: Task, onednn: bool = False, compiled: bool = False) -> Ready:
    import torch

    if compiled and not any(map(shutil.which, ("g++", "clang++"))):
        raise ModuleNotFoundError(name="a C++ compiler")
    policy, reference = (_load(task, name, "sdpa") for name in ("policy", "reference"))
    batches = task.batches()
    for model in (policy, reference):
        if onednn:
            onednn_linears(model)
        if compiled:
            model.gpt_neox.compile(dynamic=True)

    logps = lambda model: [_scored_logps(model, _padded(batch)) for batch in batches]
    with torch.no_grad():
        cached, spent = warm(functools.partial(logps, reference))
    del reference

    def backward(i):
        return _backward(_scored_logps(policy, _padded(batches[i])), cached[i])

    return _torch_ready(policy, backward, batches, False, spent)


def onednn_linears(model) -> None:
    """Put the products of every linear layer on oneDNN: the output, and both gradients."""
    import torch

    product = torch.ops.mkldnn._linear_pointwise

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(context, x, weight, bias):
            context.save_for_backward(x, weight)
            return product(x, weight, bias, "none", [], "")

        @staticmethod
        def backward(context, grad):
            x, weight = context.saved_tensors
            rows = grad.reshape(-1, grad.shape[-1])
            grad_x = product(grad, weight.t(), None, "none", [], "")
            grad_weight = product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None, "none", [], "")
            return grad_x, grad_weight, rows.sum(0) if context.needs_input_grad[2] else None

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = lambda x, m=module: Linear.apply(x, m.weight, m.bias)


def trl(task: Task, checkpointing: bool = False) -> Ready:
    """The gradient is that of `DPOTrainer.training_step`; clipping and RMSprop are as above."""
    import datasets
    import tokenizers
    import transformers
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # ids already

    policy, reference = (_load(task, name, "sdpa") for name in ("policy", "reference"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0}, unk_token="<end>"))
    names, batches = ("prompt_ids", "chosen_ids", "rejected_ids"), task.batches()
    rows = [[dict(zip(names, pair, strict=True)) for pair in batch] for batch in batches]
    trainer = Trainer(
        policy,
        reference,
        DPOConfig(
            output_dir=f"{task.folder}/trl",
            per_device_train_batch_size=task.batch_size,
            beta=BETA,
            max_length=None,
            gradient_checkpointing=checkpointing,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list(sum(rows, [])),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<end>", pad_token="<end>"
        ),
    )

    trainer.current_gradient_accumulation_steps = 1  # what its loop sets

    def backward(i):
        loss = trainer.training_step(policy, trainer.data_collator(rows[i]))
        seen = trainer._metrics["train"]
        return loss, seen["rewards/chosen"][-1], seen["rewards/rejected"][-1]

    return _torch_ready(policy, backward, batches, everywhere=False)


# --- jaxdpo ----------------------------------------------------------------------------


class Levers(NamedTuple):
    """What makes the step of this project fast; each can be left out alone."""

    shared: bool = True  # a prompt once for both responses; without it nothing is packed
    packed: bool = True  # several pairs to a row
    cached: bool = True  # the reference's log-probabilities computed before training
    scored: bool = True  # logits at scored positions only
    donated: bool = True  # the new state takes over the memory of the old one
    blocks: bool = True  # attention in blocks of what can be seen, no array of T x T kept


def jaxdpo(task: Task, **levers: bool) -> Ready:
    """The step of a run under the recipe's defaults, less the levers that are off."""
    import jax

    from jaxdpo import convert, sharding, step
    from jaxdpo.train import put_batch

    on, folder = Levers(**levers), Path(task.folder)
    batches, mesh = in_rows(task, on), sharding.make_mesh(devices=jax.devices()[:1])
    running, put = traced(on, mesh), functools.partial(put_batch, mesh=mesh)
    load = running(functools.partial(convert.load_hf, mesh=mesh, attention_span=batches.span))
    (config, params), (_, reference) = load(folder / "policy"), load(folder / "reference")
    logps = running(jax.jit(lambda params, batch: step.token_logps(config, params, batch)))
    reference_logps = lambda i: jax.device_get(logps(reference, put(batches[i])))
    spent = None
    if on.cached:
        known, spent = warm(lambda: [reference_logps(i) for i in range(task.num_batches)])
        reference_logps = known.__getitem__
        del reference
    objective, update, state = training(config, params, mesh, on)
    rows = lambda i: put(batches[i]._replace(reference_token_logps=reference_logps(i)))

    @running
    def one(i):
        nonlocal state
        state, metrics = update(state, rows(i))
        jax.block_until_ready(state)
        return {name: step.means(metrics)[name] for name in METRICS}

    @running
    def gradients():
        sums = jax.jit(lambda params, batch: step.sums_and_grads(objective, params, batch, 1))
        grads, pairs, _ = sums(state.params, rows(0))
        return exported(config, jax.tree.map(lambda g: g / pairs, grads))

    shapes = [shape(batches[i], batches.span, on) for i in range(task.num_batches)]
    return Ready(one, gradients, shapes, spent)


def in_rows(task: Task, on: Levers):
    """The whole data set in rows: of a few batches the row shapes would fit too well."""
    from lengths import store

    from jaxdpo import recipe
    from jaxdpo.batching import Batches

    stage = recipe.blank().dpo
    return Batches(
        store(task.pairs()),
        batch_size=task.batch_size,
        row_length=stage.row_length if on.packed and on.shared else 0,
        num_buckets=stage.num_buckets,
        layout="shared" if on.shared else "separate",
    )


@contextlib.contextmanager
def traced(on: Levers, mesh):
    """What is traced in here is traced with the levers as they are asked for."""
    import jax

    from jaxdpo import attention, step

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        if not on.scored:
            stack.enter_context(mock.patch.object(step, "token_logps", logps_from_everywhere))
        if not on.blocks:
            stack.enter_context(mock.patch.object(attention, "attend", whole_attention))
        yield


def training(config, params, mesh, on: Levers):
    """The objective, its update, and the state before the first; `params` are donated to it."""
    import jax

    from jaxdpo import losses, step

    tx = step.rmsprop(step.warmup(LEARNING_RATE, 0))
    loss = functools.partial(losses.dpo_loss, beta=BETA)
    objective = step.preference_objective(config, loss, beta=BETA)
    update = step.make_train_step(objective, tx, max_grad_norm=MAX_GRAD_NORM)
    if not on.donated:
        update = jax.jit(update.__wrapped__)
    init, placed = (
        functools.partial(step.initial_state, tx=tx),
        step.state_shardings(params, tx, mesh),
    )
    return objective, update, jax.jit(init, donate_argnums=0, out_shardings=placed)(params)


def exported(config, grads) -> dict[str, np.ndarray]:
    """Gradients by Hugging Face's names, as the export has them for parameters."""
    from safetensors.numpy import load_file

    from jaxdpo import convert

    with tempfile.TemporaryDirectory() as folder:
        convert.save_hf(folder, config, grads)
        return load_file(Path(folder) / "model.safetensors")


def shape(batch, span: int, on: Levers) -> tuple[int, int, int, float]:
    """As `Ready.shapes` has it."""
    from jaxdpo import attention

    (rows, length), scored = batch.tokens.shape, batch.targets.shape[1]
    keys = float(length)
    if on.blocks:
        keys = attention.keys_per_row(batch.segment_ids, span).sum() / batch.tokens.size
    return rows, length, scored if on.scored else length, float(keys)


def logps_from_everywhere(config, params, batch):
    """As `step.token_logps`, by way of a log-softmax at every position of the row."""
    import jax
    import jax.numpy as jnp

    from jaxdpo import pythia, qfunction

    hidden = pythia.hidden_states(
        config, params, batch.tokens, batch.positions, batch.segment_ids, batch.branch_ids
    )
    everywhere = jax.nn.log_softmax(qfunction.logits(hidden, params["unembedding"]))
    row = jnp.arange(len(batch.targets))[:, None]
    return everywhere[row, batch.scored_positions, batch.targets]


def whole_attention(q, k, v, segment_ids, branch_ids, **_):
    """As `attention.attend`, by way of all T x T scores of a head."""
    import jax

    from jaxdpo.attention import attention_mask

    mask = attention_mask(segment_ids, branch_ids)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


CONTENDERS: dict[str, Callable[..., Ready]] = {
    "jaxdpo": jaxdpo,
    "official": official,
    "official+onednn": functools.partial(official, onednn=True),
    "best-torch": best_torch,
    "best-torch+onednn": functools.partial(best_torch, onednn=True),
    "compiled-torch": functools.partial(best_torch, compiled=True),
    "trl": trl,
    "trl+checkpointing": functools.partial(trl, checkpointing=True),
}
RUNGS: dict[str, Callable[..., Ready]] = {
    "jaxdpo": jaxdpo,
    **{f"without {lever}": functools.partial(jaxdpo, **{lever: False}) for lever in Levers._fields},
    "without any": functools.partial(jaxdpo, **dict.fromkeys(Levers._fields, False)),
}
