"""Which fields of a configuration make a run that goes on another run than it was."""

import json

from neox_jax.config import flatten, is_conversations

# What the steps to come depend on ("optimizer." is all of it); every other field may be changed between two starts.
DEPENDS_ON = ("train.batch_size", "train.seq_length", "train.dtype", "train.seed", "optimizer.", "lora.")
DEPENDS_ON += ("data.train", "data.split", "data.order", "data.seed", "data.num_samples")
DEPENDS_ON += ("train.eod_mask_loss", "train.document_masks", "train.loss_rows")
MASKS_DEPEND_ON = ("data.eod_token", "data.tokenizer", "data.chat_template")


def changed_fields(before: dict, now: dict) -> list[str]:
    """Names each field on which the steps to come depend, where a run's `config.json` and its configuration differ:
    "optimizer.b2 is 0.99, was 0.95". Not `model`, whose fields are compared with model.json, nor `train.steps` where it
    only moves the schedule's end.

    before, now: configurations as nested dicts. What only one of them has is of another version: left out.
    """
    before, now = (flatten(json.loads(json.dumps(one))) for one in (before, now))  # one of them was a file
    depends_on = DEPENDS_ON
    if now["data.order"] == "megatron" and not now["data.num_samples"]:
        depends_on += ("train.steps",)  # then it is how many samples are put in order
    if now["train.eod_mask_loss"] or now["train.document_masks"] or is_conversations(now["data.train"]):
        depends_on += MASKS_DEPEND_ON
    names = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} is {now[name]!r}, was {before[name]!r}" for name in names if name.startswith(depends_on)]
