"""What attention costs as the context grows: ours beside mlx-lm's and HF's, on the same weights, in one run.

contenders  one attention block of each, on a cache that is filled already
timing      rounds in both orders: medians and spread, peak memory
flops       operations and bytes of each part, on paper; and counted in the graph that runs
floor       the bare primitives at the same shapes: what no arrangement of them could be faster than
suite       what is run, and the targets
roofline    GLM-5.2 on one machine, from the counts alone
"""
