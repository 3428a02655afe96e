"""What the ranks of `model` do in a layer: column-parallel products of all positions, row-parallel ones, one sum.

SHAPES  B batch  T length  D model
Between layers each rank keeps a slice of the positions. A layer gathers them once and scatters its sum once, and its
backward pass the same. That is written out here, collective by collective, because the compiler would sum the gradients
of attention's input and of the feed-forward's each for itself, and their outputs too.
"""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from neox_jax.sharding import RULES, partition_spec, platform, positions_axis
from neox_jax.tree import map_named


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a mesh's `model` axis, for activations of this length. With one rank the compiler does everything.

    length: of all positions T, before they are divided over anything.
    """

    mesh: Mesh | None
    length: int

    @property
    def _many(self) -> bool:
        return self.mesh is not None and self.mesh.shape.get("model", 1) > 1

    @property
    def _scattered(self) -> bool:
        return self._many and positions_axis(self.length, self.mesh) == "residual"

    @property
    def activation_axes(self) -> tuple[str, str]:
        """The logical axes of batch and positions inside a layer."""
        return "batch", "length" if positions_axis(self.length, self.mesh) == "length" else "sequence"

    @property
    def joins_batch(self) -> bool:
        """Whether a product shall treat batch and positions as one dim: not where each is sharded for itself."""
        # With B and T as two dims XLA's CPU backward pass takes twice as long; as one, TPUs copy between layouts.
        alone = self._many or self.mesh is None or self.mesh.shape.get("seq", 1) == 1
        return alone and platform(self.mesh) == "cpu"

    def gather(self, x_BTD: jax.Array) -> jax.Array:
        """All positions of what is between layers; of the gradient each rank gets the sum of its slice."""
        return jax.lax.all_gather(x_BTD, "model", axis=1, tiled=True) if self._scattered else x_BTD

    def sum(self, partial_BTD: jax.Array) -> jax.Array:
        """The ranks' sum, of which each gets its slice of the positions."""
        if self._scattered:
            return jax.lax.psum_scatter(partial_BTD, "model", scatter_dimension=1, tiled=True)
        return jax.lax.psum(partial_BTD, "model") if self._many else partial_BTD

    def gather_weights(self, weights: jax.Array, logical: tuple[str, ...]) -> jax.Array:
        """Weights with these logical axes as a rank needs them: gathered over fsdp; their gradients are scattered."""
        for dim, axis in enumerate(logical):
            if self._many and "fsdp" in RULES[axis] and self.mesh.shape.get("fsdp", 1) > 1:
                weights = jax.lax.all_gather(weights, "fsdp", axis=dim, tiled=True)
        return weights

    def fold(self, key: jax.Array, logical: tuple[str, ...]) -> jax.Array:
        """The key of what this rank draws for activations of its own rows, with these logical axes inside them."""
        if not self._many:
            return key
        own = "model" if any("model" in RULES[axis] for axis in logical) else ""
        for axis in ("data", "fsdp", "seq", own):
            if self.mesh.shape.get(axis, 1) > 1:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        return key

    def run(self, function: Callable, layer: nnx.Module, *arrays: jax.Array, axes: tuple, out_axes: tuple):
        """function(layer, *arrays) on every rank: with its part of one layer's parameters, of arrays and of results.

        axes: the logical axes of each array; out_axes: of each result. Returns a tuple, as the function does.
        """
        if not self._many:
            return function(layer, *arrays)
        # A layer's parameters say their own logical axes, of which the first is that of the stack it came from.
        parameters = {".".join(path): param for path, param in nnx.to_flat_state(nnx.split(layer)[1])}
        specs = map_named(lambda name, _: self._spec(parameters[name].get_metadata("logical")[1:]), layer)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(specs, *map(self._spec, axes)),
            out_specs=tuple(map(self._spec, out_axes)),
            check_vma=False,  # does not know that what is gathered is the same on every rank
        )(layer, *arrays)

    def _spec(self, logical: tuple[str, ...]) -> PartitionSpec:
        """Positions that do not divide are whole, or divided over `seq` alone."""
        positions = {"residual": positions_axis(self.length, self.mesh), "sequence": self.activation_axes[1]}
        return partition_spec(tuple(positions.get(axis, axis) for axis in logical), self.mesh)
