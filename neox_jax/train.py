"""Trains a model from a configuration into a run folder; the same call again goes on where it stopped.

A run folder holds config.json, model.json, tokenizer.json, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/STEP/
and, where asked for, profile/. Of several processes all do the same; the first alone writes what is neither a
checkpoint nor a profile, and speaks.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from neox_jax.checkpoint.manager import RunCheckpoints, is_due
from neox_jax.checkpoint.steps import STEPS_FOLDER, list_steps
from neox_jax.compiler_options import compiler_options, preset_for
from neox_jax.config import Config, ModelConfig
from neox_jax.continuity import changed_fields
from neox_jax.convert.adapter import Base, about_adapter, check_same, place_factors
from neox_jax.convert.files import read_json, to_json
from neox_jax.convert.source import TOKENIZER_FILE, config_of, identify_source, load_model, open_base
from neox_jax.data.conversations import ConversationSamples
from neox_jax.data.loader import Loader
from neox_jax.data.sources import open_source
from neox_jax.disk import write_text
from neox_jax.errors import InputError
from neox_jax.events import Events
from neox_jax.generation import generate
from neox_jax.heldout import BITS_PER_BYTE, LOSS, HeldoutSets
from neox_jax.lora import without_dropout
from neox_jax.memory import Memory
from neox_jax.meter import Meter
from neox_jax.metrics import MetricsWriter, Progress
from neox_jax.model import NeoX, abstract_model
from neox_jax.optimizer import make_optimizer, make_schedule
from neox_jax.peers import Alone, Peers
from neox_jax.pipeline import bubble
from neox_jax.profiler import Profiler, check_range
from neox_jax.sharding import check_sharded, make_mesh, named_sharding, report_sharding
from neox_jax.supervision import Supervisor
from neox_jax.tasks import RunTasks
from neox_jax.tokenizer import Tokenizer
from neox_jax.train_state import TrainState, abstract_state, init_state, pure_params
from neox_jax.train_step import cast_kernels, check_fits, make_train_step, model_graph
from neox_jax.tree import join

CONFIG_FILE, MODEL_FILE = "config.json", "model.json"
SHARED_SECONDS = 30  # for what one host wrote to be seen by another: NFS keeps what it knows of a folder for a while


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """step: attempts so far. interrupted: stopped by a signal, saved, to be started again by the same command.
    valid_loss in nats a token, valid_bits_per_byte and sample: None where there is nothing to say. valid_sets: of
    named sets of held-out data, each one's valid_loss/NAME and valid_bits_per_byte/NAME."""

    step: int
    interrupted: bool
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None
    sample: str | None = None
    valid_sets: dict[str, float] = dataclasses.field(default_factory=dict)


