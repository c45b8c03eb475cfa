"""What is true: HF transformers, and the paper's equations in float64. Never imports mlx or glm_dsa."""
