"""Beam search against what a user would pick instead: `transformers`' generate, on one machine.

    python benchmarks/decoding.py [--rounds 5] [--beams 1 5 20] [--batches 1 4]
                                  [--prompt 256] [--new 64] [--allocator kept|default]

Same weights (Pythia-70m's shape, random), same prompts, float32, no end token, and the same
tokens out, or the benchmark fails. Each side runs each cell in a process of its own, so that
peak memory (resident, imports and compilation included) is its own, under the same allocator
settings: `kept` keeps freed memory in the heap (GLIBC_TUNABLES below), which spares both sides
the page faults of large buffers; `default` is what an unprepared user has. A third column runs
transformers with its linear layers on oneDNN instead of MKL, which on AMD processors takes
about half of what MKL takes: what is left of the ratio there is not the BLAS.

A step is (time of a call with N new tokens - time of a call with 1) / (N - 1): the prompt is
not in it. A call is the whole of it. Medians over rounds, after one call that compiles.

Prediction, a step in bytes: 25.8M + 18.9M parameters of 4 bytes, read at 35 GB/s, 5.1 ms,
whatever the beams; at K = 20 and batch 4, 80 rows make 7.2 GFLOP, 16 ms at 450 GFLOP/s.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KEEP = 17179869184
ALLOCATORS = {
    "kept": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={KEEP}:"
    f"glibc.malloc.trim_threshold={KEEP}",
    "default": "",
}
SIDES = ("jaxdpo", "transformers", "transformers+onednn")


def prompts(batch: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(1, 50000, (batch, length)).tolist()


def write_weights(folder: str) -> None:
    import jax

    from jaxdpo import convert, pythia
    from jaxdpo.pythia_config import PythiaConfig

    config = PythiaConfig.from_name("pythia-70m")
    convert.save_hf(folder, config, pythia.init_params(config, jax.random.key(0)))


def jaxdpo_call(cell: argparse.Namespace):
    """A function from a number of new tokens to the tokens of the best beams."""
    from jaxdpo import convert, decoding, sharding
    from jaxdpo.pythia_cache import decoding_params

    config, params = convert.load_hf(cell.weights, mesh=sharding.make_mesh())
    lm = decoding.LM(*decoding_params(config, params))
    del params

    def call(new: int) -> list[list[int]]:
        constraints = decoding.Constraints(max_new_tokens=new, eos_ids=())
        found = decoding.beam_search(
            lm,
            prompts(cell.batch, cell.prompt),
            constraints,
            beam_size=cell.beam,
            batch_size=cell.batch,
        )
        return [hypotheses[0].tokens.tolist() for hypotheses in found]

    return call


def transformers_call(cell: argparse.Namespace):
    """As `jaxdpo_call`; with greedy search for one beam, as generate itself does it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.GPTNeoXForCausalLM.from_pretrained(cell.weights, dtype=torch.float32)
    model = model.eval()
    if cell.side.endswith("onednn"):
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = onednn_linear(module)
    tokens = torch.tensor(prompts(cell.batch, cell.prompt))

    def call(new: int) -> list[list[int]]:
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                num_beams=cell.beam,
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, cell.prompt :].tolist()

    return call


def onednn_linear(module):
    import torch

    weight, bias = module.weight.detach(), module.bias
    bias = None if bias is None else bias.detach()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def child(cell: argparse.Namespace) -> None:
    call = (jaxdpo_call if cell.side == "jaxdpo" else transformers_call)(cell)
    times = {1: [], cell.new: []}
    for new in times:
        tokens = call(new)
    for _ in range(cell.rounds):
        for new, spent in times.items():
            began = time.perf_counter()
            call(new)
            spent.append(time.perf_counter() - began)
    short, long = (statistics.median(spent) for spent in times.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = (long - short) / (cell.new - 1)
    print(json.dumps({"step": 1e3 * step, "call": long, "peak": peak, "tokens": tokens}))


def measured(side: str, beam: int, batch: int, options: argparse.Namespace, weights: str) -> dict:
    cell = vars(options) | {"side": side, "beam": beam, "batch": batch, "weights": weights}
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATORS[options.allocator]}
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    print(f"prompt {options.prompt}, {options.new} new tokens, allocator {options.allocator}")
    print("ratio: transformers / jaxdpo (in brackets: transformers with oneDNN / jaxdpo)")
    print("K  batch |   ms/step: jaxdpo, transformers, ratio |  s/call ratio | peak MiB, ratio")
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "pythia-70m")
        write_weights(weights)
        for beam in options.beams:
            for batch in options.batches:
                ours, theirs, onednn = (
                    measured(side, beam, batch, options, weights) for side in SIDES
                )
                for other in (theirs, onednn):
                    assert other["tokens"] == ours["tokens"], "the two sides disagree"
                ratio = lambda key, ours=ours, theirs=theirs, onednn=onednn: (
                    f"{theirs[key] / ours[key]:5.2f} ({onednn[key] / ours[key]:.2f})"
                )
                print(
                    f"{beam:2} {batch:5}  | {ours['step']:8.2f} {theirs['step']:9.2f}  "
                    f"{ratio('step')} | {ratio('call')} | {ours['peak']:5.0f} "
                    f"{theirs['peak']:5.0f}  {ours['peak'] / theirs['peak']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--allocator", choices=ALLOCATORS, default="kept")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        child(argparse.Namespace(**json.loads(arguments.cell)))
    else:
        main(arguments)