class Run:
    """Everything that a run needs, checked and opened before anything is written."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        devices=None,
        peers: Alone | Peers | None = None,
        accept_changes: bool = False,
    ):
        self.folder = Path(folder)
        self.peers = Alone() if peers is None else peers
        self.events = Events(self.folder, muted=self.peers.process_id != 0)
        if jax.process_count() != self.peers.num_processes:
            raise InputError(
                f"this is one of {jax.process_count()} processes of jax, and {self.peers.num_processes} of the run; "
                "start each with --distributed auto, or with `neox_jax.distributed.joined`"
            )
        self.mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
        self.starts = not list_steps(self.folder / STEPS_FOLDER)
        self.base_source, self.initial_adapter = "", None
        config = dataclasses.replace(config, model=self._find_model(config))
        config.check_seq_length()
        self.config = config
        self._check_same_model()
        self.changes = self._changed_fields()
        if self.changes and not accept_changes:
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(self.changes)}); use another "
                "--workdir, or go on from its newest checkpoint with --accept-changes"
            )
        self.schedule = make_schedule(config.optimizer, config.train.steps)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        lora, dtype = config.adapters, config.train.dtype
        self.abstract_state = abstract_state(config.model, self.optimizer, self.mesh, dtype=dtype, lora=lora)
        self.abstract_frozen = None
        if lora is not None:
            base = abstract_model(config.model, dtype=dtype, mesh=self.mesh, quantization=lora.quantize)
            self.abstract_frozen = pure_params(base)
        check_sharded(self.abstract_frozen or self.abstract_state.params, self.mesh)
        self.memory = Memory(self.abstract_state, self.abstract_frozen, self.mesh.local_devices[0])
        self.memory.check()
        self.compiler_preset = preset_for(config.train.compiler_options, self.mesh.devices.flat[0].device_kind)
        self._check_compiler_options()
        self.tokenizer = self._open_tokenizer()
        self.data_notes = []
        self.train_loader = self._open_data("train", config.data.train, "data.train")
        self.valid_loaders = {}  # by the name of the set
        for name, source in config.data.valid_sets.items():
            loader = self._open_data("valid", source, f"data.valid.{name}" if name else "data.valid")
            if loader is not None:
                self.valid_loaders[name] = loader
        check_fits(config, self.mesh)
        self.heldout = HeldoutSets(config, self.mesh, self.valid_loaders, self.tokenizer, self.peers)
        self.tasks = RunTasks(config.eval, self.tokenizer)
        self._load()

    def _find_model(self, config: Config) -> ModelConfig:
        """The model that is trained: the configuration's, init_from's, or that of a run that is under way."""
        if config.adapters:
            self.base_source, self.initial_adapter = open_base(config.init_from)
            if self.initial_adapter is not None:
                check_same(self.initial_adapter, config.lora)
            return config_of(self.base_source, mesh=self.mesh)
        if not config.init_from:
            return config.model
        if self.starts:
            return config_of(config.init_from, mesh=self.mesh)
        return ModelConfig(**read_json(self.folder / MODEL_FILE))  # the source is not needed again

    def _load(self) -> None:
        """Loads what init_from has: what is trained, or what adapters are added to and those to begin with."""
        config, self.initial_params, self.frozen, self.base = self.config, None, (), None
        if config.adapters:
            options = {"dtype": config.train.dtype, "quantize": config.lora.quantize or None}
            self.frozen = (pure_params(load_model(self.base_source, mesh=self.mesh, **options)),)
            digest = identify_source(self.base_source) if self.peers.process_id == 0 else None
            self.base = Base(self.base_source, self.peers.gather("the base of the adapters", digest)[0])
            if self.initial_adapter is not None:
                self.initial_params = place_factors(self.initial_adapter, self.abstract_state.params)
        elif config.init_from and self.starts:
            initial = load_model(config.init_from, mesh=self.mesh, dtype="float32", merged=True)
            self.initial_params = pure_params(initial)

    def whole(self, params: dict) -> dict:
        """All parameters of the model, where the state may have its adapters alone."""
        return join(params, *self.frozen)

    def _check_compiler_options(self) -> None:
        """Compiles a sum of nothing with them: the compiler itself knows what it takes."""
        try:
            jax.jit(lambda x: x + x).lower(np.float32(0)).compile(compiler_options(self.compiler_preset))
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            raise InputError(
                f"this compiler does not take train.compiler_options {self.compiler_preset!r} "
                f"({' '.join(str(error).split())[:200]}); set it to none"
            ) from error

    def _check_same_model(self) -> None:
        path = self.folder / MODEL_FILE
        if not path.is_file():
            return
        there, wanted = read_json(path), dataclasses.asdict(self.config.model)
        if self.config.adapters:
            wanted.pop("vocab_multiple")  # follows from the mesh, which a run may change
        differing = [f"{k} {there.get(k)!r}, not {wanted[k]!r}" for k in wanted if there.get(k) != wanted[k]]
        if differing:
            raise InputError(
                f"{self.folder} holds a run of another model ({'; '.join(differing)}); use another --workdir"
            )

    def _changed_fields(self) -> list[str]:
        path = self.folder / CONFIG_FILE
        if not path.is_file() or not list_steps(self.folder / STEPS_FOLDER):
            return []
        return changed_fields(read_json(path), dataclasses.asdict(self.config))

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

    def _open_data(self, which: str, source, field: str) -> Loader | None:
        """which: "train" or "valid". field: what messages call this source of it."""
        train = self.config.train
        microbatch = (train.batch_size // train.microbatches, train.seq_length + 1)
        named_sharding(microbatch, ("batch", "length"), self.mesh, "train.batch_size / train.microbatches")
        sharding = named_sharding((train.batch_size, train.seq_length + 1), ("batch", "length"), self.mesh, "batch")
        samples = open_source(self.config, source, which=which, field=field, tokenizer=self.tokenizer)
        if samples is None:
            return None
        if isinstance(samples, ConversationSamples):
            self.data_notes.append(f"{field}: {samples.summary}")
        needed = train.batch_size * (train.steps if which == "train" else 1)
        if samples.num_samples is not None and samples.num_samples < needed:
            product = "train.steps x train.batch_size" if which == "train" else "train.batch_size"
            raise InputError(
                f"{field} has {samples.num_samples} samples of {train.seq_length} tokens; wanted at least "
                f"{needed} ({product}): give more text, or lower those"
            )
        return Loader(samples, batch_size=train.batch_size, seq_length=train.seq_length, sharding=sharding)

    def compile_step(self):
        """The training step, compiled ahead: (state, tokens, *frozen) -> (state, metrics)."""
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
        return step.lower(self.abstract_state, tokens, *self.frozen).compile()

    def describe(self) -> list[str]:
        """How the run is laid out over its devices, in lines: mesh, bubble, compiler options, each parameter."""
        sizes = {axis: size for axis, size in self.mesh.shape.items() if size > 1}
        kind = self.mesh.devices.flat[0].device_kind
        lines = [f"mesh {' x '.join(f'{a}={n}' for a, n in sizes.items()) or 'of one device'} ({kind})"]
        if self.mesh.shape["pipe"] > 1:
            share = bubble(self.mesh.shape["pipe"], self.config.train.microbatches)
            lines.append(f"pipeline: every stage waits for {share:.1%} of a step (train.microbatches fill it)")
        options = compiler_options(self.compiler_preset)
        lines += [f"compiler option {name}={value} ({self.compiler_preset})" for name, value in options.items()]
        lines += self.data_notes
        if self.mesh.size > 1:
            for one in report_sharding(join(self.abstract_state.params, self.abstract_frozen or {})):
                share = one.device_bytes / one.num_bytes
                lines.append(f"{one.name} {list(one.shape)} over {tuple(one.spec)}: {share:.2%} on a device")
        return lines

    def init_state(self) -> TrainState:
        train = self.config.train
        return init_state(
            self.config.model,
            self.optimizer,
            self.mesh,
            seed=train.seed,
            dtype=train.dtype,
            params=self.initial_params,
            lora=self.config.adapters,
        )

    def open_checkpoints(self) -> RunCheckpoints:
        lora = self.config.adapters
        about = None if lora is None else about_adapter(lora, self.base)
        return RunCheckpoints(self.folder, self.config.checkpoint, self.peers, self.events.say, adapter=about)

    def check_same_data(self) -> None:
        """Ends all processes where one reads other tokens than the first, by batch 0."""
        if self.peers.num_processes == 1:
            return
        valid = {f"valid.{name}" if name else "valid": loader for name, loader in self.valid_loaders.items()}
        loaders = {"train": self.train_loader, **valid}
        facts = {f"batch 0 of data.{k} (SHA-256)": loader.digest(0) for k, loader in loaders.items()}
        self.peers.check_same("the data", facts)

    def write_files(self) -> None:
        """Puts the configuration, the model's and the tokenizer into the run folder: the first process, for all.

        Raises: InputError in a process that does not see them.
        """
        if self.peers.process_id == 0:
            write_text(self.folder / CONFIG_FILE, to_json(dataclasses.asdict(self.config)))
            write_text(self.folder / MODEL_FILE, to_json(dataclasses.asdict(self.config.model)))
            if self.tokenizer is not None:
                write_text(self.folder / TOKENIZER_FILE, self.tokenizer.to_json())
        self.peers.gather("the run folder")
        path, wanted = self.folder / CONFIG_FILE, to_json(dataclasses.asdict(self.config))
        if not _becomes_true(lambda: path.is_file() and path.read_text(encoding="utf-8") == wanted):
            raise InputError(f"does not see what process 0 wrote to {path}; {_SHARE}")

    def check_same_checkpoints(self, checkpoints: RunCheckpoints) -> None:
        """Raises: InputError in a process whose newest checkpoint is not the first one's."""
        step = self.peers.gather("the newest checkpoint", checkpoints.latest_step())[0]
        if not _becomes_true(lambda: checkpoints.latest_step() == step):
            raise InputError(
                f"the newest checkpoint in {self.folder} is {_step(checkpoints.latest_step())}, and {_step(step)} for "
                f"process 0; {_SHARE}"
            )


