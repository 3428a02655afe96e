"""Trains a model from a configuration into a run folder; the same call again goes on where it stopped.

A run folder holds config.json, model.json, tokenizer.json, metrics.jsonl, tensorboard/ and checkpoints/STEP/.
"""

import dataclasses
import functools
import json
import math
import signal
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from neox_jax.checkpoint.manager import STEPS_FOLDER, RunCheckpoints, list_steps
from neox_jax.config import Config, ModelConfig
from neox_jax.convert.source import TOKENIZER_FILE, load_model
from neox_jax.data.index import open_samples
from neox_jax.data.loader import Loader
from neox_jax.errors import InputError
from neox_jax.generation import generate
from neox_jax.hardware import peak_flops
from neox_jax.metrics import MetricsWriter, Progress
from neox_jax.model import abstract_model
from neox_jax.optimizer import make_optimizer, make_schedule
from neox_jax.sharding import make_mesh, named_sharding
from neox_jax.tokenizer import Tokenizer
from neox_jax.train_state import TrainState, abstract_state, init_state, pure_params
from neox_jax.train_step import cast_kernels, make_eval_step, make_train_step

MODEL_FILE = "model.json"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """step: attempts so far. interrupted: stopped by a signal, saved, to be started again by the same command.
    valid_loss in nats a token, valid_bits_per_byte and sample: None where there is nothing to say."""

    step: int
    interrupted: bool
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None
    sample: str | None = None


