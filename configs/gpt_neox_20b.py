"""GPT-NeoX-20B: 150,000 steps of 1,536 x 2,048 tokens of the Pile (arXiv:2204.06745).

    neox-jax train --config configs/gpt_neox_20b.py --workdir runs/gpt_neox_20b

Published run: 96 A100-40GB (data 12 x pipeline 4 x tensor 2), float16 where this uses bfloat16. At the 117 TFLOP/s a
GPU that are quoted for it, 1,460 hours by arithmetic.
To expect of the published weights, zero-shot: LAMBADA 0.720, SciQ 0.928, PIQA 0.779.
Not run here from beginning to end: parameters, gradients and optimizer state take 16 bytes each, 329 GB in all, and the
mesh is where to start on your own devices.
"""

from neox_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gpt-neox-20b"
    config.mesh.data = 1  # fsdp alone was the fastest of the meshes estimated for v5p 4x4x4 and v5e 16x16
    config.mesh.fsdp = -1
    config.train.steps = 150_000
    config.train.batch_size = 1536
    config.train.seq_length = 2048
    config.train.dtype = "bfloat16"
    config.train.microbatches = 4
    config.train.remat = "dots"
    config.train.seed = 1234
    config.optimizer.learning_rate = 0.97e-4
    config.optimizer.min_learning_rate = 0.97e-5
    config.optimizer.schedule = "cosine_floor"
    config.optimizer.warmup_steps = 1500
    config.optimizer.weight_decay = 0.01
    config.data.train = "data/pile_text_document"
    config.data.split = "995, 4, 1"
    config.data.order = "megatron"
    config.data.tokenizer = "data/20B_tokenizer.json"
    config.checkpoint.every = 500
    config.eval.every = 1000
    return config
