"""Who judges: the flags of every launcher that asks a judge, which adopts them as its own."""

from absl import flags

from jaxdpo import judges

GIVEN = [
    flags.DEFINE_enum("judge", None, list(judges.NEEDED), "Who says which response is better."),
    flags.DEFINE_bool("both_orders", None, "Ask the judge twice, each response first once."),
    flags.DEFINE_string("judge_model", None, "likelihood: a model; server: its name there."),
    flags.DEFINE_string("judge_policy", None, "reward: the policy whose implicit reward counts."),
    flags.DEFINE_string("judge_reference", None, "reward: what that policy was trained against."),
    flags.DEFINE_float("judge_beta", None, "reward: beta of that training."),
    flags.DEFINE_string("recorded", None, "replay: the verdicts.jsonl of an evaluation."),
    flags.DEFINE_string("template", None, "server: a file with {post}, {summary_a}, {summary_b}."),
    flags.DEFINE_string("cache", None, "server: the file of its answers; in --out if not given."),
    flags.DEFINE_integer("concurrency", None, "server: requests under way at once."),
    flags.DEFINE_float("requests_per_minute", None, "server: no more than these are sent."),
    flags.DEFINE_float("timeout", None, "server: seconds that an answer may take."),
    flags.DEFINE_integer("retries", None, "server: how often a failed request is sent again."),
    flags.DEFINE_integer("max_requests", None, "server: all that may be sent."),
    flags.DEFINE_float("price_input", None, "server: USD for a million input tokens."),
    flags.DEFINE_float("price_output", None, "server: USD for a million output tokens."),
]
NAMES = " ".join(flag.name for flag in GIVEN)
