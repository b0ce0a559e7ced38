"""The command line: every command has help, and a missing extra is reported in one line."""

import errno
import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from verl_sspo.cli import COMMANDS, extra_with, main

# The packages that a training imports, in the driver and in its workers.
BASE = ("plugin", "algorithm", "rewards", "hf", "cpu", "run", "doctor")
# In this package, imports of packages that only an extra installs raise. Other packages may import them.
WITHOUT_EXTRAS = """
import builtins, importlib, pkgutil, sys
without = set(sys.argv[1].split(","))
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    root = name.partition(".")[0]
    if level == 0 and root in without and (globals or {}).get("__name__", "").startswith("verl_sspo"):
        raise ModuleNotFoundError(f"No module named {root!r}", name=root)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
"""


def of_extras(*extras: str) -> set[str]:
    """Packages that these extras install and the base does not."""
    needed = list(map(Requirement, requires("verl-sspo")))
    base = {each.name for each in needed if each.marker is None}
    return {each.name for each in needed for extra in extras if f'"{extra}"' in str(each.marker)} - base


def without_extras(code: str, *extras: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code, ",".join(of_extras(*extras))]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_extras_are_told_from_the_base():
    assert {"matplotlib", "datasets"} <= of_extras("report", "data")
    packages = ("matplotlib", "datasets", "pytest", "torch", "verl", "no-such-package")
    assert [extra_with(package) for package in packages] == ["report", "data", "test", None, None, None]


def test_a_training_needs_no_extra():
    code = f"""
modules = ["verl_sspo." + name for name in {BASE}]
for name in modules:
    module = importlib.import_module(name)
    for each in pkgutil.iter_modules(getattr(module, "__path__", []), name + "."):
        if not each.name.endswith(("cpu.vllm_cpu", "algorithm.kernel")):
            importlib.import_module(each.name)
try:
    import verl_sspo.report.style
except ModuleNotFoundError as error:
    print("hidden", error.name)
"""
    done = without_extras(code, "report", "data")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["hidden", "matplotlib"]


@pytest.mark.parametrize(("command", "extra"), [("quickstart", "report"), ("prepare-data", "data")])
def test_a_missing_extra_is_one_line(command, extra):
    done = without_extras(f"from verl_sspo.cli import main; sys.exit(main([{command!r}]))", extra)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"verl-sspo {command} needs ")
    assert last.endswith(f": pip install 'verl-sspo[{extra}]'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["verl-sspo"])
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "trian" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/curves.png")

    monkeypatch.setattr("importlib.import_module", full)
    assert main(["quickstart"]) == 1
    assert capsys.readouterr().err == "verl-sspo: [Errno 28] No space left on device: 'runs/a/curves.png'\n"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    """Also while a command is imported. Here the import itself is interrupted."""

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    monkeypatch.setattr(sys, "argv", ["verl-sspo"])
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "\nverl-sspo: interrupted\n"


@pytest.mark.parametrize("package", ["benchmark", "data", "doctor", "quickstart"])
def test_a_package_is_no_second_way_to_a_command(package):
    command = [sys.executable, "-m", f"verl_sspo.{package}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "cannot be directly executed" in done.stderr
    assert "Traceback" not in done.stderr


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "verl_sspo", "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
