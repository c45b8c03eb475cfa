"""The release gate: `pytest verify/` judges an MLX definition of GLM-5.x against HF and the float64 equations."""

from pathlib import Path

FOLDER = Path(__file__).parent  # this package's
ROOT = FOLDER.parent  # the repository's, which glm_dsa and reference lie in too
