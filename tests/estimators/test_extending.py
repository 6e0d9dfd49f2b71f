"""The page on extending, followed to the letter in a copy of the tree: its code runs, and the laws run over it at once.

Source of golden_extending.jsonl: rehearsals of the page's examples, as every golden file's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
EVIDENCE = Path(__file__).with_name("golden_extending.jsonl")
ESTIMATORS = "estimators/whichlora_estimators"
TESTS = "tests/estimators"
#: What laws of the registry say of what is new, by the file that they stand in.
LAWS = {
    "test_estimate.py": ("seed_oss-train", "seed_oss-generate", "ln-tuning"),
    "test_setups.py": ("adamw-amsgrad", "golden"),
    "methods": ("ln-tuning", "golden"),
    "families/test_names.py": ("golden_seed_oss",),
    "families/test_seed_oss.py": ("test_golden_cases",),
}


def follow(tree: Path) -> list[str]:
    """Do what the page says; return the files of code that it changed."""
    changed = []
    for kind, text in re.findall(r"```(python|json)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if kind == "json":
            models = tree / ESTIMATORS / "data/models.json"
            models.write_text(json.dumps({**json.loads(models.read_text()), **json.loads(text)}))
            continue
        name, _, code = text.partition("\n")
        path = tree / name.removeprefix("# ")
        path.write_text((path.read_text() + "\n\n" if path.exists() else "") + code)
        changed.append(path.name)
    return changed


def give_evidence(tree: Path) -> None:
    """Put the golden cases where the page wants them, and the family's test."""
    lines = EVIDENCE.read_text(encoding="utf-8").splitlines(keepends=True)
    kinds = ("families/golden_seed_oss.jsonl", "seed-oss"), ("methods/golden_ln_tuning.jsonl", "ln-tuning")
    for name, begins in (*kinds, ("golden_setups.jsonl", "amsgrad")):
        with (tree / TESTS / name).open("a", encoding="utf-8") as file:
            file.writelines(line for line in lines if json.loads(line)["id"].startswith(begins))
    test = (tree / TESTS / "families/test_phi3.py").read_text()
    (tree / TESTS / "families/test_seed_oss.py").write_text(test.replace("golden_phi3", "golden_seed_oss"))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Copy the tree, follow the page, run the laws over what is new; return what they said."""
    tree = tmp_path_factory.mktemp("tree")
    for name in (ESTIMATORS, TESTS):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "test_extending.py"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    assert follow(tree) == ["seed_oss.py", "ln_tuning.py", "optimizers.py"]
    give_evidence(tree)
    paths = os.pathsep.join([str(tree / "estimators"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    wanted = "seed_oss or ln-tuning or ln_tuning or amsgrad or golden_setups"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", wanted]
    done = subprocess.run(
        [*command, *(f"{TESTS}/{name}" for name in LAWS)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.stack
def test_the_pages_examples_pass_the_laws_at_once(said: str) -> None:
    """The laws of each registry name the page's architecture, method and optimizer, and all of them hold."""
    for file, names in LAWS.items():
        for name in names:
            assert re.search(rf"{file}.*{name}.* PASSED", said), (file, name)
