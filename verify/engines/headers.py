"""A release by its headers: config.json and every tensor's name, dtype and shape, from a folder or from the hub.

No weight is read, and none is downloaded: of a repository that is not in the hub's cache, byte ranges are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_dsa import ModelArgs, foreign
from glm_dsa.checkpoint import Headers, known, read_headers
from glm_dsa.config_reader import read_json
from glm_dsa.errors import CheckpointError, ConfigError, GlmDsaError
from glm_dsa.storage import Stored, stored_as, stored_headers

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")
CONFIG = "config.json"
# config keys in which two sides, or a release and its original, must be alike
SHAPES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "n_routed_experts", "moe_intermediate_size", "intermediate_size",
    "index_n_heads", "index_head_dim", "indexer_types", "mlp_layer_types", "n_shared_experts", "attention_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """`origin`: what the user called it; `folder`: None where only headers were asked for from the hub."""

    origin: str
    folder: Path | None
    config: Mapping[str, Any]
    tensors: Headers
    revision: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """How it is laid out, where that is neither HF's way nor mlx-lm's, and what of it is not read."""
        return self.tensors.notes

    def args(self, **overrides: Any) -> ModelArgs:
        """Raises `ConfigError` naming the file: there may be two sides."""
        try:
            return ModelArgs.from_dict(self.config, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{self.origin.rstrip('/')}/{CONFIG}: {error}") from None

    @property
    def is_packed(self) -> bool:
        return any(name.endswith(".scales") for name in self.tensors)


def headers_of(target: str, revision: str | None = None) -> Release:
    """A checkpoint folder, or a repository's name (and its revision). Raises `CheckpointError` in one line."""
    if target and Path(target).is_dir():
        return _of_folder(target, Path(target))
    if Path(target).exists() or not REPOSITORY.fullmatch(target):
        raise CheckpointError(
            f"{target or repr(target)}: no such folder, and no name of a repository; expected a checkpoint's folder or OWNER/NAME"
        )
    cached = _in_cache(target, revision)
    return _of_folder(target, cached) if cached is not None else _of_repository(target, revision)


def _of_folder(origin: str, folder: Path) -> Release:
    try:
        found = Release(origin, folder, read_json(folder / CONFIG), read_headers(folder))
    except GlmDsaError:
        foreign.refuse_folder(folder, origin)
        raise
    foreign.refuse(origin, found.config, found.tensors)
    return found


def _in_cache(repository: str, revision: str | None) -> Path | None:
    """The snapshot of a repository that was downloaded before, if all of its weights are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        stored_headers(folder)
    except (LocalEntryNotFoundError, CheckpointError):
        return None
    return folder


def _of_repository(repository: str, revision: str | None) -> Release:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # it would tell of each attempt
    try:
        config = read_json(Path(hf_hub_download(repository, CONFIG, revision=revision)))
        files = HfApi().get_safetensors_metadata(repository, revision=revision).files_metadata
    except CheckpointError:
        raise
    except Exception as error:  # requests', httpx's and the hub's own: no common base
        foreign.refuse(repository, {}, {}, _files_of(repository, revision))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{repository}: no such folder here, and the hub does not give it: {reason}") from None
    tensors: dict[str, Stored] = {}
    for file, header in sorted(files.items()):
        for name, entry in header.tensors.items():
            fields = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": entry.data_offsets}
            tensors[name] = stored_as(Path(file), name, fields)
    foreign.refuse(repository, config, tensors)
    try:
        args = ModelArgs.from_dict(config)
    except ConfigError:  # whoever needs it will say so
        args = None
    return Release(repository, None, config, known(repository, tensors, args), revision)


def _files_of(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # as above
        return []


def small_file(release: Release, name: str) -> Path | None:
    """A file beside the weights (a tokenizer's, a template), of the folder or from the hub; None where there is none."""
    if release.folder is not None:
        file = release.folder / name
        return file if file.exists() or file.is_symlink() else None
    return _download(release.origin, name, release.revision)


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception:  # not there, or not given: nothing that a verdict about weights could hang on
        return None
