"""What config.py resolved, as the oracles are handed it. The one way: no oracle here reads a convention out of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_dsa import ModelArgs
from reference.equations import Conventions


def conventions_of(args: ModelArgs) -> Conventions:
    return Conventions(
        indexer_rope=args.indexer_rope,
        main_rope=args.main_rope,
        indexer_norm_eps=args.indexer_norm_eps,
        latent_norm_eps=args.latent_norm_eps,
        mtp_reuses_selection=args.mtp_reuses_selection,
        mtp_zero_first_embedding=args.mtp_zero_first_embedding,
    )


def conventions_in(config: Mapping[str, Any], **overrides: Any) -> Conventions:
    """As above, of a config.json. Raises `ConfigError`."""
    return conventions_of(ModelArgs.from_dict(config, **overrides))
