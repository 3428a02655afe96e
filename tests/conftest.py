"""Eight fake CPU devices and a compilation cache, set before anything touches jax."""

import gc
import os
import signal
from pathlib import Path

import jax
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
CACHE = {"jax_compilation_cache_dir": str(ROOT / ".jax_cache"), "jax_persistent_cache_min_compile_time_secs": 0.3}
for name, value in CACHE.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start

# Most of the tests' time is compilation, and LLVM without its passes takes two thirds of it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# A shell's background job ignores Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs():
    """Gives up a file's compiled programs after it: each has memory maps, and a process may have 65,530 of them."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real 20B tokenizer and real text; skips where this machine has none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data beside the checkout ({folder.name}/ with 20B_tokenizer.json is needed)")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a tokenizer and tokens to train on: see `runs.make_data`."""
    from runs import make_data

    return make_data(tmp_path_factory.mktemp("data"))
