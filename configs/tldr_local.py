"""Any Pythia on local TL;DR files: real text, from scratch or from a folder, on a CPU.

Source:    the paper's setting (configs/tldr_pythia_2_8b.py) at a size that a laptop trains
Command:   python launch/train.py --config configs/tldr_local.py --workdir runs/tldr_local
               --config.data=FOLDER --config.tokenizer=FOLDER/20B_tokenizer.json
           with sft_{train,test}.jsonl (prompt, completion) and comparisons_{train,test}.jsonl
           (prompt, chosen, rejected) in FOLDER. From a checkpoint: add
               --config.model.weights=PYTHIA_FOLDER --config.model.name=
           and take the paper's optimizer: --config.{sft,dpo}.optimizer=rmsprop with
           learning_rate=5e-7, warmup_steps=150 and epochs=1.
Hardware:  two CPU cores, 4 GiB (Pythia-14m)
Time:      15 min for 756 SFT examples x 4 epochs and 779 pairs x 2, with other work on the machine
Expect:    from scratch: SFT loss per token 11.0 -> 5.86 on held-out posts; DPO loss 0.693 -> 0.647
           after one epoch (accuracy 0.58), then the second memorises the pairs: 0.434 in
           training (accuracy 0.84), 0.669 held out (0.55). A 14m model that has read 756 posts
           knows no more; the path is what this shows.
"""

from ml_collections import ConfigDict

from jaxdpo import recipe


def get_config() -> ConfigDict:
    config = recipe.blank()
    config.data = "data/tldr"
    config.tokenizer = "{data}/20B_tokenizer.json"
    config.model.name = "pythia-14m"
    for stage in (config.sft, config.dpo):
        stage.batch_size = 16
        stage.eval_batch_size = 16
        stage.optimizer = "adamw"
        stage.warmup_steps = 20
        stage.truncation = "keep_end"  # a cut prompt still ends in "TL;DR:"
        stage.max_length = 576  # no response of the data is cut
        stage.max_prompt_length = 448
        stage.eval_every = 50
        stage.checkpoint_every = 50

    config.sft.data.train = "{data}/sft_train.jsonl"
    config.sft.data.eval = "{data}/sft_test.jsonl"
    config.sft.data.format = "completions"
    config.sft.learning_rate = 1e-3
    config.sft.epochs = 4
    config.sft.hand_on = "best"  # a model from scratch overfits so few posts

    config.dpo.data.train = "{data}/comparisons_train.jsonl"
    config.dpo.data.eval = "{data}/comparisons_test.jsonl"
    config.dpo.data.format = "pairs"
    config.dpo.learning_rate = 1e-4
    config.dpo.epochs = 2
    config.dpo.beta = 0.1
    return config
