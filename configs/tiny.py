"""The smallest NeoX that every mesh of 8 devices divides: seconds a run; what the tests use.

    neox-jax train --config configs/tiny.py --workdir runs/tiny --config.data.train=PREFIX

4 layers, 8 heads of 8, a vocabulary of 512, 265,600 parameters. On two CPU cores 20 steps take about a second after
compilation; the loss begins at ln(512) = 6.24. Any .bin/.idx of ids below 512 will do.
"""

from neox_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "tiny"
    config.train.steps = 20
    config.train.batch_size = 8
    config.train.seq_length = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.min_learning_rate = 1e-4
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 10
    config.log.every = 1
    return config
