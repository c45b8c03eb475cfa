"""The small checkpoint that this repository keeps (`trained/`): trained from nothing, measured, its card written."""
