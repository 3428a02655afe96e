"""A NeoX of 4.2 million parameters on Python's own standard library, in a few minutes on two CPU cores.

    make quickstart

which is `neox-jax corpus`, `train-tokenizer`, `tokenize` and then

    neox-jax train --config configs/quickstart.py --workdir runs/quickstart/run
"""

from neox_jax.config import default_config

FOLDER = "runs/quickstart"


def get_config():
    config = default_config()
    config.model.preset = "quickstart"
    config.train.steps = 1200
    config.train.batch_size = 8
    config.train.seq_length = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.min_learning_rate = 3e-4
    config.optimizer.warmup_steps = 50
    config.data.train = f"{FOLDER}/data/train"
    config.data.valid = f"{FOLDER}/data/heldout"
    config.data.tokenizer = f"{FOLDER}/tokenizer.json"
    config.checkpoint.every = 200
    config.log.every = 20
    config.eval.every = 400
    config.eval.batches = 20
    config.eval.prompt = "def "
    return config
