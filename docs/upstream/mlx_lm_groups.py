"""mlx-lm, models/deepseek_v32.py, group_expert_select: experts of losing groups get score 0, and may win with it.

Expected: -inf, as transformers' route_tokens_to_experts has it: biased scores (sigmoid + e_score_correction_bias) can be
negative, and then 0 beats every expert of the winning groups. Concerns n_group > 1. Runs on a CPU; needs mlx-lm alone.
"""

import sys

import mlx.core as mx
from mlx_lm.models.deepseek_v32 import group_expert_select


def bug() -> str:
    """What is wrong; empty where it was mended."""
    logits = mx.array([[0.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0]])
    bias = mx.full((8,), -2.0)  # every biased score is negative
    experts, _ = group_expert_select(logits, bias, 2, 2, 1, 1.0, True)
    chosen = sorted(experts[0].tolist())
    return "" if max(chosen) < 4 else f"experts {chosen} are chosen; the winning group is 0 to 3"


if __name__ == "__main__":
    print(bug() or "mended")
    sys.exit(bool(bug()))
