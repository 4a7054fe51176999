"""The numbers that fix a Pythia model: the published sizes, and Hugging Face's config.json.

What a config.json asks for and the model does not compute is refused by name. Left out: the
computation itself (`pythia`), and the weights (`convert`).
"""

import dataclasses
from typing import Any

from jaxdpo import InputError

# name: vocab_size, num_layers, num_heads, width
_SIZES = {
    "14m": (50304, 6, 4, 128),
    "31m": (50304, 6, 8, 256),
    "70m": (50304, 6, 8, 512),
    "160m": (50304, 12, 12, 768),
    "410m": (50304, 24, 16, 1024),
    "1b": (50304, 16, 8, 2048),
    "1.4b": (50304, 24, 16, 2048),
    "2.8b": (50304, 32, 32, 2560),
    "6.9b": (50432, 32, 32, 4096),
    "12b": (50688, 36, 40, 5120),
}
_DTYPES = ("float32", "bfloat16", "float16")
_REMATS = ("none", "dots", "full")

# config.json: our field under its Hugging Face key; the values that this model fixes (an
# absent key has them); and the keys that change nothing that is computed here.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
    "max_positions": "max_position_embeddings",
}
_HF_FIXED = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
_HF_ROTARY = {
    "rotary_pct": ("rotary_pct", "partial_rotary_factor"),
    "rotary_base": ("rotary_emb_base", "rope_theta"),
}
_LARGEST = 2**31  # of any number: what is larger overflows somewhere
_HF_BOOKKEEPING = frozenset(
    "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype use_cache "
    "transformers_version initializer_range classifier_dropout is_decoder tokenizer_class "
    "gradient_checkpointing output_attentions output_hidden_states return_dict id2label "
    "label2id problem_type _name_or_path _attn_implementation_autoset".split()
)


