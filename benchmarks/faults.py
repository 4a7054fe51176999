"""What a run survives: killed at random moments until it is done, it must end where it would have.

    python benchmarks/faults.py [--kills 25] [--processes 1 2] [--seed 0] [--out FOLDER]

For each number of processes one run is left alone, and another is killed (`kill -9` of all
processes or of one, or SIGTERM to one) at a random moment and started again, so often. When it is
done it is compared with the one left alone, and begun anew while kills are left: every step must
stand once in its logs with the same numbers, bit for bit, and every array of its last checkpoint be
the same. A start after a kill must go on from the newest checkpoint that was there. The program
fails where any of it is not so.

The run is small (two stages of 250 steps, a checkpoint every third, a reference pass of some
seconds), and killed within half the time that it takes, so that moments are spread over starting,
training, saving and the pass.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import results

ROOT = Path(__file__).parents[1]
KEYS = {
    "synthetic.sft_train": 1000,
    "synthetic.sft_test": 12,
    "synthetic.pairs_train": 2000,
    "synthetic.pairs_test": 12,
    "model.overrides.num_layers": 1,
    "model.overrides.num_heads": 2,
    "model.overrides.width": 16,
    "model.overrides.mlp_width": 32,
    **{f"{stage}.batch_size": 8 for stage in ("sft", "dpo")},
    **{f"{stage}.eval_batch_size": 12 for stage in ("sft", "dpo")},
    **{f"{stage}.eval_every": 0 for stage in ("sft", "dpo")},
    **{f"{stage}.checkpoint_every": 3 for stage in ("sft", "dpo")},
    **{f"{stage}.samples": 0 for stage in ("sft", "dpo")},
    "sft.epochs": 2,
    "dpo.epochs": 1,
    "dpo.trajectories": 0,
    "dpo.trajectories_every": 0,
}
HOW = {"kill -9, all": (signal.SIGKILL, True), "kill -9, one": (signal.SIGKILL, False)}
HOW |= {"SIGTERM": (signal.SIGTERM, False)}


def started(workdir: Path, processes: int, log: Path) -> subprocess.Popen:
    keys = [f"--config.{key}={value}" for key, value in KEYS.items()]
    command = [sys.executable, "launch/train.py", "--config", "configs/quickstart.py", *keys]
    local = [sys.executable, "launch/cluster/local.py", "--processes", str(processes), "--"]
    with open(log, "a") as output:
        return subprocess.Popen(
            [*(local if processes > 1 else []), *command, "--workdir", str(workdir)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            stdout=output,
            stderr=output,
        )


def workers(process: subprocess.Popen, processes: int) -> list[int]:
    """The processes that train: the one itself, or those that local.py has started."""
    if processes == 1:
        return [process.pid]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def moment(workdir: Path, log: Path, began: int) -> str:
    """What the run is at, by what it has left on the disk and said since it `began`."""
    stage = workdir / ("dpo" if (workdir / "sft/done.json").exists() else "sft")
    if (workdir / "dpo/done.json").exists():
        return "reporting"
    if list((stage / "checkpoints").glob("*tmp*")):
        return "saving"
    said = log.read_text()[began:]
    if f"{stage.name}: compiling" not in said:
        return "starting"
    if "dpo reference: compiling" in said and "noise floor" not in said:
        return "reference pass"
    if f"{stage.name} " not in said.split("from the cache")[-1] and "resumed" not in said:
        return "loading"
    return "training"


def newest(workdir: Path) -> int | None:
    """The newest complete checkpoint of the stage that is under way."""
    stage = workdir / ("dpo" if (workdir / "sft/done.json").exists() else "sft")
    steps = [int(path.name) for path in (stage / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def outcome(workdir: Path) -> dict:
    """All that must be the same: the logs' numbers, and each array of the last checkpoints."""
    found = {}
    for stage in ("sft", "dpo"):
        lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        if steps != list(range(251)):
            sys.exit(f"{workdir}: {stage} has not every step once: {steps}")
        saved = workdir / stage / f"checkpoints/{steps[-1]}/_CHECKPOINT_METADATA"
        found[stage] = lines, json.loads(saved.read_text())["custom_metadata"]["fingerprints"]
    return found


def disturbed(out: Path, processes: int, kills: int, draw: random.Random) -> list[dict]:
    """The kills, each with its moment, its exit status and where the next start went on."""
    alone, began = out / f"alone-{processes}", time.monotonic()
    if started(alone, processes, out / f"alone-{processes}.log").wait():
        sys.exit(f"{alone}.log: the run that was left alone has failed")
    longest = (time.monotonic() - began) / 2
    wanted, found, workdir = outcome(alone), [], out / f"killed-{processes}"
    log, ends = out / f"killed-{processes}.log", 0
    log.touch()
    while True:
        left, began, before = kills - len(found), log.stat().st_size, newest(workdir)
        process = started(workdir, processes, log)
        if left:
            time.sleep(draw.uniform(0.5, longest))
        else:
            process.wait()
        fault = draw.choice(sorted(HOW)) if left and process.poll() is None else None
        if fault:
            number, every = HOW[fault]
            at, pids = moment(workdir, log, began), workers(process, processes)
            for pid in pids if every else [draw.choice(pids)]:
                os.kill(pid, number)
        asked = time.monotonic()
        status = process.wait()
        resumed = re.search(r"resumed from step (\d+)", log.read_text()[began:])
        if before is not None and resumed and int(resumed[1]) != before:
            sys.exit(f"{workdir}: went on from step {resumed[1]} where {before} was saved")
        if fault:
            seconds = time.monotonic() - asked
            found.append(dict(fault=fault, moment=at, status=status, seconds=seconds))
        if status == 0:
            ends += 1
            if outcome(workdir) != wanted:
                sys.exit(f"{workdir}: ended otherwise than the run that was left alone")
            print(f"{processes} processes: {len(found)} kills, {ends} ends, all as left alone")
            shutil.rmtree(workdir)
            if not left:
                return found
        elif not fault:
            sys.exit(f"{log}: a start that nobody disturbed ended with {status}")


def rows(found: list[dict]) -> list[list]:
    """For each fault: tries, what the run was at, exit statuses, and the longest end in seconds."""
    shown = []
    for fault in HOW:
        those = [kill for kill in found if kill["fault"] == fault]
        at, statuses = (Counter(kill[key] for kill in those) for key in ("moment", "status"))
        several = (", ".join(f"{what} {n}" for what, n in c.most_common()) for c in (at, statuses))
        seconds = max((kill["seconds"] for kill in those), default=0.0)
        shown.append([fault, len(those), *several, f"{seconds:.1f}"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/faults"))
    options = parser.parse_args()
    out = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    found = {}
    for processes in options.processes:
        draw = random.Random(f"{options.seed} {processes}")
        found[processes] = disturbed(out, processes, options.kills, draw)
        columns = ["fault", "tries", "at", "exit status", "s to its end"]
        results.table(f"{processes} processes", columns, rows(found[processes]))
    results.write(out, found)


if __name__ == "__main__":
    main()
