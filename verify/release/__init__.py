"""A release put on trial: one pass over its weights, layer by layer, beside HF, the equations, and its original."""
