"""SFT, then DPO, on the built-in summarisation task: the whole path in minutes on a laptop.

Source:    the task of jaxdpo/synthetic.py, which stands for Reddit TL;DR
Command:   make quickstart
           (python launch/train.py --config configs/quickstart.py --workdir runs/quickstart)
Hardware:  two CPU cores, 2 GiB
Time:      PLACEHOLDER
Expect:    PLACEHOLDER
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.stages = ("sft", "dpo")
    config.data = "{workdir}/data"  # what {data} stands for in the paths below
    config.tokenizer = "{data}/tokenizer.json"
    config.eos_token = "<|endoftext|>"
    # Written to {workdir}/data before the first stage; the knobs are synthetic.Task's.
    config.synthetic = ConfigDict(
        dict(seed=0, sft_train=16_000, sft_test=500, pairs_train=8_000, pairs_test=500)
    )

    config.model = ConfigDict()
    config.model.weights = ""  # a Hugging Face folder or hub name, instead of a name
    config.model.name = "pythia-14m"
    config.model.overrides = ConfigDict(
        dict(vocab_size=512, num_layers=3, num_heads=4, width=128, mlp_width=512)
    )
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"
    config.model.remat = "none"
    config.model.scan_layers = False
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))

    config.sft = stage("{data}/sft_train.jsonl", "{data}/sft_test.jsonl", "completions")
    config.sft.learning_rate = 2e-3
    config.sft.warmup_steps = 100
    config.sft.hand_on = "last"  # or "best": the checkpoint that the next stage starts from

    config.dpo = stage("{data}/pairs_train.jsonl", "{data}/pairs_test.jsonl", "pairs")
    config.dpo.learning_rate = 3e-4
    config.dpo.warmup_steps = 20
    config.dpo.hand_on = "last"
    config.dpo.loss = "dpo"  # or "ipo"
    config.dpo.beta = 0.1
    config.dpo.label_smoothing = 0.0
    return config


def stage(train: str, evaluation: str, format: str) -> ConfigDict:
    """What the two stages have in common."""
    stage = ConfigDict()
    stage.data = ConfigDict(dict(train=train, eval=evaluation, format=format))
    stage.data.split = "train"  # of a hub data set; a file has no splits
    stage.data.eval_split = "train"
    stage.data.test_fraction = 0.0  # without an eval file: this share of the prompts
    stage.data.limit = config_dict.placeholder(int)  # read only the first rows
    stage.data.eval_limit = config_dict.placeholder(int)
    stage.data.max_bad_fraction = 0.01
    stage.max_length = 160
    stage.max_prompt_length = 128
    stage.truncation = "official"
    stage.layout = "shared"
    stage.pairs_per_row = 1
    stage.num_buckets = 1
    stage.batch_size = 16  # pairs, over all devices
    stage.eval_batch_size = 50
    stage.micro_batches = 1
    stage.epochs = 1
    stage.optimizer = "adamw"
    stage.weight_decay = 0.0
    stage.max_grad_norm = 10.0
    stage.max_skipped_in_a_row = 5
    stage.eval_every = 200
    stage.checkpoint_every = 200
    stage.keep_checkpoints = 2
    return stage
