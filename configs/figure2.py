"""Figure 2: does more search give better text? Three betas, three seeds, to be swept over beams.

Source:    2404.12358, Section 5.2 and Figure 2, on the task of jaxdpo/synthetic.py
Command:   python launch/train.py --config configs/figure2.py --workdir runs/figure2
           python launch/evaluate.py sweep --run runs/figure2 --norms generated,total
               --data runs/figure2/seed0/data/sft_test.jsonl --format completions
               --max_new_tokens 48 --limit 250 --batch_size 125
           The opponents are the summaries that SFT learns from, a fifth of which are wrong: those
           of the pairs are all right, and could not be beaten
Hardware:  two CPU cores, 2 GiB
Time:      27 min for training, 17 for the sweep's 162 ways of decoding, with other work on both
Expect:    three seeds, 250 prompts, win rate: with one draw 0.366, 0.371, 0.431 (beta 0.03, 0.1,
           0.5), with two drawn beams 0.419, 0.431, 0.503, and no more with 20; 0.427, 0.434, 0.500
           greedy, and within 0.005 of it with up to 20 deterministic beams. No over-optimisation.
           After one epoch of SFT there are signs of it: ranked by "total", from 5 beams on, for
           beta 0.03 (a step of -0.013 [-0.027, -0.002]) and 0.1 (-0.021 [-0.038, -0.007])
"""

from ml_collections import ConfigDict

from jaxdpo import recipe

SEEDS = (0, 1, 2)  # of the random weights and of the order of the data
BETAS = (0.03, 0.1, 0.5)


def get_config() -> ConfigDict:
    config = recipe.blank()
    config.data = "{workdir}/../seed0/data"
    config.tokenizer = "{data}/tokenizer.json"
    for stage, data in ((config.sft, "sft"), (config.dpo, "pairs")):
        stage.data.train = f"{{data}}/{data}_train.jsonl"
        stage.data.eval = f"{{data}}/{data}_test.jsonl"
        stage.max_length = 160
        stage.max_prompt_length = 128
        stage.eval_batch_size = 48
        stage.optimizer = "adamw"
        stage.final_learning_rate = 0.1
        stage.eval_every = 0
        stage.checkpoint_every = 250
    config.sft.data.format = "completions"
    config.sft.batch_size = 8
    config.sft.epochs = 2  # after one, two seeds of three have not learnt to copy all facts
    config.sft.learning_rate = 2e-3
    config.sft.warmup_steps = 200
    config.dpo.data.format = "pairs"
    config.dpo.batch_size = 16
    config.dpo.learning_rate = 3e-4
    config.dpo.warmup_steps = 20

    runs = {f"seed{seed}": sft(seed) for seed in SEEDS}
    runs["seed0"]["synthetic"] = task()
    for seed in SEEDS:
        for beta in BETAS:
            name = f"seed{seed}_beta{beta}".replace(".", "_")
            runs[name] = {
                "seed": seed,
                "stages": ("dpo",),
                "model": {"weights": f"{{workdir}}/../seed{seed}:sft"},
                "dpo": {"beta": beta},
            }
    config.runs = ConfigDict(runs)
    return config


def task() -> dict:
    """Summaries of two facts; of those that SFT sees one in five is wrong."""
    knobs = dict(facts=4, stated=2, distractors=2, values=8, from_post=0.1, rephrase=1.0)
    sizes = dict(sft_train=24_000, sft_test=500, pairs_train=4_000, pairs_test=500)
    return dict(seed=0, sft_error_rate=0.2, **knobs, **sizes)


def sft(seed: int) -> dict:
    shape = dict(vocab_size=320, num_layers=3, num_heads=4, width=128, mlp_width=512)
    model = {"weights": "", "name": "pythia-14m", "overrides": shape}
    return {"seed": seed, "stages": ("sft",), "model": model}
