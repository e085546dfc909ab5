"""The rules of the house that no linter knows, and proof that the linters' rules bite."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("models", "pipelines", "jobs")
SOURCES = sorted(file for folder in CODE for file in (ROOT / folder).rglob("*.py"))
LONGEST_FILE = 300
LONGEST_FUNCTION = 60
LONGEST_LOOP = 90  # a training loop reads top to bottom
LOOPS = ("pipelines/training/prior_loop.py", "pipelines/training/stage_one_loop.py")
MAIN = '__name__ == "__main__"'
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imported_by(file: Path) -> set[str]:
    """Top-level names of all absolute imports in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def canonical(requirement: str) -> str:
    name = re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_a_file_is_a_room_not_a_warehouse(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= LONGEST_FILE
    longest = LONGEST_LOOP if name_of(file) in LOOPS else LONGEST_FUNCTION
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < longest, node.name


def test_no_file_has_a_name_that_says_nothing() -> None:
    forbidden = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [name_of(file) for file in SOURCES if file.name in forbidden]


def test_the_tests_shadow_no_package() -> None:
    assert not {entry.name for entry in (ROOT / "tests").iterdir()} & set(CODE)


def test_models_know_torch_and_nothing_else() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "models"}
    for file in (ROOT / "models").rglob("*.py"):
        assert imported_by(file) <= allowed, name_of(file)
        assert "torch.distributed" not in file.read_text(), name_of(file)


def test_what_runs_as_main_defines_no_class() -> None:
    """Workers would know it under another name than the driver."""
    for file in (ROOT / "jobs").glob("*.py"):
        source = file.read_text()
        if MAIN in source:
            classes = [n.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)]
            assert not classes, name_of(file)


def test_nothing_waits_with_what_forgets_that_it_was_cancelled() -> None:
    """Python 3.11's `wait_for` does, if its work ends just then; `asyncio.timeout` does not."""
    assert not [name_of(file) for file in SOURCES if "asyncio.wait_for" in file.read_text()]


def test_the_list_of_verbs_that_must_not_import_each_other_is_whole() -> None:
    contracts = SETTINGS["tool"]["importlinter"]["contracts"]
    (listed,) = (c["modules"] for c in contracts if c["type"] == "independence")
    files = (ROOT / "jobs").glob("*.py")
    verbs = [f"jobs.{file.stem}" for file in files if MAIN in file.read_text()]
    assert sorted(verbs) == sorted(listed)


def test_every_import_is_declared_and_every_declaration_is_pinned() -> None:
    extra = PROJECT["optional-dependencies"]["report"]
    declared = {canonical(requirement) for requirement in [*PROJECT["dependencies"], *extra]}
    distributions = packages_distributions()
    for file in SOURCES:
        for module in imported_by(file) - set(sys.stdlib_module_names) - set(CODE):
            owners = {canonical(owner) for owner in distributions.get(module, [module])}
            assert owners & declared, f"{name_of(file)} imports {module}"
    extras = PROJECT["optional-dependencies"].values()
    declared |= {canonical(requirement) for extra in extras for requirement in extra}
    assert declared <= {canonical(line) for line in constraints()}


def test_constraints_are_exact_versions_that_any_machine_can_find() -> None:
    for line in constraints():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No output, no file, no log handler, no thread, no change of the environment, no Ray."""
    modules = [
        name_of(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in SOURCES
        if file.parts[-2] != "jobs"  # they import Ray and MLflow, which change the environment
    ]
    script = (
        "import importlib, logging, os, sys, threading\n"
        "before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "ours = {key for key in set(before) ^ set(os.environ)}\n"
        "assert not logging.getLogger().handlers\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert 'ray' not in sys.modules and 'mlflow' not in sys.modules\n"
        "print(sorted(key for key in ours if key.startswith(('RAY_', 'MLFLOW_', 'MANRAY_'))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert not list(tmp_path.iterdir())


def test_only_those_who_train_wait_for_what_trains() -> None:
    """FSDP and DTensor are about a second and 50 MB of every process that imports them."""
    configs = [f"jobs.configs.{file.stem}" for file in (ROOT / "jobs/configs").glob("[a-z]*.py")]
    loaders = ["jobs.picture_stream", "pipelines.training.pair_loader", "jobs.encoding_actors"]
    servers = ["jobs.serving_application", "pipelines.sampling.batch_process"]
    script = (
        "import importlib, sys\n"
        f"for module in {[*configs, *loaders, *servers]}:\n"
        "    importlib.import_module(module)\n"
        "    for heavy in ('torch.distributed.fsdp', 'torch.distributed.tensor'):\n"
        "        assert heavy not in sys.modules, (module, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("models/x.py", "import pipelines.data.storage", "never upward"),
        ("pipelines/x.py", "import jobs.runtime", "never upward"),
        ("pipelines/x.py", "import ray.data", "ray only in jobs"),
        ("models/x.py", "import numpy", "models know torch only"),
        ("jobs/x.py", "import mlflow", "mlflow only"),
        ("pipelines/data/x.py", "def f():\n    import img2dataset.resizer", "img2dataset only"),
        ("pipelines/data/x.py", "import boto3", "S3 only"),
        ("jobs/sample.py", "import jobs.train_tokenizer", "never import each other"),
    ],
)
def test_the_import_contracts_bite(file: str, line: str, contract: str, tmp_path: Path) -> None:
    for folder in CODE:
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.parquet")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / file).write_text(f"{line}\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    broken = [row for row in done.stdout.splitlines() if " BROKEN" in row]
    assert done.returncode == 1
    assert [row for row in broken if contract in row], done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("models/x.py", "import os\n\nHOME = os.environ['HOME']"),
        ("pipelines/data/x.py", "import os\n\nHOME = os.getenv('HOME')"),
    ],
)
def test_the_environment_is_read_in_jobs_only(file: str, line: str) -> None:
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "ruff", "check", "--no-cache"),
            *("--stdin-filename", ROOT / file, "-"),
        ],
        input=line + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "TID251" in done.stdout


def test_make_without_a_target_lists_every_target() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in (
        "help",
        "setup",
        "peers",
        "quickstart",
        "check",
        "test",
        "chaos",
        "bench",
        "clean",
    ):
        assert f"make {target} " in done.stdout


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "setup", "PYTHON=/no/such/python"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or 3.12" in done.stderr
    assert "/no/such/python is not it" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_clean_deletes_nothing_of_the_user(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==0\n")
    for name in ("runs/mine/model", "models/mine.txt", ".venv/bin/python", "jobs/__pycache__/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("kept")
    for folder in ("pipelines", "tests"):
        (tmp_path / folder).mkdir()
    subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, check=True)
    kept = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert {"runs/mine/model", "models/mine.txt", ".venv/bin/python"} <= kept
    assert "jobs/__pycache__/x" not in kept
