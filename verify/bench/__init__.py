"""What attention costs as the context grows: ours beside mlx-lm's and HF's, on the same weights, in one run.

sides     one attention block of each, on a cache that is filled already
timing    rounds in both orders: medians and spread, peak memory
counting  operations and bytes of each part, on paper; and counted in the graph that runs
floor     the bare primitives at the same shapes: what no arrangement of them could be faster than
course    what is run, and the targets
paper     GLM-5.2 on one machine, from the counts alone
"""
