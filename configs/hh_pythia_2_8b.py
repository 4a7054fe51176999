"""Pythia-2.8b on Anthropic HH: the worked example of the official DPO code's README.

Source:    github.com/eric-mitchell/direct-preference-optimization, README: SFT on the chosen
           responses, then DPO with beta 0.1; 64 to a batch in 2 accumulation steps,
           evaluation in batches of 32, learning rate 5e-7 (the DPO paper says 1e-6),
           150 warm-up steps, RMSprop, clipping at 10, bfloat16 compute.
Command:   python launch/train.py --config configs/hh_pythia_2_8b.py --workdir runs/hh
Hardware:  4 x A100-80GB there. Here 4 or 8 accelerators of 40 GiB or more.
Time:      there, SFT 1 h 30 min and DPO 2 h 45 min. Not run by us.
Expect:    loss log 2 = 0.6931 at step 0 (the official float16 reference gives rewards that are
           not quite 0); then growing margins.

Differences, each on purpose: the reference is computed once and in the policy's own dtype; the
last, partial batch is trained on; `config.seed` shuffles, pair by pair (there always seed 0, prompt
by prompt, a prompt's pairs adjacent); the 256 evaluation pairs are the file's first (there the
first of a shuffle); the prompt is checked on the rejected side too (rows that disagree are skipped
and counted).
"""

from ml_collections import ConfigDict

from jaxdpo import recipe


def get_config() -> ConfigDict:
    config = recipe.blank()
    config.model.weights = "EleutherAI/pythia-2.8b"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.scan_layers = True
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    for stage in (config.sft, config.dpo):
        stage.data.train = stage.data.eval = "Anthropic/hh-rlhf"
        stage.data.eval_split = "test"
        stage.data.eval_limit = 256
        stage.data.format = "hh"
        stage.truncation = "official_keep_end"
        stage.max_length = 512
        stage.max_prompt_length = 256
        stage.batch_size = 64
        stage.micro_batches = 2
        stage.eval_batch_size = 32
        stage.optimizer = "rmsprop"
        stage.learning_rate = 5e-7
        stage.warmup_steps = 150
        stage.max_grad_norm = 10.0
        stage.eval_every = 312  # 20,000 examples
    config.dpo.beta = 0.1
    return config
