"""Instructions for pythia-1.4b: all weights, three passes over about 10,000 conversations.

    neox-jax train --config configs/finetune_1_4b.py --workdir runs/chat --config.data.train=chat.jsonl

Only what is answered counts, conversations are packed into rows and do not see each other (docs/data.md). The rate is a
fiftieth of pretraining's peak; weight decay is off, since it would pull at what was learnt.
Parameters, gradients and moments take 16 bytes each, 22.6 GB in all: on one device of 40 GB, or over several by
mesh.fsdp. Of less memory: adapters alone (--config.lora.rank=16 --config.optimizer.learning_rate=2e-4) take 2.8 GB for
the weights in bfloat16, 1.5 GB with --config.lora.quantize=int8, and little besides. Not run here from start to end.
"""

from neox_jax.config import default_config


def get_config():
    config = default_config()
    config.init_from = "EleutherAI/pythia-1.4b"
    config.model.preset = "pythia-1.4b"  # of init_from; for estimates, which do not open it
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.train.steps = 500
    config.train.batch_size = 16
    config.train.seq_length = 2048
    config.train.dtype = "bfloat16"
    config.train.remat = "dots"
    config.optimizer.learning_rate = 4e-6
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.data.train = "chat.jsonl"
    config.data.tokenizer = "data/20B_tokenizer.json"
    config.checkpoint.every = 100
    config.eval.sample_tokens = 0
    return config
