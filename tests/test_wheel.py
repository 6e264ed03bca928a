"""The built wheel works where there is no checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperlora.patch import Patch

from .conftest import TEXT

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = wheels.glob("hyperlora-*-py3-none-any.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    return site


def outside(site: Path, cwd: Path, *arguments: object) -> str:
    """Stdout of Python with the installed wheel, from a folder that is no checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_generates_a_patch(site: Path, tmp_path: Path, tiny_dirs: tuple[str, str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["text.txt", "-o", "patch", "--generator", tiny_dirs[1], "--base", tiny_dirs[0]]
    out = outside(site, tmp_path, "-m", "hyperlora", "generate", *arguments)
    assert out.startswith("patch: ") and "tokens read" in out
    assert Patch.load(tmp_path / "patch").rank == 6
    assert outside(site, tmp_path, site / "bin" / "hyperlora", "--version").startswith("hyperlora ")


def test_wheel_holds_the_package_and_its_data_only(site: Path, tmp_path: Path) -> None:
    where = "import hyperlora, hyperlora.data.facts as facts; print(hyperlora.__file__, facts.__file__)"
    assert outside(site, tmp_path, "-c", where).split() == [
        str(site / "hyperlora" / "__init__.py"),
        str(site / "hyperlora" / "data" / "facts.py"),
    ]
    tracked = subprocess.run(["git", "ls-files", "hyperlora"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:  # an unpacked source archive has no list of files to compare with
        pytest.skip("not a git checkout")
    installed = {str(path.relative_to(site)) for path in (site / "hyperlora").rglob("*") if path.suffix != ".pyc"}
    assert set(tracked.stdout.split()) <= installed
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"hyperlora", "bin"}
