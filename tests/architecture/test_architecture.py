"""The limits and rules that keep the code readable."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import ROOT

PACKAGES = ["conf", "kernels", "observe", "parallel", "data", "checkpoint", "models", "trainer", "scripts"]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BIN = Path(sys.executable).parent


def run(*line):
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "line",
    [
        [BIN / "ruff", "check", "."],
        [BIN / "ruff", "format", "--check", "."],
        [BIN / "lint-imports"],
        [BIN / "pyright", "--pythonpath", sys.executable],
    ],
    ids=lambda line: " ".join([line[0].name, *line[1:2]]),
)
def test_checks_pass(line):
    done = run(*map(str, line))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    limit = 150 if path.is_relative_to(ROOT / "kernels") else 60
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < limit, node.name


def test_every_package_is_linked_and_checked():
    links = {path.name for path in (ROOT / "src" / "shardwright").iterdir() if path.is_symlink()}
    assert links == set(PACKAGES)
    for name in PACKAGES:
        assert (ROOT / "src" / "shardwright" / name).resolve() == ROOT / name
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["pyright"]["include"]) == set(PACKAGES)


def test_scripts_do_not_shadow_the_standard_library():
    assert not {path.stem for path in (ROOT / "scripts").glob("*.py")} & sys.stdlib_module_names


def test_conf_loads_without_torch():
    code = (
        "import sys, shardwright.conf.load as l; l.load_config(); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).stdout.split() == ["False", "False"]


def test_the_readme_names_the_test_command_that_ci_runs():
    assert "make test" in (ROOT / "README.md").read_text()
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)


def test_documented_settings_exist():
    """Every `group.key=` in README and docs is a key of the composed config."""
    import yaml

    from shardwright.conf.load import load_config, to_dict

    known = set()
    others = ["recompute=selective"], ["recompute=budget", "recompute.gib=1"], ["schedule=cosine"]
    for overrides in (["data=stdlib"], ["data=files", "data.path=x"], ["data=hub", "data.name=x"], *others):
        for group, keys in to_dict(load_config(overrides)).items():
            known |= {f"{group}.{key}" for key in keys}
    assert "train.num_steps" in known
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        for group, key in re.findall(r"(?<![\w./])([a-z]+)\.([a-z_]+)=", text):
            if group in to_dict(load_config()):
                assert f"{group}.{key}" in known, f"{path.name}: {group}.{key}"
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
            assert yaml.safe_load(block)
