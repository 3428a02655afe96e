"""Times steps and makes lines of metrics of what they returned."""

import time

import jax
import numpy as np
from jax.sharding import Mesh

from neox_jax.config import Config
from neox_jax.hardware import peak_flops


class Meter:
    """Turns the steps since the last line into a line of metrics.

    hosts: of each process. skipped: updates before this call.
    """

    def __init__(self, config: Config, mesh: Mesh, hosts: tuple[str, ...], *, skipped: int = 0):
        train, device = config.train, mesh.devices.flat[0]
        peak, _ = peak_flops(device, train.dtype)
        # Fake CPU devices share one processor, so a host's CPU counts once however many it plays.
        num_devices = len(set(hosts)) if device.platform == "cpu" else mesh.size
        self._tokens_per_step = train.batch_size * train.seq_length
        self._flops_per_token = config.flops_per_token
        self._peak_flops = peak * num_devices
        self._skipped = skipped
        self.restart()

    def restart(self) -> None:
        self._wait_seconds, self._metrics, self._start = 0.0, [], time.perf_counter()

    def add(self, wait_seconds: float, metrics: dict) -> None:
        self._wait_seconds += wait_seconds
        self._metrics.append(metrics)  # read only when a line is due, so that steps are dispatched ahead

    def line(self, step: int) -> dict:
        """The metrics of the last step by their names, and what is known besides. Whole numbers are counts, and so
        are summed over the steps since the last line; `skipped`, as skipped_updates, over the whole run."""
        values = jax.device_get(self._metrics)
        seconds = (time.perf_counter() - self._start) / len(values)
        tokens_per_second = self._tokens_per_step / seconds
        last = {
            name: int(sum(each[name] for each in values)) if np.issubdtype(value.dtype, np.integer) else float(value)
            for name, value in values[-1].items()
        }
        self._skipped += last.pop("skipped")
        return {
            "step": step,
            **{name: last.pop(name) for name in ("loss", "grad_norm", "learning_rate")},
            **last,
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "data_wait_seconds": self._wait_seconds / len(values),
            "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
            "skipped_updates": self._skipped,
        }
