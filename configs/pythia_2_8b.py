"""Pythia-2.8B: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_2_8b.py --workdir runs/pythia_2_8b

Published in float16, where this uses bfloat16.
By arithmetic: 5.1e+21 FLOPs in all, 11,267 hours of one A100 at 40% of its 312 TFLOP/s.
To expect, zero-shot, of the published weights: LAMBADA / PIQA / ARC-easy / SciQ accuracy .647 / .739 / .644 / .882.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-2.8b", learning_rate=1.6e-4)
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters and optimizer state spread over all devices
    config.train.remat = "full"
    return config
