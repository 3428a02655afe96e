"""`neox-jax generate`."""

import neox_jax
from neox_jax.verbs.options import ADAPTER_HELP, DTYPES, QUANTIZATIONS, SOURCE_HELP, parse_count
from neox_jax.verbs.terminal import plural, usage

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
SAMPLING_OPTIONS += ("frequency_penalty", "max_new_tokens", "min_tokens", "stop", "ignore_eos", "seed")
ENGINE_OPTIONS = ("batch_size", "int8_cache", "num_drafted")


def add_verbs(verb) -> None:
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
    add("--batch-size", type=parse_count, default=64, metavar="B", help="so many completions together (default: 64)")
    add("--dtype", choices=DTYPES, help="cast the parameters (default: as stored)")
    add("--quantize", choices=QUANTIZATIONS, help="matrices in 8 bits")
    add("--adapter", metavar="PATH", help=ADAPTER_HELP)
    add("--int8-cache", action="store_true", help="keys and values in 8 bits")
    add("--draft", metavar="SOURCE", help="a smaller model of the same tokenizer, which guesses ahead")
    add("--num-drafted", type=int, default=0, metavar="N", help="tokens guessed ahead; without --draft, by looking up")
    add("--revision", metavar="NAME", help="of a model on the hub, as step1000")


def _generate(args) -> int:
    ways = [args.prompt is not None, args.input is not None, args.interactive]
    if sum(ways) != 1 or (args.input is None) != (args.output is None):
        return usage("generate takes --prompt TEXT, or --input FILE.jsonl with --output FILE.jsonl, or --interactive")
    if args.top_logprobs and args.input is None:
        return usage("--top-logprobs goes with --input and --output only")
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
        print(f"{plural(count, 'completion')} in {args.output}")
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
