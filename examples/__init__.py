"""Each runs from the root of this repository, on a small trained checkpoint unless another is named: python -m examples.load."""
