"""Which of how many processes this one is, and the start of jax in it; `peers.py` is what they say to each other."""

import contextlib
import dataclasses
import os

import neox_jax
from neox_jax.errors import InputError
from neox_jax.hub import loopback
from neox_jax.peers import Alone, Peers, meet

# Each says that a launcher started several processes, and how many.
PROCESS_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
HOST_LISTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among `num_processes`; coordinator: HOST:PORT, where process 0 is met.

    local_device_ids: the devices of this host that are this process's; None: all.
    Raises: InputError.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"coordinator {self.coordinator!r}: wanted HOST:PORT of process 0, as 10.0.0.1:8476")
        if self.num_processes < 1:
            raise InputError(f"num-processes is {self.num_processes}; it must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise InputError(
                f"process-id is {self.process_id}; with {self.num_processes} processes it is from 0 to "
                f"{self.num_processes - 1}"
            )


def find_place(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: str | None = None,
    timeout_seconds: int = 300,
) -> Place | None:
    """Which of several processes this one is, as it is told; None where it is alone.

    distributed: "auto" is what a launcher says (`detect_place`); "off" is alone, whatever one says.
    Raises: InputError, also where it is told nothing and a launcher started several.
    """
    plain = (coordinator, num_processes, process_id)
    if plain != (None, None, None):
        if None in plain or distributed is not None:
            raise InputError("coordinator, num_processes and process_id go together, and not with distributed")
        return Place(*plain)
    if distributed not in (None, "auto", "off"):
        raise InputError(f"distributed is {distributed!r}; wanted auto or off")
    if distributed is None:
        check_alone()
    return detect_place(timeout_seconds=timeout_seconds) if distributed == "auto" else None


def detect_place(*, timeout_seconds: int) -> Place:
    """The place that a launcher gave this process: a TPU pod, SLURM (srun) or Open MPI, as jax finds them.

    Raises: InputError where it finds none.
    """
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize() does the same, but says nothing of it

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout_seconds)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise InputError(f"--distributed auto: {' '.join(str(error).split())}") from error
    coordinator, num_processes, process_id, local_device_ids = found
    if None in (coordinator, num_processes, process_id):
        raise InputError(
            "--distributed auto found no TPU pod, SLURM step (srun) or Open MPI job that this process is of; give "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        )
    ids = None if local_device_ids is None else tuple(local_device_ids)
    return Place(coordinator, num_processes, process_id, ids)


def check_alone(environ=os.environ) -> None:
    """Raises: InputError where a launcher started several processes and this one was not told so."""
    counts = {name: environ.get(name, "") for name in PROCESS_COUNTS}
    several = [f"{name} is {text}" for name, text in counts.items() if text.isdecimal() and int(text) > 1]
    several += [f"{name} names several hosts" for name in HOST_LISTS if "," in environ.get(name, "")]
    if several:
        raise InputError(
            f"{several[0]}, so this is one of several processes, each of which would do everything by itself; give "
            "--distributed auto (with SLURM, under srun), or --distributed off for one process"
        )


@contextlib.contextmanager
def joined(
    place: Place | None,
    *,
    facts: dict,
    problem: InputError | None = None,
    timeout_seconds: int = 300,
    heartbeat_seconds: int = 100,
    debug: bool = False,
):
    """Gives the `Peers` of a run with jax started on all of their devices; `Alone` where there is no place.

    To be entered before jax sees a device. facts: name to JSON, what must be the same in all processes. problem: why
    this one cannot take part, which ends all of them. Where the body raises in one of several processes all are ended,
    this one too, with one line and an exit code: 65 for an InputError.
    Raises: InputError, the same in each process, where they do not come together.
    """
    if place is None:
        if problem is not None:
            raise problem
        yield Alone()
        return
    import jax

    peers = meet(
        place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        facts={"neox_jax": neox_jax.__version__, "jax": jax.__version__, **facts},
        problem=None if problem is None else str(problem),
        timeout_seconds=timeout_seconds,
        heartbeat_seconds=heartbeat_seconds,
    )
    peers.debug = debug
    with peers:
        _start_jax(place, peers, timeout_seconds=timeout_seconds, heartbeat_seconds=heartbeat_seconds)
        yield peers
        jax.distributed.shutdown()
    peers.close()


def _start_jax(place: Place, peers: Peers, *, timeout_seconds: int, heartbeat_seconds: int) -> None:
    import jax

    host, _, port = place.coordinator.rpartition(":")
    address = loopback(host.strip("[]"))
    jax.distributed.initialize(
        place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout_seconds,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=timeout_seconds,
        coordinator_bind_address=address and (f"[{address}]:{port}" if ":" in address else f"{address}:{port}"),
    )
    peers.note_signals()  # after jax, whose own handler of SIGTERM would take them
