"""Which modules of the package import which, read from the source. Imports inside functions count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import verl_sspo

PACKAGE = Path(verl_sspo.__file__).parent
FILES = {
    ".".join(("verl_sspo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if "recipes" not in path.relative_to(PACKAGE).parts
}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports that module; `from module import name` imports only `module`.
            found |= {
                inner if (inner := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names
            }
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}


def reached_from(*rooms: str) -> set[str]:
    waiting = [name for name in FILES if name.split(".")[1:2] and name.split(".")[1] in rooms]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += GRAPH[name]
    return seen


def test_the_graph_is_read():
    assert "verl_sspo.algorithm.gates" in GRAPH["verl_sspo.algorithm.loss"]
    assert "verl_sspo.algorithm.kernel" in GRAPH["verl_sspo.algorithm.loss"]  # inside a function
    assert "verl_sspo.doctor.rules" in reached_from("run")


def test_training_imports_neither_diagnosis_nor_studies():
    training = reached_from("plugin", "config", "algorithm", "rewards", "hf", "cpu")
    rooms = {name.split(".")[1] for name in training if "." in name}
    assert rooms & {"doctor", "analysis", "experiments", "benchmark", "report", "run", "quickstart"} == set()


def test_the_rollout_hf_does_not_depend_on_the_platform_cpu():
    assert not [name for name in reached_from("hf") if name.startswith("verl_sspo.cpu")]


def test_no_file_is_part_of_an_import_cycle():
    tuple(TopologicalSorter(GRAPH).static_order())  # graphlib.CycleError names the cycle
