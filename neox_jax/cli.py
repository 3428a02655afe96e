"""`neox-jax VERB`: the command line. Exit codes: 0 done, 2 bad usage, 65 bad data, config or mesh, 70 numbers went
bad, 75 start again.
"""

import argparse
import logging
import os
import platform
import sys
from pathlib import Path

import neox_jax
from neox_jax.errors import InputError, NumbersError
from neox_jax.verbs import bench, checkpoint, convert, data, evaluate, generate, train
from neox_jax.verbs.terminal import EXIT_BAD_INPUT, EXIT_BAD_NUMBERS

COMPILING = ("train", "generate", "eval", "bench")


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

    for module in (train, generate, evaluate, convert, checkpoint, data, bench):
        module.add_verbs(verb)
    return parser


if __name__ == "__main__":
    sys.exit(main())
