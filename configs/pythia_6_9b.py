"""Pythia-6.9B: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_6_9b.py --workdir runs/pythia_6_9b

Published in float16, where this uses bfloat16.
By arithmetic: 1.2e+22 FLOPs in all, 27,705 hours of one A100 at 40% of its 312 TFLOP/s.
To expect, zero-shot, of the published weights: LAMBADA / PIQA / ARC-easy / SciQ accuracy .673 / .752 / .673 / .897.
Unlike the smaller sizes it starts from N(0, 0.02), which its preset states.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-6.9b", learning_rate=1.2e-4)
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters and optimizer state spread over all devices
    config.train.remat = "full"
    return config
