"""Instructions for GPT-NeoX-20B: all weights, on a v5p-16 slice (8 chips of 95 GiB).

    neox-jax train --config configs/finetune_20b.py --workdir runs/chat_20b --config.data.train=chat.jsonl

Memory, by TPU's compiler (benchmarks/estimate_tpu.py --config configs/finetune_20b.py --topology v5p:2x2x2): 67.0 GiB a
chip, 28.8 of them parameters and moments; a step of 64 x 2,048 tokens is estimated at 7.9 s, an MFU of 56%. With four
microbatches instead of two: 60.8 GiB, 11.2 s.
Adapters alone need less of a slice (--config.lora.rank=16, all four targets, remat full): in bfloat16 on 8 chips of v5e
11.6 GiB of each one's 16 (rows of 2,048, 16 a step), over int8 weights on 4 of them 11.2 GiB (8 rows a step); by the
same estimate. Not run here.
"""

import finetune_1_4b


def get_config():
    config = finetune_1_4b.get_config()
    config.init_from = "EleutherAI/gpt-neox-20b"
    config.model.preset = "gpt-neox-20b"
    config.train.batch_size = 64
    config.train.microbatches = 2
    config.train.remat = "full"
    config.optimizer.learning_rate = 2e-6
    return config
