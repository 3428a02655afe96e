"""Loads published weights and prints what can be compared with somebody else's: logits, a greedy continuation, a loss.

    python benchmarks/real_weights.py EleutherAI/pythia-70m
    python benchmarks/real_weights.py /path/to/gpt-neox-20b --dtype bfloat16 --model-axis 8
    python benchmarks/real_weights.py EleutherAI/pythia-70m --against-transformers      # float32, PyTorch needed

What to compare with is in docs/real-weights.md.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import neox_jax
from neox_jax.evaluate import score_text

PROMPT = "The Pile is a large, diverse, open source"
TEXT = (
    "GPT-NeoX-20B is a 20 billion parameter autoregressive language model trained on the Pile. Its architecture "
    "follows that of GPT-3, with rotary positional embeddings and with attention and feed-forward layers in parallel."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a Hugging Face folder or hub id")
    parser.add_argument("--revision", help="of a model on the hub, as step1000")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--model-axis", type=int, default=1, help="tensor parallelism: over how many devices")
    parser.add_argument("--against-transformers", action="store_true", help="run PyTorch beside and print differences")
    args = parser.parse_args()
    try:
        mesh = None
        if args.model_axis > 1:
            mesh = neox_jax.make_mesh(model=args.model_axis, devices=jax.devices()[: args.model_axis])
        model = neox_jax.load_model(args.source, mesh=mesh, dtype=args.dtype, revision=args.revision)
        tokenizer = neox_jax.load_tokenizer(args.source, revision=args.revision)
    except neox_jax.InputError as error:
        print(error, file=sys.stderr)
        return 65
    tokens = tokenizer.encode(PROMPT)
    logits = np.asarray(model(jnp.asarray([tokens])))[0]
    greedy = neox_jax.generate(model, tokenizer, [PROMPT], max_new_tokens=24, temperature=0)[0]
    score = score_text(model, tokenizer, TEXT, seq_length=model.config.max_position_embeddings, batch_size=1)
    best = np.argsort(logits[-1])[::-1][:5]
    print(f"model                {args.source}, {model.config.num_parameters:,} parameters, {args.dtype}")
    print(f"prompt               {PROMPT!r}")
    print(f"token ids            {tokens}")
    print(f"logits[-1][:5]       {np.round(logits[-1][:5], 4).tolist()}")
    print(f"five likeliest next  {[(tokenizer.decode([i]), round(float(logits[-1][i]), 4)) for i in best.tolist()]}")
    print(f"greedy continuation  {greedy.text!r}")
    print(f"loss on a fixed text {score.nats_per_token:.4f} nats per token over {score.num_tokens} tokens")
    if args.against_transformers:
        compare(args, tokens, logits, greedy.tokens)
    return 0


def compare(args, tokens: list[int], logits: np.ndarray, greedy: list[int]) -> None:
    import torch
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        args.source, revision=args.revision or "main", dtype=torch.float32
    ).eval()
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        theirs = reference(ids).logits[0].numpy()
        out = reference.generate(ids, max_new_tokens=24, do_sample=False)[0, len(tokens) :].tolist()
    print(f"transformers         largest logits difference {np.abs(theirs - logits[:, : theirs.shape[1]]).max():.2e}")
    print(f"                     greedy continuation {'the same' if out == greedy else 'DIFFERS'}")


if __name__ == "__main__":
    sys.exit(main())
