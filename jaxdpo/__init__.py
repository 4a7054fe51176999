"""Preference training in JAX, with the trained model read as the soft Q-function it is.

*From r to Q\\*: Your Language Model is Secretly a Q-Function* (arXiv 2404.12358) shows
that a policy trained by DPO is the optimal soft Q-function of the token-level MDP.
Data flows through the modules in this order:

    pairs        files and hubs -> (prompt, chosen, rejected), validated row by row
    synthetic    the built-in summarisation task, whose wrong tokens are known
    tokens       text -> token ids, truncation, EOS; the memory-mapped token store
    batching     tokenised examples -> fixed-shape rows [prompt | chosen | rejected]
    packing      which examples of a batch share a row; the few shapes of a run's batches
    sharding     the device mesh; the table parameter -> PartitionSpec
    processes    several processes, one run: who writes, what all agree on, how all end
    pythia_config  the numbers of a model: published sizes, Hugging Face's config.json
    attention    who sees whom in a row, and which program computes it on which device
    pythia       the GPT-NeoX model: tokens -> hidden states; the unembedding
    pythia_cache  the model one token at a time, over a pool of keys and values
    hf_layout    how Hugging Face names and lays out the tensors: one table
    convert      Hugging Face weights <-> parameters
    qfunction    logits -> token log-probabilities, Q, V, advantages, token rewards
    scored_logps  how the first of these come about without all logits, on any mesh
    token_mdp    MDPs small enough to solve exactly: soft dynamic programming
    losses       the objectives: one number per pair
    reference    the reference's token log-probabilities, computed once
    step         state, objectives, optimizer, the jitted update
    compilation  programs compiled before the first step, once, and kept for the next run
    accounting   how much arithmetic a step is, and how fast it went
    train        the loop: updates, evaluation, checkpoints, a line a step
    recipe       what a configuration asks for, checked
    stage_data   what a stage trains on: examples read, counted, tokenised, in rows
    stages       a run: its stages in order, where each one starts
    experiment   several runs from one recipe, side by side
    decoding     beams, samples and products of models over one jitted loop
    checkpoint   Orbax: save, resume, load parameters
    fingerprint  whether arrays are still what they were
    lock         one run to a work directory
    stopping     a signal asks, the loop answers at the end of a step
    ahead        what a run's programs need on a TPU slice, compiled without one
    collectives  what a compiled program sends between devices
    records      JSON on disk that a kill cannot spoil: whole files, logs of lines
    metrics      metrics.jsonl, speed.jsonl, TensorBoard, progress
    samples      what the model says while it trains
    drift        how far a policy has left its reference, measured while it trains
    runs         what a run's folder holds: a stage's model, and its export
    language_models  a model by its name: a folder, a hub name, a stage of a run
    prompts      where prompts come from: typed, a file, a data set
    completions  prompts as text -> completions as text: models, products, methods
    transcript   completions in a file, gone on with after a kill
    judge        which of two responses is better: how a judge is asked, verdicts in a file
    oracle       the built-in task's judge, who counts right, wrong and missing facts
    scored_judges  judges that score a response: implicit reward, likelihood
    chat         a chat server, asked within limits
    judge_server  a judge behind a chat server; judge_cache: what it has answered already
    judges       a judge by its name
    sides        what a model, a file or the data set says to the same prompts
    evaluation   a win rate from start to end
    corruption   wrong responses made from right ones by rule: the wrong characters are known
    analysis     figures, tables and pages:
      trajectories  implicit rewards in training: which fall, where, and what theory says
      token_scores  what a model says of every token of given responses
      credit        which tokens a policy rewards: a heat map
      credit_benchmark  how well that finds the tokens that are known to be wrong
      win_rates, verdicts  what many verdicts come to, and as a page
      sweep         win rate, length and implicit reward by the number of beams
      preference_accuracy  how often a policy agrees with labelled pairs
      trials        which models an analysis compares
      page, report  a run's folder as one page

Axes in shapes: B rows, T positions, S scored positions, G groups of rows, P pairs to a
group, V vocabulary, D width, F MLP width, N heads, H head width, L layers; in decoding K
beams or samples, R nodes of a cache, C candidates.

`logps` are log-probabilities: a bare `logps` is the sum over a response, `token_logps`
is per token.
"""


class InputError(ValueError):
    """A mistake in what the user gave: one line with file, row or field, and the remedy.

    The launchers print it and exit with status 2; anything else is a bug and keeps its
    traceback.

    >>> str(InputError("runs/a: belongs to another configuration"))
    'runs/a: belongs to another configuration'
    """
