"""Pythia-410M: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_410m.py --workdir runs/pythia_410m

Published in float16, where this uses bfloat16.
By arithmetic: 7.3e+20 FLOPs in all, 1,617 hours of one A100 at 40% of its 312 TFLOP/s.
To expect, zero-shot, of the published weights: LAMBADA / PIQA / ARC-easy / SciQ accuracy .516 / .668 / .521 / .811.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-410m", learning_rate=3e-4)
    return config
