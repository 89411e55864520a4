"""The package as users get it: light to import, and whole as a wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, *arguments: object, flags: str = "-q", cwd: Path = ROOT) -> str:
    command = [sys.executable, flags, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    loaded = python("import sys, q3mega, q3mega.cli; print(*sys.modules)").split()
    assert {"torch", "numpy", "pydantic"}.isdisjoint(loaded)


def test_public_names_come_when_asked_for():
    import q3mega
    from q3mega import ops
    from q3mega.config.recipe import Recipe
    from q3mega.launch.driver import run

    assert (q3mega.run, q3mega.Recipe, q3mega.ops) == (run, Recipe, ops)
    assert not hasattr(q3mega, "anything_else")


def test_the_checkout_hides_no_package_called_kernels(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    code = "import sys; sys.path[:0] = sys.argv[1:]; import kernels as k; print(k.__file__)"
    found = python(code, ROOT, tmp_path, flags="-IS")
    assert Path(found.strip()) == tmp_path / "kernels/__init__.py"


@pytest.mark.slow
def test_the_wheel_holds_everything_and_runs(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("q3mega", "kernels", "csrc"):
        unbuilt = shutil.ignore_patterns("__pycache__", "*.so", "confine")
        shutil.copytree(ROOT / name, source / name, ignore=unbuilt)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    wheels = ["wheel", "--no-build-isolation", *offline, "--wheel-dir", tmp_path, source]
    subprocess.run([*pip, *wheels], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", target, wheel], check=True)

    ours = {p.relative_to(source).as_posix() for p in (source / "q3mega").rglob("*.*")}
    ours |= {f"q3mega/kernels/{p.name}" for p in (source / "kernels/triton").glob("*.py")}
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in ours if name.endswith((".py", ".jinja"))} <= files
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in files)

    code = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, q3mega._data, q3mega.kernels
print(q3mega._data.__file__, q3mega.kernels.__file__, sep="\\n")
assert [b.tolist() for b in q3mega._data.best_fit_pack(numpy.array([3, 5]), 8)] == [[1, 0]]
"""
    found = python(code, target, cwd=tmp_path).split()
    if sys.platform == "linux":  # the sandbox's launcher comes as a program that can be started
        confine = subprocess.run([target / "q3mega/confine"], capture_output=True, check=False)
        assert b"refused options" in confine.stderr
    assert all(Path(path).is_relative_to(target) for path in found)


HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{module}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
sys.argv[1:] = {arguments}
"""


@pytest.mark.parametrize(
    ("module", "arguments", "package", "extra"),
    [
        ("pydantic", ["run", "x.yaml"], "pydantic", "recipe"),
        ("rensa", ["curate", "x.yaml", "--out", "x"], "rensa", "curate"),
        ("yaml", ["plan", "x.yaml"], "pyyaml", "recipe"),
    ],
)
def test_a_command_without_its_extra_names_it(module, arguments, package, extra):
    code = HIDE.format(module=module, arguments=arguments)
    code += "from q3mega.cli import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    remedy = f"pip install 'q3mega[{extra}]'"
    error = f"error: q3mega {arguments[0]} needs the package {package}: {remedy}\n"
    assert (done.returncode, done.stderr) == (2, error)


@pytest.mark.parametrize(
    ("line", "user"),
    [("import q3mega.engine", "q3mega.engine"), ("from q3mega import run", "q3mega.run")],
)
def test_an_import_without_its_extra_names_it(line, user):
    code = HIDE.format(module="psutil", arguments=[])
    code += f"try:\n    {line}\nexcept ImportError as error:\n    print(error)"
    error = f"{user} needs the package psutil: pip install 'q3mega[recipe]'\n"
    assert python(code) == error


def test_the_operators_import_torch_alone():
    """Every package of the extras is hidden, and the operators work."""
    code = """
import sys
from q3mega.errors import _OF_RECIPE

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in _OF_RECIPE.keys() - {"numpy", "sympy", "jinja2"}:  # torch's own
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
import torch
from q3mega import ops
print(ops.linear_logprob(torch.zeros(1, 2), torch.zeros(4, 2), torch.tensor([3])).logprob.exp())
"""
    assert "0.25" in python(code)
