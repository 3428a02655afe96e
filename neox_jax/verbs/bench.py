"""`neox-jax bench`."""

import json

from neox_jax.verbs.options import DTYPES, QUANTIZATIONS, SOURCE_HELP
from neox_jax.verbs.terminal import usage


def add_verbs(verb) -> None:
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


def _bench(args) -> int:
    if (args.model is None) == (args.preset is None):
        return usage("bench takes either --model SOURCE or --preset NAME")
    from neox_jax import bench

    options = {"batch_size": args.batch_size, "seq_length": args.seq_length, "dtype": args.dtype, "steps": args.steps}
    if (args.what == "train" and (args.quantize or args.int8_cache)) or (args.what == "prefill" and args.int8_cache):
        return usage(f"bench {args.what} takes no --{'quantize' if args.quantize else 'int8-cache'}")
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
