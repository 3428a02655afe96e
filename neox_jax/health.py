"""Looks at the numbers of every step: what was skipped, what ends the run, what stands out."""

import collections
import math

import jax
import numpy as np

from neox_jax.config import Config
from neox_jax.errors import NumbersError
from neox_jax.train_state import SCALE_MIN

LAG = 2  # steps: looked at so much later, a step's numbers are there and the device has the next steps to do
WINDOW, WINDOW_LEAST, SPIKE_DEVIATIONS = 128, 32, 6  # losses that a spike is told from; OLMo's rule for skipping


class Health:
    """Watches metrics as `train_step` returns them; the same in all processes, as the metrics are.

    say: takes a line of text and the step that it is about.
    """

    def __init__(self, config: Config, say):
        self._config, self._say = config, say
        self._pending, self._losses = collections.deque(), collections.deque(maxlen=WINDOW)
        self._in_a_row = 0

    def see(self, step: int, metrics: dict) -> None:
        """Takes the metrics of attempt `step`, from 1, and looks at those of LAG steps before.

        Raises: NumbersError where too many updates in a row were skipped, or float16 has no scale left to lower.
        """
        self._pending.append((step, metrics))
        while len(self._pending) > LAG:
            self._look(*self._pending.popleft())

    def finish(self) -> None:
        """Looks at the steps that are left. Raises: as `see`."""
        while self._pending:
            self._look(*self._pending.popleft())

    def _look(self, step: int, metrics: dict) -> None:
        watched = ("loss", "grad_norm", "skipped", "overflowed", "loss_scale")
        values = {k: v.item() for k, v in jax.device_get({k: metrics[k] for k in watched if k in metrics}).items()}
        if values.get("overflowed") and values["loss_scale"] <= SCALE_MIN:
            raise NumbersError(
                f"step {step}: float16 gradients overflow at the smallest loss scale ({values['loss_scale']:g}); train "
                "in bfloat16, or look at the rows before it"
            )
        if values["skipped"]:
            self._skip(step, values)
        elif not values.get("overflowed"):
            self._in_a_row = 0
            self._compare(step, values["loss"])

    def _skip(self, step: int, values: dict) -> None:
        self._in_a_row += 1
        norm, limit = values["grad_norm"], self._config.safety.skip_grad_norm
        finite = math.isfinite(values["loss"]) and math.isfinite(norm)
        why = f"gradient norm {norm:.4g} is above safety.skip_grad_norm {limit:g}" if finite else "not finite"
        self._say(
            f"step {step} skipped: loss {values['loss']:.4g}, gradient norm {norm:.4g} ({why}); "
            f"{_rows(step, self._config.train.batch_size)}",
            step,
        )
        most = self._config.safety.max_skipped
        if most and self._in_a_row >= most:
            raise NumbersError(
                f"{self._in_a_row} updates in a row were skipped, the last at step {step} ({why}), as many as "
                "safety.max_skipped bears; no checkpoint has anything of them: look at the data, lower "
                "optimizer.learning_rate, or go on from an older checkpoint"
            )

    def _compare(self, step: int, loss: float) -> None:
        if len(self._losses) >= WINDOW_LEAST:
            mean, deviation = np.mean(self._losses), np.std(self._losses)
            if loss > mean + SPIKE_DEVIATIONS * deviation:
                self._say(
                    f"step {step}: loss {loss:.4g} is a spike, {(loss - mean) / max(deviation, 1e-9):.0f} deviations "
                    f"above the {len(self._losses)} before ({mean:.4g}); {_rows(step, self._config.train.batch_size)}",
                    step,
                )
        self._losses.append(loss)


def _rows(step: int, batch_size: int) -> str:
    """The samples of the batch that attempt `step` used, as the loader counts them."""
    return f"rows {(step - 1) * batch_size} to {step * batch_size - 1} of data.train"
