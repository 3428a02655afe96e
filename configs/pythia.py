"""What every Pythia shares (arXiv:2304.01373); the files of the sizes start from `recipe`.

Data: Pythia's pre-shuffled files, rows of 2,049 tokens in training order. data.train names them without .bin/.idx.
"""

from neox_jax.config import default_config


def recipe(preset: str, *, learning_rate: float):
    config = default_config()
    config.model.preset = preset
    config.train.steps = 143_000
    config.train.batch_size = 1024
    config.train.seq_length = 2048
    config.train.microbatches = 1  # raise it until a step fits into the memory of your devices
    config.train.dtype = "bfloat16"
    config.train.seed = 1234
    config.optimizer.learning_rate = learning_rate
    config.optimizer.min_learning_rate = learning_rate / 10
    config.optimizer.schedule = "cosine_floor"
    config.optimizer.warmup_steps = 1430
    config.optimizer.weight_decay = 0.1
    config.data.train = "data/pile_0.87_deduped_text_document"
    config.data.order = "sequential"
    config.data.tokenizer = "data/20B_tokenizer.json"
    config.checkpoint.every = 1000
    config.checkpoint.steps = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    config.checkpoint.keep_every = 1000
    return config
