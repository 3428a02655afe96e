"""Pythia-1B: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_1b.py --workdir runs/pythia_1b

Published in bfloat16, as here.
By arithmetic: 1.8e+21 FLOPs in all, 3,907 hours of one A100 at 40% of its 312 TFLOP/s.
To expect, zero-shot, of the published weights: LAMBADA / PIQA / ARC-easy / SciQ accuracy .562 / .707 / .569 / .840.
The learning rate is the README's; the published configuration file says 2.5e-4.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-1b", learning_rate=3e-4)
    config.mesh.data = 1
    config.mesh.fsdp = -1  # parameters and optimizer state spread over all devices
    config.train.remat = "full"
    return config