_SHARE = "--workdir must be one folder that all hosts share"


def train(
    config: Config,
    folder: str | Path,
    *,
    devices=None,
    peers: Alone | Peers | None = None,
    accept_changes: bool = False,
    profile: range | None = None,
) -> TrainResult:
    """Trains until train.steps, from the newest checkpoint in `folder` or from the start.

    SIGTERM and Ctrl-C end the step, save and return `interrupted`. peers: of `neox_jax.distributed.joined`, where this
    is one of several processes, each of which calls this alike and gets the same result. accept_changes: go on with
    fields that make it another run than it was. profile: steps to trace, counted from 1 as in metrics.jsonl.
    Raises: InputError before anything is written; NumbersError where too many updates in a row were skipped.
    """
    if profile is not None:
        check_range(profile, config.train.steps)
    run = Run(config, Path(folder), devices, peers, accept_changes)
    profiler = Profiler(profile, run.folder, peers=run.peers, say=run.events.say)
    run.check_same_data()
    with Supervisor(run.config, run.folder, run.mesh, run.peers, run.events.say) as supervisor:
        run.write_files()
        return _train(run, supervisor, profiler)


def _train(run: Run, supervisor: Supervisor, profiler: Profiler) -> TrainResult:
    peers = run.peers
    checkpoints = run.open_checkpoints()
    start, state = _start(run, checkpoints)
    profiler.start_run(start)
    writer = MetricsWriter(run.folder, start_step=start) if peers.process_id == 0 else None
    try:
        with peers:  # an error ends all processes before `close` waits for what they were saving together
            state, step, interrupted = _loop(run, state, start, checkpoints, writer, supervisor, profiler)
            _save(run, step, state, checkpoints, writer, supervisor, force=True)
            if interrupted:
                return TrainResult(step=step, interrupted=True)
            valid = run.heldout.measure(run.whole(state.params), supervisor.begin)
    finally:
        checkpoints.close()
        if writer is not None:
            writer.close()
    supervisor.begin("the sample of text")
    return TrainResult(
        step, False, valid.pop(LOSS, None), valid.pop(BITS_PER_BYTE, None), _sample(run, state.params), valid
    )


