"""The release gate: `pytest verify/` judges an MLX definition of GLM-5.x against HF and the float64 equations."""