class Run:
    """Everything that a run needs, checked and opened before anything is written."""

    def __init__(self, config: Config, folder: Path, devices=None):
        self.folder = Path(folder)
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
        self.initial_params = None
        if config.init_from and not list_steps(self.folder / STEPS_FOLDER):
            initial = load_model(config.init_from, mesh=self.mesh, dtype="float32")
            self.initial_params = pure_params(initial)
            config = dataclasses.replace(config, model=initial.config)
        elif config.init_from:  # under way already: the source is not needed again
            config = dataclasses.replace(
                config, model=ModelConfig(**json.loads((self.folder / MODEL_FILE).read_text()))
            )
        config.check_seq_length()
        self.config = config
        self._check_same_model()
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.abstract_state = abstract_state(config.model, self.optimizer, self.mesh)
        self.tokenizer = self._open_tokenizer()
        self.train_loader, self.valid_loader = self._open_data("train"), self._open_data("valid")

    def _check_same_model(self) -> None:
        path = self.folder / MODEL_FILE
        if not path.is_file():
            return
        there, wanted = json.loads(path.read_text(encoding="utf-8")), dataclasses.asdict(self.config.model)
        differing = [f"{k} {there.get(k)!r}, not {wanted[k]!r}" for k in wanted if there.get(k) != wanted[k]]
        if differing:
            raise InputError(
                f"{self.folder} holds a run of another model ({'; '.join(differing)}); use another --workdir"
            )

    def _open_tokenizer(self) -> Tokenizer | None:
        if not self.config.data.tokenizer:
            return None
        tokenizer = Tokenizer.from_file(self.config.data.tokenizer)
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise InputError(
                f"data.tokenizer {self.config.data.tokenizer} has {tokenizer.vocab_size} ids, model.vocab_size is "
                f"{self.config.model.vocab_size}; it must be at least as many"
            )
        return tokenizer

    def _open_data(self, which: str) -> Loader | None:
        train = self.config.train
        microbatch = (train.batch_size // train.microbatches, train.seq_length + 1)
        named_sharding(microbatch, ("batch", "length"), self.mesh, "train.batch_size / train.microbatches")
        sharding = named_sharding((train.batch_size, train.seq_length + 1), ("batch", "length"), self.mesh, "batch")
        samples = open_samples(
            self.config.data,
            which,
            seq_length=train.seq_length,
            num_samples=train.steps * train.batch_size,
            vocab_size=self.config.model.vocab_size,
        )
        if samples is None:
            return None
        needed = train.batch_size * (train.steps if which == "train" else 1)
        if samples.num_samples is not None and samples.num_samples < needed:
            product = "train.steps x train.batch_size" if which == "train" else "train.batch_size"
            raise InputError(
                f"data.{which} has {samples.num_samples} samples of {train.seq_length} tokens; wanted at least "
                f"{needed} ({product}): give more text, or lower those"
            )
        return Loader(samples, batch_size=train.batch_size, seq_length=train.seq_length, sharding=sharding)

    def compile_step(self):
        """The training step, compiled ahead: (state, tokens) -> (state, metrics)."""
        train = self.config.train
        step = make_train_step(
            self.config,
            optimizer=self.optimizer,
            schedule=self.schedule,
            mesh=self.mesh,
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state),
        )
        shape = (train.batch_size, train.seq_length + 1)
        tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=self.train_loader.sharding)
        return step.lower(self.abstract_state, tokens).compile()

    @functools.cached_property
    def eval_step(self):
        return make_eval_step(self.config, mesh=self.mesh)

    def write_files(self) -> None:
        """Puts the configuration, the model's and the tokenizer into the run folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(self.folder / "config.json", dataclasses.asdict(self.config))
        _write_json(self.folder / MODEL_FILE, dataclasses.asdict(self.config.model))
        if self.tokenizer is not None:
            self.tokenizer.save(self.folder / TOKENIZER_FILE)


def train(config: Config, folder: str | Path, *, devices=None) -> TrainResult:
    """Trains until train.steps, from the newest checkpoint in `folder` or from the start.

    SIGTERM and Ctrl-C end the step, save and return `interrupted`. Raises: InputError before anything is written.
    """
    run = Run(config, Path(folder), devices)
    config = run.config
    run.write_files()
    checkpoints = RunCheckpoints(run.folder, config.checkpoint)
    start = checkpoints.latest_step()
    if start is None:
        start = 0
        state = init_state(run.config.model, run.optimizer, run.mesh, seed=config.train.seed, params=run.initial_params)
        checkpoints.save(0, state, run.config.model)
    else:
        state = checkpoints.restore(start, run.abstract_state)
        _say(f"going on from step {start} of {config.train.steps} in {run.folder}")
    writer = MetricsWriter(run.folder, start_step=start) if jax.process_index() == 0 else None
    try:
        state, step, interrupted = _loop(run, state, start, checkpoints, writer)
        checkpoints.save(step, state, config.model, force=True)
        if interrupted:
            return TrainResult(step=step, interrupted=True)
        loss, bits_per_byte = heldout_loss(run, state.params)
    finally:
        checkpoints.close()
        if writer is not None:
            writer.close()
    return TrainResult(step, False, loss, bits_per_byte, _sample(run, state.params))


def _loop(run: Run, state: TrainState, start: int, checkpoints: RunCheckpoints, writer: MetricsWriter | None):
    """Steps until the end or a signal; returns (state, step, interrupted)."""
    config, step = run.config, start
    if start >= config.train.steps:
        return state, start, False
    compiled_step = run.compile_step()
    meter = _Meter(run)
    progress = Progress("training", total=config.train.steps, start=start)
    stop = _StopSignal()
    batches = run.train_loader.batches(start, config.train.steps)
    try:
        for index, tokens, wait_seconds in batches:
            state, metrics = compiled_step(state, tokens)
            step = index + 1
            meter.add(wait_seconds, metrics["skipped"])
            if step % config.log.every == 0 or step == config.train.steps:
                line = meter.line(step, metrics)
                if config.log.batch_digest:
                    line["batch_sha256"] = run.train_loader.digest(index)
                if config.eval.every and step % config.eval.every == 0:
                    line["valid_loss"], line["valid_bits_per_byte"] = heldout_loss(run, state.params)
                if writer is not None:
                    writer.write({k: v for k, v in line.items() if v is not None})
                progress.update(step, _text(line), seconds_left=line["step_seconds"] * (config.train.steps - step))
                meter.restart()
            checkpoints.save(step, state, run.config.model)
            if stop.requested:
                break
    finally:
        batches.close()
        progress.close()
        stop.restore()
    return state, step, stop.requested and step < config.train.steps


class _Meter:
    """Turns the steps since the last line into a line of metrics."""

    def __init__(self, run: Run):
        train = run.config.train
        peak, _ = peak_flops(run.mesh.devices.flat[0], train.dtype)
        self._tokens_per_step = train.batch_size * train.seq_length
        self._flops_per_token = run.config.model.training_flops_per_token(train.seq_length)
        self._peak_flops = peak * _distinct_devices(run.mesh)
        self._skipped = 0
        self.restart()

    def restart(self) -> None:
        self._steps, self._wait_seconds, self._skips, self._start = 0, 0.0, [], time.perf_counter()

    def add(self, wait_seconds: float, skipped: jax.Array) -> None:
        self._steps += 1
        self._wait_seconds += wait_seconds
        self._skips.append(skipped)  # read only when a line is due, so that steps are dispatched ahead

    def line(self, step: int, metrics: dict) -> dict:
        values = jax.device_get({"metrics": metrics, "skips": self._skips})
        seconds = (time.perf_counter() - self._start) / self._steps
        self._skipped += int(sum(values["skips"]))
        tokens_per_second = self._tokens_per_step / seconds
        return {
            "step": step,
            "loss": float(values["metrics"]["loss"]),
            "grad_norm": float(values["metrics"]["grad_norm"]),
            "learning_rate": float(values["metrics"]["learning_rate"]),
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": tokens_per_second,
            "step_seconds": seconds,
            "data_wait_seconds": self._wait_seconds / self._steps,
            "mfu": tokens_per_second * self._flops_per_token / self._peak_flops,
            "skipped_updates": self._skipped,
        }


class _StopSignal:
    """Notes SIGTERM and Ctrl-C instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.requested = False
        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: the caller's affair
                return

    def _note(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def heldout_loss(run: Run, params: dict) -> tuple[float | None, float | None]:
    """Held-out loss in nats a token and bits per byte over eval.batches batches (all there are, if fewer)."""
    if run.valid_loader is None:
        return None, None
    losses, num_bytes, num_tokens = [], 0, 0
    for index, tokens, _ in run.valid_loader.batches(0, min(run.config.eval.batches, run.valid_loader.num_batches)):
        losses.append(run.eval_step(params, tokens))
        num_tokens += tokens[:, 1:].size
        if run.tokenizer is not None:
            num_bytes += int(run.tokenizer.num_bytes[run.valid_loader.host_batch(index)[:, 1:]].sum())
    nats = float(np.mean(jax.device_get(losses), dtype=np.float64))
    return nats, nats * num_tokens / math.log(2) / num_bytes if num_bytes else None


def _sample(run: Run, params: dict) -> str | None:
    tokens = run.config.eval.sample_tokens
    if run.tokenizer is None or not tokens:
        return None
    dtype = jax.numpy.dtype(run.config.train.dtype)
    graphdef, _ = nnx.split(abstract_model(run.config.model, mesh=run.mesh))
    model = nnx.merge(graphdef, cast_kernels(params, dtype))
    prompt = run.config.eval.prompt or [run.tokenizer.eos_token_id]
    completion = generate(model, run.tokenizer, [prompt], max_new_tokens=tokens, temperature=0.8, top_p=0.95, seed=0)
    return run.config.eval.prompt + completion[0].text


def _text(line: dict) -> str:
    text = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tok/s  mfu {line['mfu']:.0%}"
    if line.get("valid_loss") is not None:
        text += f"  held-out {line['valid_loss']:.3f}"
    if line["skipped_updates"]:
        text += f"  skipped {line['skipped_updates']}"
    return text


def _distinct_devices(mesh) -> int:
    """Fake CPU devices share one processor, so a CPU counts once however many it plays."""
    return 1 if mesh.devices.flat[0].platform == "cpu" else mesh.size


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
