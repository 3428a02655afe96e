"""`neox-jax checkpoint`."""

from pathlib import Path

from neox_jax.verbs.terminal import EXIT_BAD_INPUT, show_progress, usage


def add_verbs(verb) -> None:
    add = verb("checkpoint", _checkpoint, "List, verify, describe, hash or remove a run's checkpoints.").add_argument
    add("what", choices=("list", "verify", "inspect", "hash", "prune"))
    add("run_folder", metavar="RUN[@STEP]", help="a run folder; inspect and hash take its newest step, the others all")
    add("--keep", type=int, metavar="N", help="prune: the newest so many stay")
    add("--keep-every", type=int, default=0, metavar="M", help="prune: those at multiples of M stay too")
    add("--dry-run", action="store_true", help="prune: say which would be removed, and remove none")


def _checkpoint(args) -> int:
    if (args.what == "prune") != (args.keep is not None):
        return usage("checkpoint prune takes --keep N, and no other does")
    from neox_jax.checkpoint import digest, inspection

    steps = inspection.find_steps(args.run_folder)
    if args.what == "list":
        print("\n".join(inspection.describe_steps(steps)))
    elif args.what == "inspect":
        print("\n".join(inspection.describe_step(steps[-1])))
    elif args.what == "hash":
        with show_progress("hashing", unit=10**6, name="MB") as progress:
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

    with show_progress("verifying", unit=10**6, name="MB") as progress:
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
