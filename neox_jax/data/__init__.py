"""From text on disk to batches on devices: `tokenize`, `megatron` (.bin/.idx), `index` (which tokens), `loader`."""
