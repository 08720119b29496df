"""The wheel: it builds without network, carries the sample data and installs the command."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = ("pyproject.toml", "README.md", "LICENSE")
NEEDED_SETUPTOOLS = 77  # as in [build-system]


def setuptools_version() -> int:
    """The major version of the installed setuptools, 0 where there is none."""
    try:
        return int(metadata.version("setuptools").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built in a copy of the files that go into it."""
    if setuptools_version() < NEEDED_SETUPTOOLS:
        pytest.skip(f"building offline needs setuptools {NEEDED_SETUPTOOLS} or newer")
    source = tmp_path_factory.mktemp("source")
    for folder in ("minomni", "data_samples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for file in (*ROOT.glob("requirements*.txt"), *(ROOT / name for name in FILES)):
        shutil.copy(file, source)
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("minomni-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH that holds what pip unpacks from the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, cwd: Path, code: str, *arguments: str) -> str:
    """Run Python code with the installed package, away from the checkout -> its output."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_is_listed():
    """pyproject.toml lists the packages by hand, because the data folder is one of them."""
    folders = {file.parent for file in (ROOT / "minomni").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == names | {"minomni.data_samples"}


def test_the_wheel_holds_code_and_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "minomni").rglob("*.py")}
    samples = [file for file in (ROOT / "data_samples").rglob("*") if file.is_file()]
    data = {f"minomni/{file.relative_to(ROOT).as_posix()}" for file in samples}
    assert "minomni/data_samples/tiny/codec/model.safetensors" in data
    assert code <= names
    assert data <= names
    assert "minomni/notebook/player.js" in names
    assert not [name for name in names if name.startswith(("tests", "notebooks", "data_samples"))]


def test_the_wheel_depends_on_the_requirements(wheel):
    """The files of requirements, their comments left out; dev holds the other extras too."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    required = {line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist" in line}
    expected = set()
    for file, suffix in (
        ("requirements.txt", ""),
        ("requirements-dev.txt", '; extra == "dev"'),
        ("requirements-quantize.txt", '; extra == "dev"'),
        ("requirements-serve.txt", '; extra == "dev"'),
        ("requirements-tune.txt", '; extra == "dev"'),
        ("requirements-quantize.txt", '; extra == "quantize"'),
        ("requirements-serve.txt", '; extra == "serve"'),
        ("requirements-tune.txt", '; extra == "tune"'),
    ):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                expected.add(line.split("#")[0].split(";")[0].strip() + suffix)
    # Platforms of a package stand in brackets before the extra.
    required = {re.sub(r"; \(.*\) and ", "; ", line) for line in required}
    assert required == expected


def test_the_command_works_from_the_wheel(installed, tmp_path):
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "minomni = minomni.__main__:main" in entry_points.read_text(encoding="utf-8")
    code = "import sys; from minomni.__main__ import main; sys.exit(main())"
    shown = run_installed(installed, tmp_path, code, "--help")
    for name in ("train", "chat", "report", "bench"):
        assert name in shown


def test_an_installed_package_finds_its_data(installed, tmp_path):
    """Sample data lies in the package; runs go to the current directory."""
    code = "from minomni import paths; print(paths.data_samples(), paths.runs(), sep='\\n')"
    data_samples, runs = run_installed(installed, tmp_path, code).splitlines()
    assert Path(data_samples) == installed / "minomni" / "data_samples"
    assert Path(runs) == tmp_path / "runs"