@dataclasses.dataclass(frozen=True)
class PythiaConfig:
    """The numbers that fix a GPT-NeoX model's computation and how it is carried out.

    `rotary_pct` is the part of each head that is rotated. `max_positions` is the longest
    sequence that the weights were trained on; the model itself has no limit. Parameters are
    stored in `param_dtype` and multiplied in `dtype`. `remat` says what the backward pass
    recomputes in each layer: "none", all but the products with weights and attention's result
    ("dots"), or "full". `scan_layers` compiles one layer for all, with parameters stacked on a
    leading axis. `attention` is one of `attention.IMPLEMENTATIONS`, `attention_span` the most
    positions that a token looks back in its row, itself included (None: all), `logits_memory`
    what logits may take of a device at a time, in MiB.

    >>> PythiaConfig.from_name("pythia-2.8b").head_width
    80
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    mlp_width: int
    rotary_pct: float = 0.25
    rotary_base: float = 10000.0
    layer_norm_epsilon: float = 1e-5
    parallel_residual: bool = True
    max_positions: int = 2048
    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = False
    attention: str = "blocks"
    attention_span: int | None = None
    logits_memory: int = 512

    def __post_init__(self):
        for field in (*_HF_FIELDS, "logits_memory"):
            value = getattr(self, field)
            if value <= 0:
                raise InputError(f"{field}={value}: must be positive")
        if self.width % self.num_heads:
            raise InputError(
                f"width={self.width}: must be a multiple of num_heads={self.num_heads}"
            )
        if self.rotary_width < 2 or self.rotary_width % 2 or self.rotary_pct > 1:
            raise InputError(
                f"rotary_pct={self.rotary_pct}: rotates {self.rotary_width} of "
                f"{self.head_width} numbers of a head; must be an even part of them"
            )
        if self.attention_span is not None and self.attention_span < 1:
            raise InputError(f"attention_span={self.attention_span}: must be positive, or None")
        choices = {"param_dtype": _DTYPES, "dtype": _DTYPES, "remat": _REMATS}
        for field, known in choices.items():
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"{field}={value!r}: must be one of {', '.join(known)}")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def rotary_width(self) -> int:
        return int(self.head_width * self.rotary_pct)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "PythiaConfig":
        """The configuration of a published model, such as "pythia-2.8b".

        The "-deduped" models have the same shape. `overrides` are fields of the class.
        Raises `InputError` where the name is unknown.

        >>> PythiaConfig.from_name("pythia-1b-deduped", remat="full").num_layers
        16
        """
        size = name.removeprefix("pythia-").removesuffix("-deduped")
        if not name.startswith("pythia-") or size not in _SIZES:
            known = ", ".join(f"pythia-{size}" for size in _SIZES)
            raise InputError(f"{name}: no such model; the known ones are {known}")
        fields = dict(zip(_HF_FIELDS, (*_SIZES[size], 4 * _SIZES[size][-1]), strict=False))
        return cls._overridden(fields, overrides)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **overrides: Any) -> "PythiaConfig":
        """The configuration in a Hugging Face `config.json`, read as a dictionary.

        The rotary numbers are taken from `rotary_pct` and `rotary_emb_base` or from
        `rope_parameters`, and must agree where both stand. `overrides` are fields of the
        class. Raises one `InputError` that names every key that is missing, unknown, or
        asks for something that this model does not compute.

        >>> PythiaConfig.from_hf(PythiaConfig.from_name("pythia-70m").to_hf()).width
        512
        """
        rotary, problems = _hf_rotary(hf)
        problems += [
            f"{key}={hf[key]!r} is not supported (only {fixed!r})"
            for key, fixed in _HF_FIXED.items()
            if hf.get(key, fixed) != fixed
        ]
        problems += [f"{key} is missing" for key in _HF_FIELDS.values() if hf.get(key) is None]
        parallel = hf.get("use_parallel_residual")
        if type(parallel) not in (bool, type(None)):
            problems.append(f"use_parallel_residual={parallel!r} is neither true nor false")
        read = {*_HF_FIELDS.values(), *_HF_FIXED, *_HF_BOOKKEEPING}
        read |= {"use_parallel_residual", "rotary_pct", "rotary_emb_base", "rope_parameters"}
        problems += [
            f"{key}={value!r} is unknown and may change what is computed"
            for key, value in hf.items()
            if key not in read and value is not None
        ]
        if problems:
            raise InputError(f"config.json: {'; '.join(problems)}")
        fields = {field: hf[key] for field, key in _HF_FIELDS.items()} | rotary
        fields["parallel_residual"] = parallel is not False  # absent or null: the default
        return cls._overridden(fields, overrides)

    @classmethod
    def _overridden(cls, fields: dict[str, Any], overrides: dict[str, Any]) -> "PythiaConfig":
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise InputError(f"{name}: no such field; they are {', '.join(known)}")
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        return cls(**{name: _as(kinds[name], name, x) for name, x in (fields | overrides).items()})

    def to_hf(self, *, eos_id: int = 0) -> dict[str, Any]:
        """The `config.json` that makes `transformers` compute the same, as a dictionary.

        Both spellings of the rotary numbers are written, so that versions 4 and 5 read it.

        >>> PythiaConfig.from_name("pythia-70m").to_hf()["architectures"]
        ['GPTNeoXForCausalLM']
        """
        fixed = {key: value for key, value in _HF_FIXED.items() if value is not None}
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
            "dtype": self.param_dtype,
            "torch_dtype": self.param_dtype,
            "use_parallel_residual": self.parallel_residual,
            "rotary_pct": self.rotary_pct,
            "rotary_emb_base": self.rotary_base,
            "rope_parameters": {
                "rope_type": "default",
                "partial_rotary_factor": self.rotary_pct,
                "rope_theta": self.rotary_base,
            },
            **{key: getattr(self, field) for field, key in _HF_FIELDS.items()},
            **fixed,
        }


def _as(kind: Any, name: str, value: Any) -> Any:
    """A field's value as its kind says; `InputError` where it is of another, or out of range."""
    if kind is float and type(value) is int and abs(value) < _LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        said = getattr(kind, "__name__", str(kind))
        raise InputError(f"{name}={str(value)[:40]!r}: must be of type {said}")
    if isinstance(value, int | float) and not abs(value) < _LARGEST:
        raise InputError(f"{name}={str(value)[:40]}: must be finite and less than {_LARGEST}")
    return value


def _hf_rotary(hf: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The rotary fields that a `config.json` gives, and what is wrong with them."""
    rope = hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return {}, [f"rope_parameters={rope!r} is no object"]
    rope, fields, problems = dict(rope), {}, []
    for field, (old, new) in _HF_ROTARY.items():
        given = {old: hf.get(old), f"rope_parameters.{new}": rope.pop(new, None)}
        given = {key: _as(float, key, value) for key, value in given.items() if value is not None}
        if len(set(given.values())) == 1:
            fields[field] = next(iter(given.values()))
        elif given:
            disagreeing = " and ".join(f"{key}={value}" for key, value in given.items())
            problems.append(f"{disagreeing} disagree")
        else:
            problems.append(f"{old} is missing")
    for key, value in rope.items():
        if (key, value) != ("rope_type", "default"):
            problems.append(f"rope_parameters.{key}={value!r} is not supported")
    return fields, problems