def _start(run: Run, checkpoints: RunCheckpoints) -> tuple[int, TrainState]:
    """The step to go on from, and its state."""
    peers, say = run.peers, run.events.say
    if peers.num_processes > 1:
        say(f"{peers.num_processes} processes on {', '.join(sorted(set(peers.hosts)))}; {run.mesh.size} devices")
    for line in run.describe():
        say(line)
    run.check_same_checkpoints(checkpoints)
    restored = checkpoints.restore_newest(run.abstract_state)
    if restored is None:
        state = run.init_state()
        checkpoints.save(0, state, run.config.model)
        return 0, state
    say(f"going on from step {restored[0]} of {run.config.train.steps} in {run.folder}", restored[0])
    for change in run.changes:
        say(f"another configuration from here on: {change}", restored[0])
    return restored


def _loop(
    run: Run,
    state: TrainState,
    start: int,
    checkpoints: RunCheckpoints,
    writer: MetricsWriter | None,
    supervisor: Supervisor,
    profiler: Profiler,
):
    """Steps until the end or a signal; returns (state, step, interrupted)."""
    config, step, stop = run.config, start, False
    if start >= config.train.steps:
        return state, start, False
    compiled_step = run.compile_step()
    run.memory.see(compiled_step)
    run.events.say(f"memory of a device: {run.memory.describe()}", start)
    before = writer.last if writer is not None else None
    meter = Meter(config, run.mesh, run.peers.hosts, skipped=before["skipped_updates"] if before else 0)
    batches = run.train_loader.batches(start, config.train.steps)
    progress = None if writer is None else Progress("training", total=config.train.steps, start=start)
    try:
        with run.peers.noting_signals():
            supervisor.begin(f"step {start + 1}")
            for index, tokens, wait_seconds in batches:
                step = index + 1
                with profiler.step(step, state):
                    state, metrics = compiled_step(state, tokens, *run.frozen)
                meter.add(wait_seconds, metrics)
                supervisor.see(step, state, metrics, wait_seconds)
                if step % config.log.every == 0 or step == config.train.steps:
                    line = meter.line(step)
                    if config.eval.every and step % config.eval.every == 0:
                        line |= run.heldout.measure(run.whole(state.params), supervisor.begin)
                    if run.tasks.is_due(step, config.train.steps):
                        line |= run.tasks.measure(_model(run, state.params), supervisor.begin)
                    if writer is not None:
                        if config.log.batch_digest:
                            line["batch_sha256"] = run.train_loader.digest(index)
                        writer.write(line)
                        seconds_left = line["step_seconds"] * (config.train.steps - step)
                        progress.update(step, _text(line), seconds_left=seconds_left)
                    meter.restart()
                if profiler.is_due(step):
                    supervisor.begin("the trace of the steps")
                    profiler.finish((state, metrics))
                _save(run, step, state, checkpoints, writer, supervisor)
                stop = run.peers.agree_to_stop(step)
                if stop:
                    profiler.finish((state, metrics))
                    break
                supervisor.begin(f"step {step + 1}")
            supervisor.finish()
    finally:
        batches.close()
        profiler.close()
        if progress is not None:
            progress.close()
    return state, step, stop and step < config.train.steps


