"""The sdist, the wheel that is built from it, and the installed wheel: what they hold, and that it runs without Triton."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import resnet_kernels as rk

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools", minversion="77", reason="needs the setuptools that pyproject.toml names")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command, cwd, check=True, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def built(what, source, folder):
    """Builds an sdist or a wheel by the backend itself, which needs no network, and returns its path."""
    return folder / run(sys.executable, "-c", BUILD, f"build_{what}", str(folder), cwd=source).stdout.splitlines()[-1]


def tracked():
    """The repository's files, without what builds have left in the working tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone of the repository")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    return built("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [source] = folder.iterdir()
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel alone; PyTorch comes from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def package_files():
    return {name for name in tracked() if name.startswith("resnet_kernels/")}


def test_the_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert names >= package_files() - {"resnet_kernels/tuned/README.md"}
    assert names >= {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "setup.py", "PKG-INFO"}
    assert {name for name in names if name.endswith((".c", ".h"))} == {
        n for n in package_files() if n.endswith((".c", ".h"))
    }
    assert not {
        name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("tests", "benchmarks", "docs"))
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_no_sources_of_c(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("dist-info/METADATA"))).decode())
    own = {name for name in names if name.startswith("resnet_kernels/")}
    assert own >= {name for name in package_files() if name.endswith((".py", ".json", "py.typed"))}
    others = own - package_files()
    assert all(re.fullmatch(r"resnet_kernels/kernels/cpu/_convolution\.\w*\.?so|.*\.pyd", name) for name in others), (
        others
    )
    assert not {name for name in names if name.endswith((".c", ".h", ".md"))}
    info = f"resnet_kernels-{rk.__version__}.dist-info/"
    assert names - own == {name for name in names if name.startswith(info)} and f"{info}licenses/LICENSE" in names
    assert metadata["Version"] == rk.__version__ and metadata["License-Expression"] == "MIT"


WITHOUT_TRITON = """
import sys
import warnings
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest, **more: None if name.partition(".")[0] == "triton" else find_spec(name, *rest, **more)
)
warnings.simplefilter("error", RuntimeWarning)

import torch
import resnet_kernels as rk
from resnet_kernels.cli import main

print(rk.__file__)
model = rk.models.d2l_resnet18(3, 10, width=8, num_blocks=(1, 1)).eval()
x = torch.randn(2, 3, 32, 32)
fused = rk.fuse(model)
assert len(rk.explain(fused).fused) == 3 and bool(rk.verify(model, fused, x))
try:
    with torch.no_grad():
        rk.fuse(model, backend="triton")(x)
except RuntimeError as error:
    print(error)
print(main.main(["verify", "--model", "d2l_resnet18", "--device", "cpu", "--image-size", "32"]))
sys.exit(main.main(["verify", "--model", "d2l_resnet18", "--device", "cpu", "--image-size", "32", "--backend", "triton"]))
"""


@pytest.mark.slow
def test_the_wheel_runs_without_triton(installed, tmp_path):
    variables = {"PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    done = run(sys.executable, "-c", WITHOUT_TRITON, cwd=tmp_path, check=False, **variables)
    line = 'backend="triton" needs the package triton, which is not installed (it has no build for Windows or macOS)'
    path, said, *rest = done.stdout.splitlines()
    assert Path(path).parents[1] == installed and said == line and rest[-1] == "0", done.stderr
    assert done.stderr == f"error: {line}\n" and done.returncode == 2


@pytest.mark.slow
def test_the_wheels_kernels_and_tables_are_found(installed, tmp_path):
    text = run(sys.executable, "-m", "resnet_kernels", "env", cwd=tmp_path, PYTHONPATH=str(installed)).stdout
    if any(installed.glob("resnet_kernels/kernels/cpu/_convolution*")):
        assert "\nCPU kernels: ours" in text
    else:
        assert "\nCPU kernels: oneDNN's, since ours can't be used: they are not compiled" in text
    assert {path.name for path in (installed / "resnet_kernels" / "tuned").iterdir()} == {
        Path(name).name
        for name in package_files()
        if name.startswith("resnet_kernels/tuned/") and name.endswith(".json")
    }
