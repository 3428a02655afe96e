"""`neox-jax eval`."""

import argparse
import json
import sys
from pathlib import Path

import neox_jax
from neox_jax.disk import read_text
from neox_jax.errors import InputError
from neox_jax.verbs.options import (
    ADAPTER_HELP,
    DTYPES,
    QUANTIZATIONS,
    SOURCE_HELP,
    add_place,
    is_half_placed,
    joined,
    parse_count,
    parse_index,
    parse_names,
)
from neox_jax.verbs.terminal import EXIT_USAGE, usage

TEXT_OPTIONS = ("seq_length", "stride")
TASKS_OPTIONS = ("num_fewshot", "limit", "include_path", "log_samples", "output", "compare", "steps")
# What the processes of one evaluation may differ in.
OWN_OPTIONS = ("coordinator", "num_processes", "process_id", "distributed", "distributed_timeout", "heartbeat_timeout")
OWN_OPTIONS += ("output", "json", "debug", "run", "overrides")


def add_verbs(verb) -> None:
    add = verb("eval", _eval, "Score a model on tasks of lm-evaluation-harness, or on plain text.").add_argument
    add("--model", required=True, metavar="SOURCE", help=SOURCE_HELP)
    add("--tasks", type=parse_names, metavar="A,B", help="lm_eval's tasks; or card, leaderboard, arithmetic, superglue")
    add("--text", nargs="+", metavar="FILE", help="plain text files: nats per token and bits per byte")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json, where the model has none beside it")
    add("--seq-length", type=parse_count, metavar="T", help="text: tokens a window (default: the model's context)")
    add("--stride", type=parse_count, metavar="N", help="text: tokens from a window to the next (default: all)")
    add("--batch-size", type=_count_or_auto, metavar="B", help="rows of the model's context together (default: auto)")
    add("--mesh", type=_mesh, metavar="A=N,B=M", help="over data, fsdp and model, as data=2,model=4; one may be -1")
    add("--dtype", choices=DTYPES, help="cast the parameters (default: as stored)")
    add("--quantize", choices=QUANTIZATIONS, help="matrices in 8 bits")
    add("--adapter", metavar="PATH", help=ADAPTER_HELP)
    add("--revision", metavar="NAME", help="of a model on the hub, as step1000")
    add_place(add)
    add("--json", action="store_true", help="print JSON")
    add(
        "--num-fewshot",
        type=parse_index,
        metavar="N",
        help="tasks: examples before each question (default: the task's)",
    )
    add("--limit", type=_limit, metavar="N", help="tasks: so many questions of each, or below 1 a share, for a trial")
    add("--include-path", metavar="DIR", help="tasks: a folder of more tasks")
    add("--log-samples", action="store_true", help="tasks: each question and answer too, with --output")
    add("--output", metavar="DIR", help="tasks: writes results.json there")
    add("--compare", metavar="NAME", help="tasks: print what is published of a model beside, as gpt-neox-20b")
    add("--steps", metavar="all|A,B", help="tasks: these checkpoints of a run; scores.csv and scores.png in --output")


def _count_or_auto(text: str) -> int | None:
    return None if text == "auto" else parse_count(text)


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return limit


def _mesh(text: str) -> dict[str, int]:
    from neox_jax.config import parse_scoring_mesh

    try:
        return parse_scoring_mesh(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _eval(args) -> int:
    if (args.tasks is None) == (args.text is None):
        return usage("eval takes --tasks A,B or --text FILE...")
    way, others = ("--tasks", TEXT_OPTIONS) if args.text is None else ("--text", TASKS_OPTIONS)
    for name in others:
        if getattr(args, name):
            return usage(f"--{name.replace('_', '-')} does not go with {way}")
    if (args.log_samples or args.steps) and args.output is None:
        return usage(f"--{'steps' if args.steps else 'log-samples'} goes with --output DIR")
    if is_half_placed(args):
        return EXIT_USAGE
    facts = {f"--{name}": value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    with joined(args, facts=facts) as peers:
        from neox_jax.sharding import make_mesh

        peers.end_on_signals()
        sizes = args.mesh or ({"data": -1} if peers.num_processes > 1 else None)
        mesh = None if sizes is None else make_mesh(**sizes)
        evaluate = _eval_tasks if args.text is None else _eval_text
        evaluate(args, mesh, is_first=peers.process_id == 0)
    return 0


def _eval_text(args, mesh, *, is_first: bool) -> None:
    from neox_jax.evaluate import check_windows, open_fitting, score_text

    text = "".join(map(read_text, args.text))
    tokenizer, config = open_fitting(args.model, tokenizer=args.tokenizer, revision=args.revision)
    windows = {"seq_length": args.seq_length or 0, "stride": args.stride or 0}
    check_windows(config, **windows)
    options = {"dtype": args.dtype, "quantize": args.quantize, "revision": args.revision, "adapter": args.adapter}
    model = neox_jax.load_model(args.model, mesh=mesh, **options)
    score = score_text(model, tokenizer, text, **windows, batch_size=args.batch_size or 8)
    if not is_first:
        return
    if args.json:
        fields = {"num_tokens": score.num_tokens, "num_bytes": score.num_bytes}
        print(json.dumps({"nats_per_token": score.nats_per_token, "bits_per_byte": score.bits_per_byte, **fields}))
    else:
        print(
            f"{score.nats_per_token:.4f} nats per token, {score.bits_per_byte:.4f} bits per byte "
            f"({score.num_tokens:,} tokens, {score.num_bytes:,} bytes)"
        )


def _eval_tasks(args, mesh, *, is_first: bool) -> None:
    from neox_jax import tasks

    sources = {None: args.model}
    if args.steps:
        sources = {step: f"{args.model}@{step}" for step in tasks.steps_of(args.model, args.steps)}
    if args.compare:
        tasks.published(args.compare)
    if args.output and is_first:
        tasks.check_output(args.output, pictures=bool(args.steps))
    wanted = tasks.Tasks(args.tasks, num_fewshot=args.num_fewshot, include_path=args.include_path)
    from neox_jax.harness import NeoxLM

    tell, by_step = None if is_first else _say_nothing, {}
    options = {"dtype": args.dtype, "quantize": args.quantize, "revision": args.revision, "adapter": args.adapter}
    for step, source in sources.items():
        lm = NeoxLM(
            source, tokenizer=args.tokenizer, mesh=mesh, batch_size=args.batch_size or "auto", tell=tell, **options
        )
        by_step[step] = results = wanted.run(lm, limit=args.limit, log_samples=args.log_samples, bootstrap=True)
        if is_first:
            _report_tasks(args, step, results, about={"model": source, **options, "limit": args.limit})
    if args.steps and is_first:
        paths = tasks.write_curves(by_step, args.output)
        print("written to {} and {}".format(*paths), file=sys.stderr if args.json else sys.stdout)


def _say_nothing(line: str) -> None:
    pass


def _report_tasks(args, step: int | None, results: dict, *, about: dict) -> None:
    from neox_jax import tasks

    notes = []
    if args.compare:
        notes += tasks.compare(results, args.compare) or ["nothing of these tasks is published"]
    if args.output:
        folder = Path(args.output) / ("" if step is None else str(step))
        notes.append(f"written to {tasks.write_results(results, folder, about=about)}")
    if args.json:
        print(json.dumps({**({} if step is None else {"step": step}), "results": results["results"]}, default=str))
    else:
        print(("" if step is None else f"step {step}\n") + tasks.table(results))
    for note in notes:
        print(note, file=sys.stderr if args.json else sys.stdout)