def _save(run: Run, step: int, state: TrainState, checkpoints, writer, supervisor, *, force: bool = False) -> None:
    if force or is_due(step, run.config.checkpoint):
        supervisor.begin(f"the checkpoint of step {step}")
        if writer is not None:
            writer.flush()  # so that no line up to a saved step is lost with the host
    checkpoints.save(step, state, run.config.model, force=force)


def _sample(run: Run, params: dict) -> str | None:
    tokens = run.config.eval.sample_tokens
    if run.tokenizer is None or not tokens:
        return None
    model = _model(run, params)
    prompt = run.config.eval.prompt or [run.tokenizer.eos_token_id]
    completion = generate(model, run.tokenizer, [prompt], max_new_tokens=tokens, temperature=0.8, top_p=0.95, seed=0)
    return run.config.eval.prompt + completion[0].text


def _model(run: Run, params: dict) -> NeoX:
    """The model that a run is, to be read and written with as any other, by all processes alike."""
    # Under names that no rule knows, so that every replica makes the same rows and every process can read them.
    names = [axis if axis == "model" else f"{axis} copies" for axis in run.mesh.axis_names]
    mesh = Mesh(run.mesh.devices, names, axis_types=(AxisType.Auto,) * len(names))
    graphdef = model_graph(run.config.model, mesh, without_dropout(run.config.adapters))
    return nnx.merge(graphdef, cast_kernels(run.whole(params), jax.numpy.dtype(run.config.train.dtype)))


def _text(line: dict) -> str:
    text = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tok/s  mfu {line['mfu']:.1%}"
    if LOSS in line:
        text += f"  held-out {line[LOSS]:.3f}"
        sets = [
            f"{name.removeprefix(LOSS + '/')} {loss:.3f}" for name, loss in line.items() if name.startswith(LOSS + "/")
        ]
        text += f" ({', '.join(sets)})" if sets else ""
    if line["skipped_updates"]:
        text += f"  skipped {line['skipped_updates']}"
    return text


def _becomes_true(holds) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def _step(step: int | None) -> str:
    return "none" if step is None else f"of step {step}"
