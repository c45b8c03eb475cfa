"""python -m examples.layout [CHECKPOINT TEXTS.npy]: under which RoPE layout its indexers were trained, as the weights tell.

TEXTS.npy: int [texts, length], at least 4, better 8, different texts, of several times index_topk tokens, by the model's own
tokenizer: np.save("TEXTS.npy", np.stack([AutoTokenizer.from_pretrained(...).encode(text)[:4096] for text in texts])).
"""

import json
import sys
from pathlib import Path

import numpy as np

from reference import corpus, layout
from reference.stored import InFloat32, read_tensors

folder = Path(sys.argv[1] if sys.argv[1:] else "reference/trained/interleaved")
if sys.argv[2:]:
    tokens = np.load(sys.argv[2])
else:
    texts = json.loads(Path("reference/trained/probes.json").read_text())["texts"]
    tokens = np.stack([corpus.encode(text)[:384] for text in texts[:6]])

config = json.loads((folder / "config.json").read_text())
weights = InFloat32(read_tensors(folder))  # FP8 blocks and packed builds too
# the first layers need no other one's weights
mass = layout.captured_mass(config, weights, tokens, layers=3, embed=weights.embed)
found = layout.evidence(mass)
print(
    found.layout, found.ratio, found.mass, found.doubt
)  # layout: None where the evidence does not suffice: doubt says why
