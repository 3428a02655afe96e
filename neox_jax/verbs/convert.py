"""`neox-jax convert` and `revisions`."""

import json
import sys
from pathlib import Path

import neox_jax
from neox_jax.errors import InputError
from neox_jax.verbs.options import ADAPTER_HELP, DTYPES, SOURCE_HELP
from neox_jax.verbs.terminal import EXIT_BAD_INPUT, plural, show_progress, unwound_by_sigterm, usage

MAX_SHARED = 10  # lines of parts that revisions share


def add_verbs(verb) -> None:
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

    add = verb(
        "revisions", _revisions, "Name revisions of a model that hold the same weights; nothing is downloaded."
    ).add_argument
    add("models", nargs="+", metavar="MODEL", help="a hub id, for all of its revisions; or folders, for all in them")
    add("--json", action="store_true", help="print JSON")


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
    with unwound_by_sigterm(), show_progress("converting", unit=10**6, name="MB") as progress:
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
        return usage("convert --to peft takes SRC, which has adapters, DST and no option besides")
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
        f"{plural(len(differences), 'tensor')} {'differs' if len(differences) == 1 else 'differ'}"
        if differences
        else "the same"
    )
    damaged = "; not all is as it was written" if problems else ""
    print(f"{args.source} and {args.destination}: {verdict}{damaged}")
    return EXIT_BAD_INPUT if problems or differences else 0


def _revisions(args) -> int:
    from neox_jax.convert.revisions import compare_revisions

    with show_progress("comparing", name="revisions") as progress:
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
