"""Typed access to a config's keys, and the keys that may be left unread.

Whatever is neither read nor listed here is refused by name: a key dropped in silence is how ports went wrong.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConfigError

# Keys that change nothing in inference, each with the reason why it may be ignored.
IGNORED = {
    "architectures": "the model_type decides",
    "attention_dropout": "training only",
    "auto_map": "no remote code is ever run",
    "bos_token_id": "tokenizer",
    "chunk_size_feed_forward": "HF memory option",
    "dtype": "the tensors decide",
    "eos_token_id": "tokenizer",
    "ep_size": "deployment",
    "head_dim": "redundant, and not the rotary width (64 in GLM-5.1, 192 in GLM-5.2); qk_rope_head_dim is",
    "id2label": "HF default",
    "initializer_range": "training only",
    "is_encoder_decoder": "HF default",
    "label2id": "HF default",
    "layer_types": "HF's cache dispatch; indexer_types decides",
    "max_position_embeddings": "no table depends on it (RoPE is computed for any position)",
    "mlx_lm_version": "build note",
    "model_file": "mlx-lm's own loader option",
    "name_or_path": "HF bookkeeping",
    "_name_or_path": "HF bookkeeping",
    "_attn_implementation": "HF runtime option",
    "_attn_implementation_autoset": "HF runtime option",
    "pruning": "a pruner's note",
    "rapid_quantization": "a quantizer's note",
    "reap_pruning": "a pruner's note",
    "surgery_dummy": "a converter's note",
    "output_attentions": "HF runtime option",
    "output_hidden_states": "HF runtime option",
    "output_router_logits": "training only",
    "pad_token_id": "tokenizer",
    "pretraining_tp": "training only",
    "problem_type": "HF default",
    "quantization": "read by the loader",
    "quantization_config": "read by the loader",
    "quantize_activations": "mlx-lm's own loader option",
    "return_dict": "HF runtime option",
    "router_aux_loss_coef": "training only",
    "seq_aux": "training only",
    "aux_loss_alpha": "training only",
    "tokenizer_class": "tokenizer",
    "torch_dtype": "the tensors decide",
    "transformers_version": "HF bookkeeping",
    "transformers_weights": "HF bookkeeping",
    "use_cache": "HF runtime option",
}

# Generation defaults and loader notes that HF and converters have kept in config.json over the years.
GENERATION = {
    "_commit_hash", "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "is_decoder", "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p",
    "torchscript", "transformers.js_config", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
}  # fmt: skip

# Keys with one admissible value: anything else is another architecture.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "moe_router_dtype": ("float32",),
    "partial_rotary_factor": (1.0,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "use_qk_norm": (False,),
}

LARGEST_INT = 10**15
LARGEST_CONFIG, LARGEST_JSON = 1 << 20, 32 << 20  # bytes of a config.json; of an index, or of a header
BYTES_A_PART = 32  # objects and lists are bounded too: each takes up to 300 bytes of memory
SMALLEST, LARGEST = 1e-30, 1e9  # eps, factors: float32 would make 0 or infinity of what lies far beyond
_MISSING = object()


class Reader:
    """A config, remembering what was read of it. null counts as missing, as in HF. Every failure is a `ConfigError`."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        if not isinstance(params, Mapping):
            raise ConfigError(f"config: {type(params).__name__}; expected an object of keys and values")
        self.params = params
        self.seen: set[str] = set()

    def has(self, key: str) -> bool:
        return self.params.get(key) is not None

    def source(self, key: str) -> str:
        return f"key {key}" if self.has(key) else "default"

    def raw(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        value = self.params.get(key)
        return default if value is None else value

    def required(self, key: str, default: Any, what: str) -> Any:
        value = self.raw(key, default)
        if value is _MISSING:
            raise ConfigError(f"{key} is {'null' if key in self.params else 'missing'}: expected {what}")
        return value

    def count(self, key: str, default: Any = _MISSING, least: int = 1, most: int = 1 << 24) -> int:
        value = self.required(key, default, "a whole number")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"{key} = {value!r}: expected a whole number of at least {least} (and at most {most:,})")
        return value

    def positive(self, key: str, default: Any = _MISSING) -> float:
        value = self.required(key, default, "a number above 0")
        if not is_number(value) or not SMALLEST <= value <= LARGEST:
            raise ConfigError(
                f"{key} = {value!r}: expected a finite number above 0 (from {SMALLEST:g} to {LARGEST:g}: float32 holds it)"
            )
        return float(value)

    def flag(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{key} = {value!r}: expected true or false")
        return value

    def choice(self, key: str, allowed: tuple[Any, ...]) -> Any:
        value = self.required(key, _MISSING, f"one of {', '.join(map(repr, allowed))}")
        if value not in allowed:
            raise ConfigError(f"{key} = {value!r}: allowed are {', '.join(map(repr, allowed))}")
        return value

    def fixed(self) -> None:
        for key, allowed in FIXED.items():
            value = self.raw(key, allowed[0])
            if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                raise ConfigError(f"{key} = {value!r}: this architecture has {allowed[0]!r}")

    def equal(self, key: str, due: int, why: str) -> None:
        value = self.raw(key, due)
        if value != due or type(value) is not int:
            raise ConfigError(f"{key} = {value!r}: must equal {why} = {due}")

    def rope(self) -> tuple[float, dict[str, Any] | None]:
        """(theta, scaling), from `rope_parameters` (5.x) or the top level (4.7-Flash); scaling None for plain RoPE."""
        merged: dict[str, Any] = {}
        for key in ("rope_scaling", "rope_parameters"):
            value = self.raw(key, {})
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key} = {value!r}: expected an object with rope_type (and rope_theta)")
            merged |= value
        inner, outer = merged.pop("rope_theta", None), self.raw("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise ConfigError(f"rope_theta = {outer!r}, but rope_parameters says {inner!r}: they must agree")
        theta = inner if inner is not None else outer
        if theta is None:
            raise ConfigError("rope_theta is missing (in rope_parameters, or top level): expected a number above 1")
        if not is_number(theta) or not 1 < theta <= LARGEST:
            raise ConfigError(
                f"rope_theta = {theta!r} (in rope_parameters, or top level): expected a number above 1 (and at most {LARGEST:g})"
            )
        if merged.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError("rope_parameters.partial_rotary_factor: only 1.0; the rotary width is qk_rope_head_dim")
        old = merged.pop("type", "default")  # the name of rope_type in older configs
        return float(theta), _scaling(merged.pop("rope_type", old), merged)

    def done(self) -> None:
        unread = (k for k in self.params if k not in self.seen and self.has(k))
        unknown = sorted(str(k) for k in unread if k not in IGNORED and k not in GENERATION)
        if unknown:
            raise ConfigError(
                f"config key{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}: neither handled nor known to be "
                "harmless; if it changes nothing in inference, list it in glm_dsa/config_reader.py, IGNORED"
            )


SCALINGS = {  # rope_type: (keys that must be there, keys that may be)
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"},
    ),
}


