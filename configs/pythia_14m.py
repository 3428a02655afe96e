"""Pythia-14M: 143,000 steps of 1,024 x 2,048 tokens of the Pile, in Pythia's own order.

    neox-jax train --config configs/pythia_14m.py --workdir runs/pythia_14m

Published run: float16 where this uses bfloat16; no hours and no scores were published for this size.
Not run here from beginning to end: the mesh is where to start on your own devices.
"""

from pythia import recipe


def get_config():
    config = recipe("pythia-14m", learning_rate=1e-3)
    return config
