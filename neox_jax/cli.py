"""`neox-jax VERB`: the command line. Exit codes: 0 done, 2 bad usage, 65 bad data, config or mesh, 70 numbers went
bad, 75 start again.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import signal
import sys
import time
from pathlib import Path

import neox_jax
from neox_jax.disk import read_text
from neox_jax.errors import InputError, NumbersError

EXIT_USAGE, EXIT_BAD_INPUT, EXIT_BAD_NUMBERS, EXIT_START_AGAIN, EXIT_TERMINATED = 2, 65, 70, 75, 143
MAX_SHARED = 10  # lines of parts that revisions share
PROGRESS_LINE_SECONDS = 30
COMPILING = ("train", "generate", "eval", "bench")
DTYPES, QUANTIZATIONS = ("float32", "bfloat16", "float16"), ("int8",)
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
SAMPLING_OPTIONS += ("frequency_penalty", "max_new_tokens", "min_tokens", "stop", "ignore_eos", "seed")
ENGINE_OPTIONS = ("batch_size", "int8_cache", "num_drafted")
ADAPTER_HELP = "a run of adapters (lora.rank), or PEFT's folder, for the model"
SCORING_AXES = ("data", "fsdp", "model")
TEXT_OPTIONS = ("seq_length", "stride")
TASKS_OPTIONS = ("num_fewshot", "limit", "include_path", "log_samples", "output", "compare", "steps")
# What the processes of one evaluation may differ in.
OWN_OPTIONS = ("coordinator", "num_processes", "process_id", "distributed", "distributed_timeout", "heartbeat_timeout")
OWN_OPTIONS += ("output", "json", "debug", "run", "overrides")
SOURCE_HELP = "a Hugging Face folder or hub id, a NeoX checkpoint, or a run folder (its newest step, or FOLDER@STEP)"


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; bad input is one line on stderr (a traceback with --debug)."""
    arguments, overrides = _take_overrides(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(arguments)
    if overrides and args.verb not in ("train", "data"):
        parser.error(f"--config.{overrides[0][0]} goes with train and data only")
    args.overrides = overrides
    if args.verb in COMPILING:
        _keep_compiled()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save at warning level
    try:
        return args.run(args) or 0
    except (InputError, NumbersError) as error:
        if args.debug:
            raise
        print(f"neox-jax: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_BAD_NUMBERS
    except KeyboardInterrupt:
        print("neox-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `neox-jax ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _keep_compiled() -> None:
    """Has jax keep what it compiles in the user's cache folder, of this host (its processor counts), unless told where.

    By the environment, since jax is not loaded yet. JAX_COMPILATION_CACHE_DIR= turns it off.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "neox_jax" / f"compiled-{platform.node()}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _take_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits off every --config.a.b=value."""
    rest, overrides = [], []
    for argument in arguments:
        if argument.startswith("--config."):
            name, equals, value = argument.removeprefix("--config.").partition("=")
            if not equals:
                print(f"neox-jax: {argument} has no value; write {argument}=VALUE", file=sys.stderr)
                raise SystemExit(2)
            overrides.append((name, value))
        else:
            rest.append(argument)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neox-jax", description="GPT-NeoX in JAX: train, convert, evaluate, generate."
    )
    parser.add_argument("--version", action="version", version=f"neox-jax {neox_jax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        added.set_defaults(run=run)
        return added

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
    _add_place(add)

    add = verb("plot", _plot, "Draw the curves of runs: loss, gradient norm, speed.").add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders, or files as their metrics.jsonl")
    add("--output", default="metrics.png", metavar="FILE.png", help="default: metrics.png")
    add("--x", choices=("step", "tokens", "hours"), default="step", help="hours: of training, summed over steps")
    add("--metrics", type=_names, default=[], metavar="A,B", help="a panel each, by their names in metrics.jsonl")
    add("--smooth", type=_count, default=1, metavar="N", help="draw means of N neighbouring lines, the lines faintly")

    add = verb("generate", _generate, "Continue a prompt, every prompt of a jsonl file, or what is typed.").add_argument
    add("--model", required=True, metavar="SOURCE", help=SOURCE_HELP)
    add("--prompt", metavar="TEXT", help="text to go on from; what is generated streams to the terminal")
    add("--input", metavar="FILE.jsonl", help='lines of {"prompt": ...}')
    add("--output", metavar="FILE.jsonl", help="the same lines with completion and finish_reason, in the same order")
    add("--interactive", action="store_true", help="continue what is typed, line by line")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json, where the model has none beside it")
    add("--max-new-tokens", type=int, default=64, metavar="N")
    add("--min-tokens", type=int, default=0, metavar="N", help="no end-of-text before so many")
    add("--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest token each time")
    add("--top-k", type=int, default=0, metavar="N", help="0: no limit")
    add("--top-p", type=float, default=1.0, metavar="X")
    add("--min-p", type=float, default=0.0, metavar="X")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="of what is in the prompt too; 1: none")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="once for each token that was generated")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="for each time that it was")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--ignore-eos", action="store_true")
    add("--seed", type=int, default=0, metavar="N")
    add("--top-logprobs", type=int, default=0, metavar="N", help="with --output: the N likeliest at each token, too")
    add("--batch-size", type=_count, default=64, metavar="B", help="so many completions together (default: 64)")
    add("--dtype", choices=DTYPES, help="cast the parameters (default: as stored)")
    add("--quantize", choices=QUANTIZATIONS, help="matrices in 8 bits")
    add("--adapter", metavar="PATH", help=ADAPTER_HELP)
    add("--int8-cache", action="store_true", help="keys and values in 8 bits")
    add("--draft", metavar="SOURCE", help="a smaller model of the same tokenizer, which guesses ahead")
    add("--num-drafted", type=int, default=0, metavar="N", help="tokens guessed ahead; without --draft, by looking up")
    add("--revision", metavar="NAME", help="of a model on the hub, as step1000")

    add = verb("eval", _eval, "Score a model on tasks of lm-evaluation-harness, or on plain text.").add_argument
    add("--model", required=True, metavar="SOURCE", help=SOURCE_HELP)
    add("--tasks", type=_names, metavar="A,B", help="lm_eval's tasks; or card, leaderboard, arithmetic, superglue")
    add("--text", nargs="+", metavar="FILE", help="plain text files: nats per token and bits per byte")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json, where the model has none beside it")
    add("--seq-length", type=_count, metavar="T", help="text: tokens a window (default: the model's context)")
    add("--stride", type=_count, metavar="N", help="text: tokens from a window to the next (default: all)")
    add("--batch-size", type=_count_or_auto, metavar="B", help="rows of the model's context together (default: auto)")
    add("--mesh", type=_mesh, metavar="A=N,B=M", help="over data, fsdp and model, as data=2,model=4; one may be -1")
    add("--dtype", choices=DTYPES, help="cast the parameters (default: as stored)")
    add("--quantize", choices=QUANTIZATIONS, help="matrices in 8 bits")
    add("--adapter", metavar="PATH", help=ADAPTER_HELP)
    add("--revision", metavar="NAME", help="of a model on the hub, as step1000")
    _add_place(add)
    add("--json", action="store_true", help="print JSON")
    add("--num-fewshot", type=_index, metavar="N", help="tasks: examples before each question (default: the task's)")
    add("--limit", type=_limit, metavar="N", help="tasks: so many questions of each, or below 1 a share, for a trial")
    add("--include-path", metavar="DIR", help="tasks: a folder of more tasks")
    add("--log-samples", action="store_true", help="tasks: each question and answer too, with --output")
    add("--output", metavar="DIR", help="tasks: writes results.json there")
    add("--compare", metavar="NAME", help="tasks: print what is published of a model beside, as gpt-neox-20b")
    add("--steps", metavar="all|A,B", help="tasks: these checkpoints of a run; scores.csv and scores.png in --output")

    convert = verb("convert", _convert, "Convert a model into another format, or compare two of any formats.")
    add = convert.add_argument
    add("source", metavar="SRC", help=SOURCE_HELP)
    add("destination", metavar="DST", help="a new folder; with --verify, the model to compare with")
    task = convert.add_mutually_exclusive_group(required=True)
    task.add_argument("--to", choices=("hf", "orbax", "neox", "peft"), dest="format", help="peft: its adapters alone")
    task.add_argument("--verify", action="store_true", help="write nothing: compare SRC and DST, tensor by tensor")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="with --to neox: into how many parts")
    add("--adapter", metavar="PATH", help=f"{ADAPTER_HELP}, merged into its weights")
    add("--dtype", choices=DTYPES, help="cast the parameters (default: as stored)")
    add("--revision", metavar="NAME", help="of a model on the hub, as step1000")

    add = verb("checkpoint", _checkpoint, "List, verify, describe, hash or remove a run's checkpoints.").add_argument
    add("what", choices=("list", "verify", "inspect", "hash", "prune"))
    add("run_folder", metavar="RUN[@STEP]", help="a run folder; inspect and hash take its newest step, the others all")
    add("--keep", type=int, metavar="N", help="prune: the newest so many stay")
    add("--keep-every", type=int, default=0, metavar="M", help="prune: those at multiples of M stay too")
    add("--dry-run", action="store_true", help="prune: say which would be removed, and remove none")

    add = verb(
        "revisions", _revisions, "Name revisions of a model that hold the same weights; nothing is downloaded."
    ).add_argument
    add("models", nargs="+", metavar="MODEL", help="a hub id, for all of its revisions; or folders, for all in them")
    add("--json", action="store_true", help="print JSON")

    add = verb("tokenize", _tokenize, "Turn text into the .bin and .idx files that training reads.").add_argument
    add("inputs", nargs="+", metavar="INPUT", help=".txt (a document each), .jsonl, .jsonl.zst, or folders of them")
    add("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    add("--append-eod", action="store_true", help="end each document with the end-of-text token")
    add("--json-key", default="text", metavar="KEY", help="where a jsonl line has its text (default: text)")
    add("--workers", type=_count, metavar="N", help="processes, of a core each (default: all cores)")
    add("--shard", type=_shard, metavar="I/N", help="only this share, from 0/N, as PREFIX-0000I-of-0000N")
    add("--skip-bad", type=int, default=0, metavar="N", help="leave out so many documents that cannot be read, if any")

    add = verb("merge-shards", _merge_shards, "Put the shards of a tokenized dataset together.").add_argument
    add("output", metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx from every PREFIX-0000I-of-0000N")

    add = verb(
        "train-tokenizer", _train_tokenizer, "Train a byte-level BPE tokenizer by GPT-NeoX's recipe."
    ).add_argument
    add("inputs", nargs="+", metavar="INPUT", help=".txt, .jsonl, .jsonl.zst, or folders of them")
    add("--vocab-size", required=True, type=int, metavar="N")
    add("--output", required=True, metavar="FILE", help="the tokenizer.json to write")
    add("--json-key", default="text", metavar="KEY", help="where a jsonl line has its text (default: text)")

    add = verb("corpus", _corpus, "Collect a text corpus that every machine has: Python's own library.").add_argument
    add("folder", metavar="DIR", help="writes train.jsonl, heldout.jsonl, heldout.txt, instructions*.jsonl")

    shown = verb("data", _data, "Show the batch of a training step, or find the steps that had a text.")
    kinds = shown.add_subparsers(dest="what", metavar="batch|find", required=True)
    batch = kinds.add_parser("batch", help="print the rows of a step as text, with their documents and their SHA-256")
    batch.add_argument("--step", type=_index, required=True, metavar="S", help="counted from 0")
    batch.add_argument("--row", type=_index, metavar="R", help="this row alone, counted from 0")
    batch.add_argument("--tokens", action="store_true", help="token ids, not text")
    find = kinds.add_parser("find", help="print which rows of a range of steps have a text in them")
    find.add_argument("text", metavar="TEXT")
    find.add_argument("--steps", type=_steps, required=True, metavar="A:B", help="steps A to B - 1, counted from 0")
    for kind in (batch, find):
        kind.add_argument("--config", required=True, metavar="FILE", help="the run's, as for train")
        kind.add_argument("--config.FIELD=VALUE", dest="shown_only", action="store_true", help="override a field")
        kind.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    add = verb("bench", _bench, "Measure training, decoding or prefill with random or real weights.").add_argument
    add("what", choices=("train", "decode", "prefill"))
    add("--model", metavar="SOURCE", help=SOURCE_HELP)
    add("--preset", metavar="NAME", help="a model size with random weights, as pythia-70m")
    add("--batch-size", type=int, default=1, metavar="B")
    add("--seq-length", type=int, default=512, metavar="T", help="train, prefill: tokens a row; decode: new tokens")
    add("--dtype", choices=DTYPES, default="float32")
    add("--steps", type=int, default=5, metavar="N", help="timed repetitions, after one that is not")
    add("--quantize", choices=QUANTIZATIONS, help="decode, prefill: matrices in 8 bits")
    add("--int8-cache", action="store_true", help="decode: keys and values in 8 bits")
    add("--json", action="store_true", help="print JSON")
    return parser


def _add_place(add) -> None:
    """What says which of several processes this is (see `_joined`)."""
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


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _count_or_auto(text: str) -> int | None:
    return None if text == "auto" else _count(text)


def _limit(text: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return limit


def _mesh(text: str) -> dict[str, int]:
    sizes = dict(part.split("=", 1) if "=" in part else (part, "") for part in text.split(","))
    if not all(name in SCORING_AXES and size.removeprefix("-").isdecimal() for name, size in sizes.items()):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh of {', '.join(SCORING_AXES)}; write data=2,model=4")
    return {name: int(size) for name, size in sizes.items()}


def _shard(text: str):
    from neox_jax.data.text_files import Shard

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; with four of them, 0/4 to 3/4")
    return Shard(int(index), int(count))


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names; write A,B")
    return names


def _steps(text: str) -> range:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; write A:B, with A below B")
    return range(int(first), int(last))


def _profile_steps(text: str) -> range:
    steps = _steps(text)
    if not steps.start:
        raise argparse.ArgumentTypeError(f"{text!r} begins with step 0; steps are counted from 1, as in metrics.jsonl")
    return steps


def _train(args) -> int:
    if _is_half_placed(args):
        return EXIT_USAGE
    from neox_jax.config import flatten, load_config

    config, problem = None, None
    try:
        config = load_config(args.config, args.overrides)
    except InputError as error:  # which the other processes are told of
        problem = error
    facts = {} if config is None else flatten(dataclasses.asdict(config), "config.")
    facts["--accept-changes"] = args.accept_changes
    with _joined(args, facts=facts, problem=problem) as peers:
        from neox_jax.train import train

        result = train(config, args.workdir, peers=peers, accept_changes=args.accept_changes, profile=args.profile)
    return _report_training(result) if peers.process_id == 0 else EXIT_START_AGAIN if result.interrupted else 0


def _is_half_placed(args) -> bool:
    """Whether the options of `_add_place` do not go together, which is then said."""
    plain = (args.coordinator, args.num_processes, args.process_id)
    wrong = any(value is not None for value in plain) and (None in plain or args.distributed is not None)
    if wrong:
        _usage(f"{args.verb} takes --coordinator, --num-processes and --process-id together, or --distributed")
    return wrong


def _joined(args, *, facts: dict, problem: InputError | None = None):
    """The other processes, if this is one of several: see `distributed.joined`."""
    from neox_jax import distributed

    place = None
    if args.coordinator is not None:
        place = distributed.Place(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed == "auto":
        place = distributed.detect_place(timeout_seconds=args.distributed_timeout)
    elif args.distributed is None:
        distributed.check_alone()
    return distributed.joined(
        place,
        facts=facts,
        problem=problem,
        timeout_seconds=args.distributed_timeout,
        heartbeat_seconds=args.heartbeat_timeout,
        debug=args.debug,
    )


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
    print(f"{_plural(len(runs), 'run')} in {args.output}")
    return 0


def _generate(args) -> int:
    ways = [args.prompt is not None, args.input is not None, args.interactive]
    if sum(ways) != 1 or (args.input is None) != (args.output is None):
        return _usage("generate takes --prompt TEXT, or --input FILE.jsonl with --output FILE.jsonl, or --interactive")
    if args.top_logprobs and args.input is None:
        return _usage("--top-logprobs goes with --input and --output only")
    from neox_jax import prompts

    if args.input is not None:
        prompts.read_prompts(args.input)  # before the model is loaded
    model, tokenizer = _load(args)
    options = {name: getattr(args, name) for name in (*SAMPLING_OPTIONS, *ENGINE_OPTIONS, "top_logprobs")}
    if args.draft is not None:
        options["draft"] = neox_jax.load_model(args.draft, dtype=args.dtype)
    if args.interactive:
        prompts.converse(model, tokenizer, **options)
    elif args.input is not None:
        count = prompts.complete_file(model, tokenizer, args.input, args.output, **options)
        print(f"{_plural(count, 'completion')} in {args.output}")
    else:

        def stream(_, piece: str) -> None:
            print(piece, end="", flush=True)

        neox_jax.generate(model, tokenizer, [args.prompt], stream=stream, **options)
        print()
    return 0


def _load(args):
    revision = getattr(args, "revision", None)
    options = {"dtype": args.dtype, "quantize": args.quantize, "adapter": args.adapter}
    model = neox_jax.load_model(args.model, revision=revision, **options)
    tokenizer = neox_jax.load_tokenizer(args.tokenizer or args.model, revision=revision)
    return model, tokenizer


def _eval(args) -> int:
    if (args.tasks is None) == (args.text is None):
        return _usage("eval takes --tasks A,B or --text FILE...")
    way, others = ("--tasks", TEXT_OPTIONS) if args.text is None else ("--text", TASKS_OPTIONS)
    for name in others:
        if getattr(args, name):
            return _usage(f"--{name.replace('_', '-')} does not go with {way}")
    if (args.log_samples or args.steps) and args.output is None:
        return _usage(f"--{'steps' if args.steps else 'log-samples'} goes with --output DIR")
    if _is_half_placed(args):
        return EXIT_USAGE
    facts = {f"--{name}": value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    with _joined(args, facts=facts) as peers:
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


def _convert(args) -> int:
    from neox_jax.convert import source
    from neox_jax.convert.files import find_partials

    if args.verify:
        return _verify(args)
    if args.format == "peft":
        return _convert_adapter(args)
    for path in find_partials(Path(args.destination)):
        print(f"{path} is of a conversion that was killed, or is still at work; if none is, remove it", file=sys.stderr)
    try:
        tokenizer = neox_jax.load_tokenizer(args.source, revision=args.revision)
    except InputError as error:
        tokenizer = None
        print(f"without a tokenizer: {error}", file=sys.stderr)
    with _unwound_by_sigterm(), _progress("converting", unit=10**6, name="MB") as progress:
        stored = source.convert(
            args.source,
            args.destination,
            format=args.format,
            tensor_parallel=args.tensor_parallel,
            dtype=args.dtype,
            tokenizer=tokenizer,
            revision=args.revision,
            adapter=args.adapter,
            progress=progress,
        )
    for note in stored.notes:
        print(note)
    print(f"{stored.config.num_parameters:,} parameters in {args.destination}")
    return 0


def _convert_adapter(args) -> int:
    if args.adapter or args.dtype or args.revision or args.tensor_parallel != 1:
        return _usage("convert --to peft takes SRC, which has adapters, DST and no option besides")
    from neox_jax.convert.peft import save_peft
    from neox_jax.convert.source import open_adapter

    adapter = open_adapter(args.source)
    save_peft(adapter, args.destination)
    count = sum(factor.size for factor in adapter.factors.values())
    print(f"{count:,} parameters of adapters in {args.destination}, for {adapter.base.source or 'a model not named'}")
    return 0


def _verify(args) -> int:
    from neox_jax.convert import manifest, source, stored

    models, problems = [], []
    for place, revision in ((args.source, args.revision), (args.destination, None)):
        model = source.open_source(place, revision=revision, adapter=args.adapter if place == args.source else None)
        written = manifest.find_manifest(source.folder_of(place, revision=revision))
        if written is not None:
            problems += [f"{place}: {line} ({manifest.MANIFEST})" for line in manifest.check(model, written)]
        models.append(model if args.dtype is None else model.cast(args.dtype))
    for note in models[0].notes + models[1].notes:
        print(note)
    differences = stored.compare(*models)
    for line in problems + differences:
        print(line)
    verdict = (
        f"{_plural(len(differences), 'tensor')} {'differs' if len(differences) == 1 else 'differ'}"
        if differences
        else "the same"
    )
    damaged = "; not all is as it was written" if problems else ""
    print(f"{args.source} and {args.destination}: {verdict}{damaged}")
    return EXIT_BAD_INPUT if problems or differences else 0


def _checkpoint(args) -> int:
    if (args.what == "prune") != (args.keep is not None):
        return _usage("checkpoint prune takes --keep N, and no other does")
    from neox_jax.checkpoint import digest, inspection

    steps = inspection.find_steps(args.run_folder)
    if args.what == "list":
        print("\n".join(inspection.describe_steps(steps)))
    elif args.what == "inspect":
        print("\n".join(inspection.describe_step(steps[-1])))
    elif args.what == "hash":
        with _progress("hashing", unit=10**6, name="MB") as progress:
            digests = digest.digest_step(steps[-1], progress)
        for name, value in digests.items():
            print(f"{value}  {name}")
    elif args.what == "verify":
        return _verify_steps(steps)
    else:
        doomed = inspection.find_prunable(steps, keep=args.keep, keep_every=args.keep_every)
        for step in doomed:
            print(f"{'would remove' if args.dry_run else 'removing'} step {step.name}", flush=True)
        if not args.dry_run:
            inspection.prune(doomed)
        print(f"{len(steps) - len(doomed)} of {len(steps)} checkpoints stay")
    return 0


def _verify_steps(steps: list[Path]) -> int:
    from neox_jax.checkpoint import inspection

    with _progress("verifying", unit=10**6, name="MB") as progress:
        found = inspection.verify_steps(steps, progress)
    for step, problems in found.items():
        if problems is None:
            print(f"step {step.name}: not verified, an older version wrote it without checksums")
        for problem in problems or []:
            print(f"step {step.name}: {problem}")
    damaged = [step.name for step, problems in found.items() if problems]
    verified = [step.name for step, problems in found.items() if problems == []]
    print(f"as they were written: step {', '.join(verified) or 'none'}; damaged: step {', '.join(damaged) or 'none'}")
    return EXIT_BAD_INPUT if damaged else 0


def _revisions(args) -> int:
    from neox_jax.convert.revisions import compare_revisions

    with _progress("comparing", name="revisions") as progress:
        compared = compare_revisions(args.models, progress=progress)
    if compared.note:
        print(compared.note, file=sys.stderr)
    if args.json:
        fields = {"revisions": compared.weights, "identical": compared.identical()}
        print(json.dumps({**fields, "shared": [{"part": part, "in": names} for part, names in compared.shared()]}))
        return 0
    empty = [name for name, parts in compared.weights.items() if not parts]
    if empty:
        print(f"without weights: {', '.join(empty)}")
    for names in compared.identical():
        print(f"identical ({len(names)}): {', '.join(names)}")
    shared = compared.shared()
    for part, names in shared[:MAX_SHARED]:
        print(f"{part} is the same in {', '.join(names)}, which otherwise differ")
    if len(shared) > MAX_SHARED:
        print(f"and {len(shared) - MAX_SHARED} more parts that revisions share (--json names them)")
    print(f"{len(compared.weights)} revisions, {compared.num_different()} different weights")
    return 0


@contextlib.contextmanager
def _unwound_by_sigterm():
    """A SIGTERM ends the process as Ctrl-C does, so that what is half-written is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(what: str, *, unit: int = 1, name: str = ""):
    """Gives a function of (done, in all), which draws a bar in such units where stderr is a terminal, and elsewhere
    prints a line now and then."""
    from neox_jax.metrics import Progress

    start, bar = time.perf_counter(), None
    next_line = start + PROGRESS_LINE_SECONDS

    def report(done: int, total: int) -> None:
        nonlocal bar, next_line
        now = time.perf_counter()
        if not sys.stderr.isatty():
            if now < next_line:
                return
            next_line = now + PROGRESS_LINE_SECONDS
        bar = bar or Progress(what, total=-(-total // unit))
        rate = done / unit / (now - start)
        left = (total - done) / unit / rate if rate else None
        bar.update(-(-done // unit), f"{name}  {rate:.1f} {name}/s", seconds_left=left)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


def _tokenize(args) -> int:
    from neox_jax.data.output import prefix_of
    from neox_jax.data.tokenize import tokenize_files
    from neox_jax.tokenizer import Tokenizer

    with _unwound_by_sigterm(), _progress("tokenizing", unit=10**6, name="MB") as progress:
        summary = tokenize_files(
            args.inputs,
            tokenizer=Tokenizer.from_file(args.tokenizer),
            output=args.output,
            append_eod=args.append_eod,
            json_key=args.json_key,
            workers=args.workers or _num_cores(),
            shard=args.shard,
            skip_bad=args.skip_bad,
            progress=progress,
        )
    for place in summary.bad_places:
        print(f"skipped {place}", file=sys.stderr)
    _report_tokens(summary, prefix_of(args.output, args.shard))
    return 0


def _merge_shards(args) -> int:
    from neox_jax.data.merge import merge_shards

    with _unwound_by_sigterm(), _progress("merging", unit=10**6, name="MB") as progress:
        summary, num_shards = merge_shards(args.output, progress=progress)
    _report_tokens(summary, args.output)
    print(f"its {num_shards} shards are no longer needed")
    return 0


def _report_tokens(summary, prefix) -> None:
    rate = f"{summary.bytes / 1e6 / summary.seconds:.1f} MB/s" if summary.seconds else "complete before: nothing done"
    skipped = f"; {summary.bad_documents:,} bad documents skipped" if summary.bad_documents else ""
    print(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens ({summary.bytes / max(1, summary.tokens):.2f} "
        f"bytes a token) in {prefix}.bin, {rate}{skipped}"
    )


def _num_cores() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_tokenizer(args) -> int:
    from neox_jax.data.tokenize import read_texts
    from neox_jax.disk import write_text
    from neox_jax.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(read_texts(args.inputs, json_key=args.json_key), vocab_size=args.vocab_size)
    write_text(Path(args.output), tokenizer.to_json())
    print(f"{tokenizer.vocab_size:,} ids in {args.output}")
    return 0


def _corpus(args) -> int:
    from neox_jax.data.corpus import collect_standard_library

    summary = collect_standard_library(args.folder)
    print(
        f"{summary.train_documents:,} documents ({summary.train_bytes / 1e6:.1f} MB) to train on, "
        f"{summary.heldout_documents:,} ({summary.heldout_bytes / 1e6:.2f} MB) held out, and "
        f"{summary.train_instructions:,} and {summary.heldout_instructions:,} instructions, in {args.folder}"
    )
    return 0


def _data(args) -> int:
    from neox_jax.config import load_config
    from neox_jax.data.show import TrainingData

    config = load_config(args.config, args.overrides)
    if config.init_from:  # the vocabulary is the source's
        from neox_jax.convert.source import open_source

        config = dataclasses.replace(config, model=open_source(config.init_from).config)
    data = TrainingData(config)
    if args.what == "batch":
        for line in data.describe(args.step, row=args.row, ids=args.tokens):
            print(line)
        return 0
    num_found = 0
    with _progress("reading", name="steps") as progress:
        for found in data.find(args.text, args.steps, progress):
            print(f"step {found.step} row {found.row} (sample {found.sample}): {found.text}", flush=True)
            num_found += 1
    print(f"{num_found} rows in steps {args.steps.start} to {args.steps.stop - 1}")
    return 0


def _bench(args) -> int:
    if (args.model is None) == (args.preset is None):
        return _usage("bench takes either --model SOURCE or --preset NAME")
    from neox_jax import bench

    options = {"batch_size": args.batch_size, "seq_length": args.seq_length, "dtype": args.dtype, "steps": args.steps}
    if (args.what == "train" and (args.quantize or args.int8_cache)) or (args.what == "prefill" and args.int8_cache):
        return _usage(f"bench {args.what} takes no --{'quantize' if args.quantize else 'int8-cache'}")
    if args.what == "decode":
        options["int8_cache"] = args.int8_cache
    measure = {"train": bench.bench_train, "decode": bench.bench_decode, "prefill": bench.bench_prefill}[args.what]
    model = bench.open_model(source=args.model, preset=args.preset, dtype=args.dtype, quantize=args.quantize)
    result = measure(model, **options)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>28}  {value:.4g}" if isinstance(value, float) else f"{name:>28}  {value}")
    return 0


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _usage(text: str) -> int:
    print(f"neox-jax: {text}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
