"""Runs the notebooks and keeps their outputs: how those that are committed were made.

    python notebooks/execute.py --run train quickstart convert      # minutes on a CPU: train.ipynb trains a model
    python notebooks/execute.py --run finetune                      # after make quickstart, whose model it takes
    python notebooks/execute.py                                     # runs none: only the links, see OWNER

quickstart.ipynb and convert.ipynb run with the model that train.ipynb saves, in runs/notebooks; nothing is downloaded.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

OWNER = "OWNER"  # of the repository on GitHub; after a change, run this once: every link and install line follows
FOLDER = Path(__file__).resolve().parent
NAMES = ("train", "quickstart", "convert", "finetune")
SETTINGS = {  # what they run with here; the model is what train.ipynb saves, or the quickstart's
    "train": {},
    "quickstart": {"NEOX_NOTEBOOK_MODEL": "my-model"},
    "convert": {"NEOX_NOTEBOOK_MODEL": "my-model"},
    "finetune": {"NEOX_NOTEBOOK_MODEL": "../quickstart/hf", "NEOX_NOTEBOOK_RATE": "6e-3"},
}
CELL_SECONDS = 3600


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and keep their outputs.")
    parser.add_argument("--run", nargs="+", choices=NAMES, default=[], help="which, in this order")
    names = parser.parse_args().run
    for name in ("README.md", *(f"{name}.ipynb" for name in NAMES)):
        path = FOLDER / name
        path.write_text(with_owner(path.read_text(encoding="utf-8")), encoding="utf-8")
    work = FOLDER.parent / "runs" / "notebooks"
    work.mkdir(parents=True, exist_ok=True)
    for name in names:
        nbformat.write(execute(name, work, SETTINGS[name]), FOLDER / f"{name}.ipynb")
        print(f"{name}.ipynb has the outputs of this run")


def with_owner(text: str) -> str:
    """Text whose links to this project on GitHub, and to Colab's view of it, are to OWNER's."""
    return re.sub(r"(github(?:\.com)?/)[\w-]+(/neox_jax\b)", rf"\g<1>{OWNER}\g<2>", text)


def execute(name: str, work: Path, settings: dict[str, str]) -> nbformat.NotebookNode:
    """NAME.ipynb with the outputs of a run in the folder `work`, by this Python.

    settings: environment variables. Raises: nbclient's CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # so that !neox-jax is this one
    state = {"IPYTHONDIR": str(work / ".ipython")}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(work)}},
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute(env={**os.environ, "PATH": path, **state, **settings})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = as_shown(output.text)
    return notebook


def as_shown(text: str) -> str:
    """What a terminal shows in the end of text with progress bars in it, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    return re.sub(r"^.*\r", "", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
