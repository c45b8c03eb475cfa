"""transformers, models/glm4_moe_lite: `first_k_dense_replace` of a config.json is never read.

Expected: as many dense layers as the key says (it is in zai-org's GLM-4.7-Flash config; 1 there, which is also what is
assumed, so that nothing shows with it). With any other value HF builds another model than the weights are of. Needs
transformers alone.
"""

import sys

from transformers import AutoConfig


def bug() -> str:
    """What is wrong; empty where it was mended."""
    found = AutoConfig.for_model("glm4_moe_lite", num_hidden_layers=4, first_k_dense_replace=2).mlp_layer_types
    due = ["dense", "dense", "sparse", "sparse"]
    return "" if list(found) == due else f"first_k_dense_replace=2: {list(found)}"


if __name__ == "__main__":
    print(bug() or "mended")
    sys.exit(bool(bug()))
