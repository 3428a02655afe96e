"""`neox-jax train` and `plot`."""

import argparse
import dataclasses

from neox_jax.errors import InputError
from neox_jax.verbs.options import add_place, is_half_placed, joined, parse_count, parse_names, parse_steps
from neox_jax.verbs.terminal import EXIT_START_AGAIN, EXIT_USAGE, plural


def add_verbs(verb) -> None:
    add = verb("train", _train, "Train a model; the same command again goes on where it stopped.").add_argument
    add("--config", required=True, metavar="FILE", help="a file that defines get_config(), as those in configs/")
    add("--workdir", required=True, metavar="DIR", help="the run folder: checkpoints, metrics, configuration")
    add("--config.FIELD=VALUE", dest="shown_only", action="store_true", help="override a field, as train.steps=100")
    add("--accept-changes", action="store_true", help="go on with fields that make it another run than it was")
    add(
        "--profile",
        type=_profile_steps,
        metavar="START:STOP",
        help="trace steps START to STOP - 1, counted from 1 as in metrics.jsonl, into DIR/profile",
    )
    add_place(add)

    add = verb("plot", _plot, "Draw the curves of runs: loss, gradient norm, speed.").add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders, or files as their metrics.jsonl")
    add("--output", default="metrics.png", metavar="FILE.png", help="default: metrics.png")
    add("--x", choices=("step", "tokens", "hours"), default="step", help="hours: of training, summed over steps")
    add("--metrics", type=parse_names, default=[], metavar="A,B", help="a panel each, by their names in metrics.jsonl")
    add(
        "--smooth",
        type=parse_count,
        default=1,
        metavar="N",
        help="draw means of N neighbouring lines, the lines faintly",
    )


def _profile_steps(text: str) -> range:
    steps = parse_steps(text)
    if not steps.start:
        raise argparse.ArgumentTypeError(f"{text!r} begins with step 0; steps are counted from 1, as in metrics.jsonl")
    return steps


def _train(args) -> int:
    if is_half_placed(args):
        return EXIT_USAGE
    from neox_jax.config import flatten, load_config

    config, problem = None, None
    try:
        config = load_config(args.config, args.overrides)
    except InputError as error:  # which the other processes are told of
        problem = error
    facts = {} if config is None else flatten(dataclasses.asdict(config), "config.")
    facts["--accept-changes"] = args.accept_changes
    with joined(args, facts=facts, problem=problem) as peers:
        from neox_jax.train import train

        result = train(config, args.workdir, peers=peers, accept_changes=args.accept_changes, profile=args.profile)
    return _report_training(result) if peers.process_id == 0 else EXIT_START_AGAIN if result.interrupted else 0


def _report_training(result) -> int:
    if result.interrupted:
        print(f"stopped and saved at step {result.step}; the same command goes on from there")
        return EXIT_START_AGAIN
    if result.valid_loss is not None:
        bits = "" if result.valid_bits_per_byte is None else f", {result.valid_bits_per_byte:.3f} bits per byte"
        print(f"held-out loss after step {result.step}: {result.valid_loss:.4f} nats per token{bits}")
        for name, value in result.valid_sets.items():
            print(f"  {name} {value:.4f}")
    if result.sample is not None:
        print(f"\na sample of what it writes:\n{'-' * 60}\n{result.sample}\n{'-' * 60}")
    return 0


def _plot(args) -> int:
    from neox_jax.plot import plot, read_runs

    runs = read_runs(args.runs)
    plot(runs, args.output, x=args.x, metrics=args.metrics, smooth=args.smooth)
    print(f"{plural(len(runs), 'run')} in {args.output}")
    return 0
