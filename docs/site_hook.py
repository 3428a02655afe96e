"""For mkdocs: pages that stand beside docs/ in the repository are part of the site, and links between both hold."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("README.md", "CHANGELOG.md", "benchmarks/README.md", "launch/*", "notebooks/*")


def on_files(files, config):
    """Gives every file its path in the repository, so that relative links mean in the site what they mean there."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # and not of the theme
            files.remove(file)
            _add(files, config, f"docs/{file.src_uri}")
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                _add(files, config, path.relative_to(ROOT).as_posix())
    return files


def _add(files, config, name: str) -> None:
    files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
