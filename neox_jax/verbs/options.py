"""Options that several verbs take, and what they are read by."""

import argparse

from neox_jax.errors import InputError
from neox_jax.verbs.terminal import usage

DTYPES, QUANTIZATIONS = ("float32", "bfloat16", "float16"), ("int8",)
ADAPTER_HELP = "a run of adapters (lora.rank), or PEFT's folder, for the model"
SOURCE_HELP = "a Hugging Face folder or hub id, a NeoX checkpoint, or a run folder (its newest step, or FOLDER@STEP)"


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parse_index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def parse_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names; write A,B")
    return names


def parse_steps(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; write A:B, with A below B")
    return range(int(first), int(last))


def add_place(add) -> None:
    """What says which of several processes this is (see `joined`)."""
    add("--distributed", choices=("auto", "off"), help="auto: one of the processes of a TPU pod, srun or Open MPI")
    add("--coordinator", metavar="HOST:PORT", help="one of several processes on plain machines: where process 0 is met")
    add("--num-processes", type=int, metavar="N", help="with --coordinator: how many there are")
    add("--process-id", type=int, metavar="I", help="with --coordinator: which this one is, from 0")
    add("--distributed-timeout", type=_seconds, default=300, metavar="SECONDS", help="how long others are waited for")
    add("--heartbeat-timeout", type=_seconds, default=100, metavar="SECONDS", help="a process so long silent is dead")


def _seconds(text: str) -> int:
    """Whole seconds, at least one: what jax takes."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of seconds above 0")
    return int(text)


def is_half_placed(args) -> bool:
    """Whether the options of `add_place` do not go together, which is then said."""
    plain = (args.coordinator, args.num_processes, args.process_id)
    wrong = any(value is not None for value in plain) and (None in plain or args.distributed is not None)
    if wrong:
        usage(f"{args.verb} takes --coordinator, --num-processes and --process-id together, or --distributed")
    return wrong


def joined(args, *, facts: dict, problem: InputError | None = None):
    """The other processes, if this is one of several: see `distributed.joined`."""
    from neox_jax import distributed

    place = distributed.find_place(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        distributed=args.distributed,
        timeout_seconds=args.distributed_timeout,
    )
    return distributed.joined(
        place,
        facts=facts,
        problem=problem,
        timeout_seconds=args.distributed_timeout,
        heartbeat_seconds=args.heartbeat_timeout,
        debug=args.debug,
    )
