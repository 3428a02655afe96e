"""LoRA on the quickstart's model: it learns to answer an instruction.

    neox-jax train --config configs/finetune_example.py --workdir runs/finetune

After `make quickstart`. 196,608 numbers are trained, 6% of the model's. Measured on two cores of an AMD EPYC, shared
with other work: 0.8 s a step, 8 minutes; the loss on held-out instructions ends at 2.61 nats a token. Of 100 held-out
answers 97 have the format and end by themselves, none before (docs/finetuning.md).
"""

from neox_jax.config import default_config

FOLDER = "runs/quickstart"


def get_config():
    config = default_config()
    config.init_from = f"{FOLDER}/run"
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.lora.targets = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    config.train.steps = 600
    config.train.batch_size = 8
    config.train.seq_length = 256
    config.optimizer.learning_rate = 6e-3
    config.optimizer.min_learning_rate = 6e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.data.train = f"{FOLDER}/corpus/instructions.jsonl"
    config.data.valid = f"{FOLDER}/corpus/instructions_heldout.jsonl"
    config.data.tokenizer = f"{FOLDER}/tokenizer.json"
    config.checkpoint.every = 100
    config.log.every = 20
    config.eval.every = 100
    config.eval.batches = 10
    config.eval.sample_tokens = 0
    return config
