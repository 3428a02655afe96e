"""`neox-jax tokenize`, `merge-shards`, `train-tokenizer`, `corpus` and `data`: from text to what training reads."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from neox_jax.verbs.options import parse_count, parse_index, parse_steps
from neox_jax.verbs.terminal import show_progress, unwound_by_sigterm


def add_verbs(verb) -> None:
    add = verb("tokenize", _tokenize, "Turn text into the .bin and .idx files that training reads.").add_argument
    add("inputs", nargs="+", metavar="INPUT", help=".txt (a document each), .jsonl, .jsonl.zst, or folders of them")
    add("--tokenizer", required=True, metavar="FILE", help="a tokenizer.json")
    add("--output", required=True, metavar="PREFIX", help="writes PREFIX.bin and PREFIX.idx")
    add("--append-eod", action="store_true", help="end each document with the end-of-text token")
    add("--json-key", default="text", metavar="KEY", help="where a jsonl line has its text (default: text)")
    add("--workers", type=parse_count, metavar="N", help="processes, of a core each (default: all cores)")
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
    batch.add_argument("--step", type=parse_index, required=True, metavar="S", help="counted from 0")
    batch.add_argument("--row", type=parse_index, metavar="R", help="this row alone, counted from 0")
    batch.add_argument("--tokens", action="store_true", help="token ids, not text")
    find = kinds.add_parser("find", help="print which rows of a range of steps have a text in them")
    find.add_argument("text", metavar="TEXT")
    find.add_argument(
        "--steps", type=parse_steps, required=True, metavar="A:B", help="steps A to B - 1, counted from 0"
    )
    for kind in (batch, find):
        kind.add_argument("--config", required=True, metavar="FILE", help="the run's, as for train")
        kind.add_argument("--config.FIELD=VALUE", dest="shown_only", action="store_true", help="override a field")
        kind.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def _shard(text: str):
    from neox_jax.data.text_files import Shard

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; with four of them, 0/4 to 3/4")
    return Shard(int(index), int(count))


def _tokenize(args) -> int:
    from neox_jax.data.output import prefix_of
    from neox_jax.data.tokenize import tokenize_files
    from neox_jax.tokenizer import Tokenizer

    with unwound_by_sigterm(), show_progress("tokenizing", unit=10**6, name="MB") as progress:
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

    with unwound_by_sigterm(), show_progress("merging", unit=10**6, name="MB") as progress:
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
    with show_progress("reading", name="steps") as progress:
        for found in data.find(args.text, args.steps, progress):
            print(f"step {found.step} row {found.row} (sample {found.sample}): {found.text}", flush=True)
            num_found += 1
    print(f"{num_found} rows in steps {args.steps.start} to {args.steps.stop - 1}")
    return 0
