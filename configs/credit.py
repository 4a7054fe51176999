"""How well DPO's token rewards find wrong tokens: three seeds, four betas, three sizes of data.

Source:    2404.12358, Section 5.1, whose three examples this turns into a measurement, on the
           task of jaxdpo/synthetic.py with the recipe of configs/quickstart.py
Command:   python launch/train.py --config configs/credit.py --workdir runs/credit
           python launch/analyze.py credit-benchmark --run runs/credit
Hardware:  two CPU cores, 1.5 GiB
Time:      36 minutes on cores shared with other work; the analysis one minute
Expect:    AUROC of the wrong tokens within a response, beta 0.1, 8000 pairs, 95% interval:
           DPO reward 0.957 [0.941, 0.972], the SFT model's own log-probability 0.990 [0.987, 0.993]
           The reward gains with pairs (500: 0.921, 2000: 0.938) and is the same for every beta
           (0.956 to 0.958). It lies on the errors: 1.000 [0.999, 1.001] of how a response differs
           from the same put right; nothing of it on the tokens after them.
           Where the wrong value stands in the post: reward 0.649 [0.562, 0.729], SFT 0.907
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SEEDS = (0, 1, 2)  # of the random weights and of the order of the data
BETAS = (0.03, 0.1, 0.3, 1.0)  # with the most pairs
PAIRS = (500, 2_000, 8_000)  # with beta 0.1


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    task, shape = config.synthetic.to_dict(), config.model.to_dict()
    config.synthetic = ConfigDict({})  # one run writes the data for all
    config.data = "{workdir}/../seed0/data"
    config.model.overrides = ConfigDict({})
    config.model.name = ""
    config.sft.eval_every = 0
    config.dpo.eval_every = 0
    config.dpo.samples = 0
    config.dpo.trajectories = config.dpo.trajectories_every = 0

    runs = {f"seed{seed}": {"seed": seed, "stages": ("sft",), "model": shape} for seed in SEEDS}
    runs["seed0"]["synthetic"] = task
    for seed in SEEDS:
        for beta, pairs in _swept():
            name = f"seed{seed}_beta{beta}_pairs{pairs}".replace(".", "_")
            runs[name] = {
                "seed": seed,
                "stages": ("dpo",),
                "model": {"weights": f"{{workdir}}/../seed{seed}:sft"},
                "dpo": {"beta": beta, "data": {"limit": pairs}},
            }
    config.runs = ConfigDict(runs)
    return config


def _swept() -> list[tuple[float, int]]:
    return sorted({(beta, PAIRS[-1]) for beta in BETAS} | {(0.1, pairs) for pairs in PAIRS})
