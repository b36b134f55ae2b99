"""Keep what `examples/` and the documentation show true.

    python examples/refresh.py             # write the repository's address of pyproject.toml wherever one stands
    python examples/refresh.py --execute   # and run the notebooks, and store what they show

The address is `Repository` under `[project.urls]` in pyproject.toml. Names after `--execute` choose notebooks.
"""

import argparse
import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "examples" / "notebooks"
ADDRESS = re.compile(
    r"(?<=github\.com/)[\w.-]+/flowrl-trainers|(?<=colab\.research\.google\.com/github/)[\w.-]+/flowrl-trainers"
)
"""Owner and name of this repository, in its address and in that of a notebook on Colab."""
NOT_RUN = "stable_diffusion_3_5_t4"  # needs a GPU and the published weights


def repository() -> str:
    """The address of the repository."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def bearers() -> list[Path]:
    """The files that bear the address."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    files = [*NOTEBOOKS.glob("*.ipynb"), *(ROOT / "examples" / "scripts").glob("*.py"), *pages]
    return [path for path in sorted(files) if ADDRESS.search(path.read_text(encoding="utf-8"))]


def write_address() -> None:
    """Write the repository's address into all files that bear one."""
    owner_and_name = repository().removeprefix("https://github.com/")
    for path in bearers():
        text = path.read_text(encoding="utf-8")
        if (current := ADDRESS.sub(owner_and_name, text)) != text:
            path.write_text(current, encoding="utf-8")


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def digest(notebook: Any) -> str:
    """A digest of the code that stored outputs come from: all of it but the installation."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "install" not in tags(cell)]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells but the installation in a folder, and keep their outputs.

    Args:
        notebook: The notebook, which is changed.
        folder: The current folder of the run.
    """
    install = [cell for cell in notebook.cells if "install" in tags(cell)]
    kept = [cell.source for cell in install]
    for cell in install:
        cell.source = ""
    settings = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=3600, iopub_timeout=60, kernel_name="python3", resources=settings).execute()
    for cell, source in zip(install, kept, strict=True):
        cell.source = source


def tidy(notebook: Any) -> None:
    """Leave what a reader sees: no warnings, no times, no kernel of this machine."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed_source": digest(notebook),
    }
    for cell in notebook.cells:
        cell.metadata = {"tags": tags(cell)} if tags(cell) else {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                output.get("metadata", {}).clear()
                if output.output_type == "execute_result":
                    output.execution_count = None
                data = output.get("data", {})
                if "text/html" in data:  # the time of a progress bar is that of a machine with other work
                    data["text/html"] = re.sub(r"(\[\d+/\d+) [\d:]+,", r"\1,", data["text/html"])


def main() -> None:
    """Write the address, and run notebooks if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execute", nargs="*", metavar="NAME", help="run these notebooks; all without a name")
    names = parser.parse_args().execute
    write_address()
    if names is None:
        return
    import tempfile

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.stem == NOT_RUN or (names and path.stem not in names):
            continue
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
