"""What README.md and docs/ say is so: commands run, links lead somewhere, tables are those of the code.

In a fence a line that begins with a command is one (`sh` in all of our pages). Each is run, page by page and in order,
in a folder where the names that pages use are small things; those that cannot be have `<!-- needs: REASON -->` before
their fence, and forms of commands `<!-- synopsis -->`: of these, verbs and options must be there.
"""

import ast
import dataclasses
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import neox_jax
from neox_jax.cli import main
from neox_jax.config import SECTIONS, Config, ModelConfig
from neox_jax.model import init_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "CHANGELOG.md", "benchmarks/README.md", "launch/README.md", "notebooks/README.md"]
COMMANDS = ("neox-jax", "lm_eval", "make", "python", "pip", "bash", "hf", "srun", "gcloud", "tensorboard")
REASONS = ("synopsis", "needs: network", "needs: tpu", "needs: gpu", "needs: hosts", "needs: minutes")
SMALLER = {  # numbers of the pages that would take hours or are of other data: what is run in their place
    "--config.train.steps=150000": "--config.train.steps=6",
    "--step 71000": "--step 1",
    "--steps 71000:71100": "--steps 0:4",
    "--config.eval.every=1000": "--config.eval.every=2",
    "--preset pythia-70m --batch-size 8 --seq-length 64": "--preset tiny --batch-size 8 --seq-length 16 --steps 1",
}
TINY = dataclasses.replace(ModelConfig.preset("tiny"), max_position_embeddings=2048)
CONFIG = """
import runpy, sys
sys.path.insert(0, {folder!r})

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    config.model.preset, config.model.max_position_embeddings = "tiny", 2048
    config.train.update(steps=4, batch_size=8, seq_length=32, microbatches=1, dtype="float32")
    config.optimizer.warmup_steps = 1
    config.checkpoint.update(every=1000, steps=())
    config.eval.update(batches=1, sample_tokens=0)
    config.safety.compare_replicas = 0
    config.mesh.update(data=-1, fsdp=1, pipe=1, seq=1, model=1)
    return config
"""


class Block(NamedTuple):
    """A fence: where it is, its language, the comment before it and its lines."""

    place: str
    language: str
    mark: str
    lines: list[str]

    def commands(self) -> list[str]:
        """Its shell commands, each on one line; [] where it has none."""
        if self.language == "python" or not any(line.split(" ")[0] in COMMANDS for line in self.lines):
            assert self.language not in ("sh", "bash"), f"{self.place}: no known command in it"
            return []
        joined = "\n".join(self.lines).replace("\\\n", " ").splitlines()
        return [line for line in joined if line.strip() and not line.startswith("#")]


def blocks(page: str) -> list[Block]:
    found, lines = [], (ROOT / page).read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line.startswith("```"):
            mark = re.fullmatch(r"<!-- (.*) -->", lines[start - 1])
            place = f"{page}:{start + 1}"
            found.append(Block(place, lines[start][3:].strip(), mark[1] if mark else "", lines[start + 1 : number]))
            start = None
    assert start is None, f"{page}:{start}: a fence that does not end"
    return found


