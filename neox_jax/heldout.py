"""The loss on the sets of data.valid: a mean over all the tokens that count, as a line of metrics has it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from neox_jax.config import Config
from neox_jax.data.loader import Loader
from neox_jax.marks import counted_targets
from neox_jax.peers import Alone, Peers
from neox_jax.tokenizer import Tokenizer
from neox_jax.train_step import make_eval_step

LOSS, BITS_PER_BYTE = "valid_loss", "valid_bits_per_byte"


class HeldoutSets:
    """Sets of held-out data by name; one that has no name is called ""."""

    def __init__(
        self, config: Config, mesh: Mesh, loaders: dict[str, Loader], tokenizer: Tokenizer | None, peers: Alone | Peers
    ):
        self.loaders = loaders
        self._tokenizer, self._peers = tokenizer, peers
        self._batches = config.eval.batches
        self._masks = {name: config.masks(config.data.valid_sets[name]) for name in loaders}
        self._eval_step = make_eval_step(config, mesh=mesh)

    def measure(self, params: dict, begin: Callable[[str], None]) -> dict[str, float]:
        """valid_loss in nats a token and, with a byte-level tokenizer, valid_bits_per_byte, over eval.batches batches
        of each set (all there are, if fewer).

        Of sets with names, each has its own as valid_loss/NAME, and valid_loss is the mean of those. begin: is told
        what is about to be done.
        """
        if not self.loaders:
            return {}
        sums = {name: self._measure_set(name, params, begin) for name in self.loaders}
        num_bytes = self._peers.gather("the bytes of the held-out text", [one.num_bytes for one in sums.values()])[0]
        metrics = {}
        for (name, one), n in zip(sums.items(), num_bytes, strict=True):
            suffix = f"/{name}" if name else ""
            if one.num_tokens:
                metrics[LOSS + suffix] = one.nats / one.num_tokens
            if n:
                metrics[BITS_PER_BYTE + suffix] = one.nats / math.log(2) / n
        for name in (LOSS, BITS_PER_BYTE):
            values = [value for key, value in metrics.items() if key.startswith(f"{name}/")]
            if values:
                metrics = {name: float(np.mean(values)), **metrics}
        return metrics

    def _measure_set(self, name: str, params: dict, begin) -> "_Sums":
        loader, means, counts, num_bytes = self.loaders[name], [], [], 0
        field = f"data.valid.{name}" if name else "data.valid"
        for index, rows, _ in loader.batches(0, min(self._batches, loader.num_batches)):
            begin(f"batch {index} of {field}")
            mean, count = self._eval_step(params, rows, self._masks[name])
            means.append(mean)
            counts.append(count)
            if self._tokenizer is not None and self._peers.process_id == 0:  # the others need not read whole batches
                num_bytes += int(self._tokenizer.num_bytes[counted_targets(loader.host_batch(index))].sum())
        means, counts = (np.array(jax.device_get(values), np.float64) for values in (means, counts))
        return _Sums(float(means @ counts), int(counts.sum()), num_bytes)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """Over the tokens of a set that count. num_bytes: in the first process alone."""

    nats: float
    num_tokens: int
    num_bytes: int
