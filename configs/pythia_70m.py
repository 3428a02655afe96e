"""Pythia-70M: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_70m.py --workdir runs/pythia_70m

Published in float16, where this uses bfloat16.
By arithmetic: 9.2e+19 FLOPs in all, 204 hours of one A100 at 40% of its 312 TFLOP/s.
To expect, zero-shot, of the published weights: LAMBADA / PIQA / ARC-easy / SciQ accuracy .185 / .595 / .374 / .601.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-70m", learning_rate=1e-3)
    return config
