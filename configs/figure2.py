"""Figure 2: does more search give better text? Three betas, three seeds, to be swept over beams.

Source:    2404.12358, Section 5.2 and Figure 2, on the task of jaxdpo/synthetic.py
Command:   python launch/train.py --config configs/figure2.py --workdir runs/figure2
           python launch/evaluate.py sweep --run runs/figure2 --format completions
               --data runs/figure2/seed0/data/sft_test.jsonl --max_new_tokens 48
           The opponents are the summaries that SFT learns from, a fifth of which are wrong: those
           of the pairs are all right, and could not be beaten
Hardware:  two CPU cores, 2 GiB
Time:      about 20 min for training, 5 for each seed and method of the sweep
Expect:    of one seed, 200 prompts, deterministic beams: ranked by "total" win rates fall with more
           beams (beta 0.03: 0.502 with 1, 0.475 with 20, paired difference -0.028 [-0.048, -0.013];
           beta 0.1: 0.505 with 2, 0.477 with 5) while the log-probability found rises; ranked by
           "generated" each beta's stay within 0.03, and texts get longer, 13.1 to 13.8 tokens
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