def _scaling(kind: Any, rest: dict[str, Any]) -> dict[str, Any] | None:
    if kind == "default":
        if rest:
            raise ConfigError(f"rope_parameters: {sorted(rest)} have no meaning for rope_type 'default'")
        return None
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ConfigError(f"rope_type = {kind!r}: allowed are 'default', {', '.join(map(repr, SCALINGS))}")
    needed, optional = SCALINGS[kind]
    missing, unknown = needed - set(rest), set(rest) - needed - optional
    if missing or unknown:
        raise ConfigError(f"rope_parameters for {kind!r}: missing {sorted(missing)}, not known {sorted(unknown)}")
    for key, value in rest.items():
        least = 1 if key in ("factor", "original_max_position_embeddings") else 0
        if key == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"rope_parameters.truncate = {value!r}: expected true or false")
        elif not is_number(value) or not least <= value <= LARGEST:
            raise ConfigError(f"rope_parameters.{key} = {value!r}: expected a number from {least} to {LARGEST:g}")
    return {"rope_type": kind, **rest}


def is_number(value: Any) -> bool:
    """True for numbers that fit a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= LARGEST_INT


def read_json(path: Path, most: int = LARGEST_CONFIG) -> dict[str, Any]:
    """A JSON object from a regular file of at most so many bytes. Raises `ConfigError` naming the file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            what = f"{status.st_size:,} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
            raise ConfigError(f"{path}: {what}; expected a JSON file of at most {most:,} bytes")
        value = parse_json(path.read_bytes(), most)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; expected a checkpoint folder or a config.json") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {type(value).__name__}; expected a JSON object")
    return value


def parse_json(text: bytes, most: int) -> Any:
    """JSON in UTF-8, no key twice, of no more parts than files of up to `most` bytes need. Raises ValueError."""
    parts = text.count(b"{") + text.count(b"[")
    if parts > most // BYTES_A_PART:
        raise ValueError(f"{parts:,} objects and lists; expected at most {most // BYTES_A_PART:,}")
    try:
        return json.loads(text.decode(), object_pairs_hook=unique_pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


def unique_pairs(pairs: list[tuple[str, Any]]) -> Any:
    """For json's object_pairs_hook: a key that comes twice means two things. Raises ValueError."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    # transformers writes non-finite floats as {"__float__": "Infinity"}
    if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return value
