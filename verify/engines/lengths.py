"""How long a prompt a model is run on, and how long a one this machine's memory holds."""

from __future__ import annotations

from glm_dsa import ModelArgs, memory


def default_length(args: ModelArgs, rows: int) -> int:
    """Four times index_topk, or what half of this machine's memory holds of the oracles' attention scores.

    HF and the equations hold [H, S, T] whole, three times over in float32 and in float64.
    """
    wanted, most = max(80, 4 * args.index_topk), _longest_prompt(args, rows, 0.5)
    if most <= args.index_topk:
        raise ValueError(
            f"index_topk = {args.index_topk}: this machine's memory holds the oracles' attention to {most} tokens; add "
            "--index-topk 64, say, for a look at selections, or --tokens N for one without"
        )
    return min(wanted, most)


def _longest_prompt(args: ModelArgs, rows: int, share: float) -> int:
    return int((memory.physical() * share / nbytes_of_scores(args, rows, 1)) ** 0.5)


def nbytes_of_scores(args: ModelArgs, rows: int, tokens: int) -> int:
    """Bytes of [H, S, T], three times over, in float32 for each of HF's rows and in float64."""
    return args.num_attention_heads * (12 * rows + 24) * tokens**2


def checked_length(args: ModelArgs, rows: int, tokens: int) -> int:
    if tokens > (most := _longest_prompt(args, rows, 0.9)):
        raise ValueError(f"--tokens {tokens}: this machine's memory holds the oracles' attention to {most} tokens")
    return tokens
