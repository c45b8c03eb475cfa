"""python -m examples.drift [RELEASE ORIGINAL OUT]: where a build drifts, what its bits cost, and a better build within a budget.

Without arguments the small trained checkpoint is packed to 4 bit, and that is the release.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

import mlx_lm

import glm_dsa.mlx_lm
from verify import drift

glm_dsa.mlx_lm.register()
if sys.argv[1:]:
    release, original, out = map(Path, sys.argv[1:])
else:
    original, out = Path("reference/trained/interleaved"), Path(mkdtemp(prefix="glm-dsa-"))
    release = out / "release"
    mlx_lm.convert(str(original), str(release), quantize=True, q_bits=4, q_group_size=32)

text = Path("README.md").read_text()  # any text of yours; without one, random tokens
found = drift.compare(str(release), against=str(original), text=text, length=96, suggest_bits=6.25)
print(found.summary())
print(found.divergence, found.distributions["kl_mean"])  # plain objects: comparisons, causes, growth, tokens, ...
for row in found.sensitivity.rows:
    print(row.component, row.layers, row.alone, row.added_bytes)
found.sensitivity.recipe.write(out / "recipe.toml")
mlx_lm.convert(str(original), str(out / "better"), recipe=str(out / "recipe.toml"))
print(f"{out / 'better'}: {found.sensitivity.recipe.bits:.2f} bits a weight")
