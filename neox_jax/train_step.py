"""One step of training, pure: state and batch in, state and metrics out.

SHAPES  B batch  T length  M microbatches
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neox_jax.attention import default_backend
from neox_jax.compiler_options import compiler_options
from neox_jax.config import Config, LoraConfig, Masks, ModelConfig
from neox_jax.errors import InputError
from neox_jax.lora import of_microbatch, with_noise, without_dropout
from neox_jax.loss import cross_entropy_sum, target_weights
from neox_jax.marks import split_marks
from neox_jax.model import NeoX, abstract_model
from neox_jax.optimizer import num_updates
from neox_jax.pipeline import pipelined_hidden
from neox_jax.sharding import AXES, constrain, platform
from neox_jax.train_state import TrainState, update_loss_scale
from neox_jax.tree import is_decayed, join, map_named


def cast_kernels(params, dtype):
    """Kernels and tables in the compute dtype; biases and norms stay float32 (they are tiny, and added in float32), and
    what is in 8 bits is not touched."""

    def cast(name: str, leaf):
        return leaf.astype(dtype) if is_decayed(name) and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return map_named(cast, params)


def next_token_loss(
    model: NeoX,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    weights_BT: jax.Array | None = None,
    *,
    remat: str = "none",
    attention: str = "auto",
) -> jax.Array:
    """The mean loss in nats of predicting tokens [B, T + 1] from those before them.

    segment_ids: of the documents; a token sees those of its own document only. Its position still counts from the row's
    start: rotary embedding knows distances alone. weights: of the targets, all 1 by default; they should have the mean
    1 over all rows of a step (`loss.target_weights`).
    Shapes: tokens [B,T+1], segment_ids [B,T+1] or None, weights [B,T] or None -> [].
    """
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    segment_ids_BT = None if segment_ids is None else segment_ids[:, :-1]
    inputs_BT = constrain(inputs_BT, ("batch", "length"), model.mesh)
    hidden_BTD = model.hidden(inputs_BT, segment_ids=segment_ids_BT, remat=remat, attention=attention)
    return _head_loss(hidden_BTD, model.head, targets_BT, weights_BT, model) / targets_BT.size


def pipelined_loss(
    model: NeoX,
    params: dict,
    tokens_MBT: jax.Array,
    segment_ids_MBT: jax.Array | None = None,
    weights_MBT: jax.Array | None = None,
    *,
    dtype,
    remat: str,
    attention: str,
) -> jax.Array:
    """The same over microbatches that go through the pipeline together.

    model: in the compute dtype; params: the master weights, of which layers and head are cast where they are used, so
    that their gradients are summed over microbatches in float32. Shapes: [M,B,T+1] -> [].
    """
    targets_MBT = tokens_MBT[..., 1:]
    master = nnx.merge(nnx.split(model)[0], params)
    hidden_MBTD = pipelined_hidden(
        model,
        master.layers,
        tokens_MBT[..., :-1],
        None if segment_ids_MBT is None else segment_ids_MBT[..., :-1],
        cast=lambda layers, iteration: cast_kernels(of_microbatch(layers, iteration), dtype),
        remat=remat,
        attention=attention,
    )

    head_VD = master.head

    def add(total, microbatch):
        hidden_BTD, targets_BT, weights_BT = microbatch
        return total + _head_loss(hidden_BTD, head_VD, targets_BT, weights_BT, model), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (hidden_MBTD, targets_MBT, weights_MBT))
    return total / targets_MBT.size


def _head_loss(hidden_BTD, head_VD, targets_BT, weights_BT, model: NeoX) -> jax.Array:
    weights_BT = jnp.ones(targets_BT.shape, jnp.float32) if weights_BT is None else weights_BT
    vocab_size = model.config.vocab_size
    return cross_entropy_sum(hidden_BTD, head_VD, targets_BT, weights_BT, vocab_size=vocab_size, mesh=model.mesh)


def read_batch(rows: jax.Array, masks: Masks, *, loss_rows: int = 0):
    """(tokens, segment ids, weights of the targets), as the losses above take them; None for what masks do without.

    Shapes: rows [B,T+1], with marks -> [B,T+1], [B,T+1], [B,T].
    """
    if not any(masks):
        return rows, None, None
    tokens, counted_BT, segment_ids = split_marks(rows)
    weights_BT = target_weights(counted_BT, rows=loss_rows) if masks.targets else None
    return tokens, segment_ids if masks.documents else None, weights_BT


def split_microbatches(batch, microbatches: int, mesh):
    """Microbatch m takes rows m, m + M, m + 2M ..., so that every device keeps the rows it has.

    Shapes: a tree of [B,T] -> the same of [M,B/M,T].
    """

    def split(x_BT: jax.Array) -> jax.Array:
        x_MBT = x_BT.reshape(-1, microbatches, x_BT.shape[-1]).swapaxes(0, 1)
        return constrain(x_MBT, (None, "batch", "length"), mesh)

    return jax.tree.map(split, batch)


def loss_and_gradients(
    graphdef,
    params: dict,
    tokens,
    segment_ids=None,
    weights_BT=None,
    *,
    frozen=None,
    dtype,
    remat,
    microbatches,
    mesh,
    attention="auto",
    scale=None,
    pin=lambda gradients: gradients,
):
    """Mean loss and float32 gradients of it; microbatches fill the pipeline, or are summed in float32 without one.

    frozen: the model's parameters beside `params`. scale: the loss is multiplied by it before it is differentiated, and
    the gradients divided by it afterwards. pin: puts a tree of gradients where it shall live. Shapes: tokens,
    segment_ids [B,T+1], weights [B,T], of mean 1.
    """
    batch = (tokens, segment_ids, weights_BT)
    split = functools.partial(split_microbatches, microbatches=microbatches, mesh=mesh)
    pipelined = mesh is not None and mesh.shape.get("pipe", 1) > 1

    def loss_fn(params, index, *batch):
        params = of_microbatch(join(params, frozen or {}), index)
        model = nnx.merge(graphdef, cast_kernels(params, dtype))
        if pipelined:
            loss = pipelined_loss(model, params, *split(batch), dtype=dtype, remat=remat, attention=attention)
        else:
            loss = next_token_loss(model, *batch, remat=remat, attention=attention)
        return loss if scale is None else loss * scale

    value_and_grad = jax.value_and_grad(loss_fn)
    if pipelined or microbatches == 1:
        loss, gradients = value_and_grad(params, jnp.int32(0), *batch)
        total, divisor = (loss, pin(gradients)), 1
    else:

        def body(carry, indexed):
            loss, gradients = value_and_grad(params, indexed[0], *indexed[1])
            return (carry[0] + loss, pin(jax.tree.map(jnp.add, carry[1], gradients))), None

        zeros = (jnp.float32(0), pin(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)))
        total, _ = jax.lax.scan(body, zeros, (jnp.arange(microbatches), split(batch)))
        divisor = microbatches
    divisor = divisor if scale is None else divisor * scale
    return jax.tree.map(lambda x: x / divisor, total)


def train_step(
    state: TrainState,
    rows: jax.Array,
    frozen: dict | None = None,
    *,
    graphdef,
    draw=lambda frozen, step: frozen,
    optimizer,
    schedule,
    dtype,
    remat,
    attention,
    microbatches,
    mesh,
    masks,
    loss_rows,
    skip_grad_norm=0.0,
    moment_shardings=None,
):
    """Applies one update, or none where the loss or the gradient norm is not finite or the norm above skip_grad_norm.

    frozen: the model's parameters beside those of the state. draw: gives them what a step draws from.
    Shapes: rows [B,T+1], tokens and their marks. Metrics (float32 []): loss and grad_norm (before clipping) of this
    batch, learning_rate used, skipped (0 or 1). A skipped step changes nothing but `step`: the schedule and every
    moment stay. In float16 gradients that are not finite have overflowed: that is `overflowed`, not `skipped`, and
    lowers `loss_scale`. masks, loss_rows: as `read_batch` takes them. skip_grad_norm: 0 for no limit. moment_shardings:
    where the optimizer's moments live, and so where gradients are summed to.
    """

    def pin(gradients):
        return gradients if moment_shardings is None else jax.lax.with_sharding_constraint(gradients, moment_shardings)

    loss, gradients = loss_and_gradients(
        graphdef,
        state.params,
        *read_batch(rows, masks, loss_rows=loss_rows),
        frozen=draw(frozen, state.step),
        dtype=dtype,
        remat=remat,
        attention=attention,
        microbatches=microbatches,
        mesh=mesh,
        scale=None if state.loss_scale is None else state.loss_scale.scale,
        pin=pin,
    )
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    applied = finite & (grad_norm <= skip_grad_norm) if skip_grad_norm else finite
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    new = (optax.apply_updates(state.params, updates), optimizer_state)
    params, optimizer_state = jax.tree.map(
        functools.partial(jnp.where, applied), new, (state.params, state.optimizer_state)
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(num_updates(state.optimizer_state)),
        "skipped": (~applied).astype(jnp.int32),
    }
    loss_scale = None
    if state.loss_scale is not None:
        loss_scale = update_loss_scale(state.loss_scale, finite)
        metrics |= {"overflowed": (~finite).astype(jnp.int32), "loss_scale": state.loss_scale.scale}
        metrics["skipped"] -= metrics["overflowed"]
    state = TrainState(step=state.step + 1, params=params, optimizer_state=optimizer_state, loss_scale=loss_scale)
    return state, metrics


def make_train_step(config: Config, *, optimizer, schedule, mesh, state_shardings):
    """Jits `train_step` for a run: (state, rows) -> (state, metrics), the state donated and kept where it lives; where
    adapters are trained, (state, rows, what they are added to).

    Raises: InputError where the run does not fit the mesh.
    """
    check_fits(config, mesh)

    def draw(frozen, step):
        lora = config.adapters
        if lora is None:
            return frozen
        return with_noise(frozen, lora, layers=config.model.num_hidden_layers, seed=config.train.seed, step=step)

    step = functools.partial(
        train_step,
        graphdef=model_graph(config.model, mesh, config.adapters),
        draw=draw,
        optimizer=optimizer,
        schedule=schedule,
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        attention=config.train.attention,
        microbatches=config.train.microbatches,
        mesh=mesh,
        masks=config.masks(config.data.train),
        loss_rows=config.train.loss_rows,
        skip_grad_norm=config.safety.skip_grad_norm,
        moment_shardings=optax.tree.get(state_shardings.optimizer_state, "mu"),
    )
    options = compiler_options(config.train.compiler_options, mesh.devices.flat[0].device_kind)
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None), compiler_options=options)


def make_eval_step(config: Config, *, mesh):
    """Jits the loss alone: (params, rows [B,T+1], masks) -> (mean nats over the targets that count, their number).

    params: all of the model's, adapters included.
    """
    graphdef = model_graph(config.model, mesh, without_dropout(config.adapters))
    dtype = jnp.dtype(config.train.dtype)
    attention = config.train.attention

    def eval_step(params, rows, masks):
        model = nnx.merge(graphdef, cast_kernels(params, dtype))
        tokens, segment_ids, weights_BT = read_batch(rows, masks)
        num_counted = jnp.int32(rows[:, 1:].size) if weights_BT is None else (weights_BT > 0).sum(dtype=jnp.int32)
        split = split_microbatches((tokens, segment_ids, weights_BT), config.train.microbatches, mesh)
        if mesh.shape["pipe"] > 1:
            return pipelined_loss(model, params, *split, dtype=dtype, remat="none", attention=attention), num_counted
        losses_M = jax.lax.map(lambda batch: next_token_loss(model, *batch, attention=attention), split)
        return jnp.mean(losses_M), num_counted

    return jax.jit(eval_step, static_argnames="masks")


def check_fits(config: Config, mesh) -> None:
    """Raises: InputError naming each size of the run that does not divide over the mesh, with the nearest that does."""
    model, train = config.model, config.train
    axes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    rows = axes["data"] * axes["fsdp"]
    wanted = (
        ("model.num_hidden_layers", model.num_hidden_layers, "mesh.pipe", axes["pipe"]),
        ("model.num_attention_heads", model.num_attention_heads, "mesh.model", axes["model"]),
        ("model.intermediate_size", model.intermediate_size, "mesh.model", axes["model"]),
        ("model.hidden_size", model.hidden_size, "mesh.fsdp", axes["fsdp"]),
        ("train.seq_length", train.seq_length, "mesh.seq", axes["seq"]),
        ("train.batch_size", train.batch_size, "mesh.data x mesh.fsdp x train.microbatches", rows * train.microbatches),
    )
    problems = []
    for field, size, over, parts in wanted:
        if size % parts:
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - parts))
            up = -(-size // parts) * parts
            problems.append(
                f"{field} {size} does not divide over {over} = {parts}; try {nearest} there, or {field} {up}"
            )
    sources = [config.data.train, *config.data.valid_sets.values()]
    if axes["pipe"] > 1 and any(config.masks(source).documents for source in sources):
        dtype, head_dim = jnp.dtype(train.dtype), model.head_dim
        automatic = train.attention == "auto"
        if (
            default_backend(platform(mesh), dtype=dtype, head_dim=head_dim) if automatic else train.attention
        ) == "cudnn":
            problems.append(
                "attention cudnn takes no document masks with mesh.pipe above 1; set train.attention to xla"
            )
    if problems:
        raise InputError("; ".join(problems))


def model_graph(config: ModelConfig, mesh, lora: LoraConfig | None = None):
    """The model without its arrays, to merge parameters into at trace time."""
    quantization = "" if lora is None else lora.quantize
    return nnx.split(abstract_model(config, mesh=mesh, quantization=quantization, lora=lora))[0]