@pytest.fixture(scope="module")
def home(data, tmp_path_factory) -> Path:
    """A folder in which the names that pages use are of small things; configs/ are the repository's, shrunk."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        (folder / "configs" / path.name).write_text(CONFIG.format(path=str(path), folder=str(path.parent)))
    names = {"data/valid": "valid", "data/pile_text_document": "train", "data/pythia/document": "train"}
    names["data/pile_0.87_deduped_text_document"] = "train"
    for name, source in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for kind in ("bin", "idx"):
            shutil.copy(data / f"{source}.{kind}", folder / f"{name}.{kind}")
    for name in ("tokenizer.json", "data/20B_tokenizer.json"):
        shutil.copy(data / "tokenizer.json", folder / name)
    (folder / "text").mkdir()
    for name in ("errors", "tree"):
        shutil.copy(ROOT / "neox_jax" / f"{name}.py", folder / "text" / f"{name}.txt")
    shutil.copy(folder / "text" / "tree.txt", folder / "heldout.txt")
    chat = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(200)]
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "def f{i}("}}\n' for i in range(5)))
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chat))

    tokenizer, model = neox_jax.load_tokenizer(folder / "tokenizer.json"), init_model(TINY, seed=1)
    for name in ("pythia-70m", "pythia-160m", "gpt-neox-20b", "pythia-2.8b/step0", "pythia-2.8b/step1"):
        neox_jax.save_model(model, folder / "EleutherAI" / name, tokenizer=tokenizer)
    neox_jax.save_model(model, folder / "20B_checkpoints", format="neox", tensor_parallel=2)
    step = folder / "20B_checkpoints" / (folder / "20B_checkpoints" / "latest").read_text().strip()
    step.rename(step.with_name("global_step150000"))
    (folder / "20B_checkpoints" / "latest").write_text("global_step150000")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_programs_run(page, home, tmp_path, monkeypatch):
    folder = shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(folder)
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.mark:
            continue
        if block.language == "python":
            exec(compile("\n".join(block.lines), block.place, "exec"), names)
        for line in block.commands():
            for theirs, ours in SMALLER.items():
                line = line.replace(theirs, ours)
            program, *arguments = shlex.split(line, comments=True)
            assert program == "neox-jax", f"{block.place}: {line!r} is not run here; say before the fence what it needs"
            assert main(arguments) == 0, f"{block.place}: {line}"


@functools.cache
def help_of(*verb: str) -> str:
    done = subprocess.run([sys.executable, "-m", "neox_jax.cli", *verb, "--help"], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_is_there(page):
    """Verbs and options, targets of make, files and imports."""
    for block in blocks(page):
        if not block.mark:
            continue
        assert block.mark in REASONS, f"{block.place}: {block.mark!r} is no reason; wanted one of {REASONS}"
        if block.language == "python":
            imports = [
                n for n in ast.walk(ast.parse("\n".join(block.lines))) if isinstance(n, (ast.Import, ast.ImportFrom))
            ]
            exec(compile(ast.Module(imports, []), block.place, "exec"), {})
            continue
        for line in block.commands():
            check_words(line.split("  #")[0], block.place)


def check_words(line: str, place: str) -> None:
    for name in re.findall(r"^make (\S+)", line):
        done = subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{place}: {done.stderr}"
    for name in re.findall(r"\b(?:python|bash) ([a-z_]+/\S+)", line):
        assert (ROOT / name).is_file(), f"{place}: there is no {name}"
    for extra in re.findall(r"\[([a-z,]+)\]\"", line) if line.startswith("pip") else ():
        assert all(f'"{name}":' in (ROOT / "setup.py").read_text() for name in extra.split(",")), f"{place}: {extra}"
    if "neox-jax " not in line:
        return
    command = line.split("neox-jax ", 1)[1]
    verb, *rest = command.split()
    text = help_of(verb)
    assert text, f"{place}: there is no verb {verb}"
    if verb in ("data", "checkpoint", "bench"):
        assert re.search(rf"[{{,| ]{rest[0]}[}},| ]", text), f"{place}: {verb} has no {rest[0]}"
    text = help_of(verb, rest[0]) if verb == "data" else text
    for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)(?!\S*\.)", command):
        assert re.search(rf"{option}\b(?!-)", text), f"{place}: {verb} has no {option}"
    for section, field in re.findall(r"--config\.([a-z]{2,})\.([a-z_0-9]{2,})", command):
        assert field in {f.name for f in dataclasses.fields({**SECTIONS, "model": ModelConfig}[section])}, line


def test_most_commands_run():
    counts = {"run": 0, **dict.fromkeys(REASONS, 0)}
    for block in (block for page in PAGES for block in blocks(page)):
        counts[block.mark or "run"] += len(block.commands()) or (block.language == "python")
    print(counts)
    assert counts["run"] > sum(counts.values()) / 2, counts
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [theirs for theirs in SMALLER if theirs not in text] == []


def defaults() -> dict[str, object]:
    """Every field of a configuration, with its default."""
    found = {"model.preset": "", "init_from": ""}
    for name, section in {"model": ModelConfig, **SECTIONS}.items():
        found |= {f"{name}.{field.name}": field.default for field in dataclasses.fields(section)}
    assert {name.split(".")[0] for name in found} == {field.name for field in dataclasses.fields(Config)}
    return found


def test_the_table_of_fields_is_the_configuration():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("### Every field")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| `(.+?)` \| ", table, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(dict(rows)), "a field is there twice"
    assert {name: ast.literal_eval(value) for name, value in rows} == defaults()


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## Two journeys")[0]
    table, *within = text.split("\nWithin ")
    parts = {"": table, **{part.split("`")[1]: part for part in within}}
    for folder, part in parts.items():
        files = (ROOT / "neox_jax" / folder).glob("*.py")
        there = {path.name for path in files if path.name != "__init__.py"}
        named = set(re.findall(r"`([a-z_]+\.py)`", part))
        assert there == named, f"of neox_jax/{folder}"
    folders = {f"{path.name}/" for path in (ROOT / "neox_jax").iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(parts) - {""}


def slugs(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if re.match("https?://", target):
            continue
        if not path.exists() or (anchor and anchor not in slugs(path)):
            missing.append(target)
    ours = "docs|benchmarks|configs|tests|neox_jax|launch|notebooks"
    for name in re.findall(rf"`((?:{ours})/[\w./-]+)`", text):
        if not any((ROOT / f"{name}{kind}").exists() for kind in ("", ".example")):  # a user makes one of an example
            missing.append(name)
    assert not missing


def test_the_site_builds(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for page in LINKED:
        built = tmp_path / (
            "index.html" if page == "README.md" else page.replace("README", "index").replace(".md", ".html")
        )
        html = built.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|link|img)[^>]*"https?:', html), f"{page} fetches from elsewhere"
