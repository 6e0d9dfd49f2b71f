"""The wheel that users install, without the checkout and without the training stack; and docs that are current."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.waiting import answers, free_ports, until
from tests.browsing import quiet_page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment of its own that holds the wheel and what it depends on, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", str(ROOT), "--no-deps", "-w", str(folder)], check=True)
    (wheel,) = folder.glob("whichlora-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "-q", "--disable-pip-version-check", "install", str(wheel)], check=True)
    return folder / "env" / "bin"


def test_a_wheel_predicts_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """Data files travel with the wheel, and predicting needs no torch."""
    command = [str(installed / "whichlora"), "estimate", "gpt2", "--gpu", "l4", "--json", "--offline"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["predictions"][0]["process_bytes"] > 0
    probe = "import importlib.util as u; assert not u.find_spec('torch'); import whichlora; print(whichlora.__file__)"
    done = subprocess.run([installed / "python", "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout


def test_a_wheel_picks_from_another_folder(installed: Path, tmp_path: Path) -> None:
    """The main job, end to end: a config in, a choice and two files out."""
    config = tmp_path / "mine.yaml"
    config.write_text("gpu: l4\nstage1_profile: {model_names: [gpt2]}\nstage2_profile: {batch_size: [1]}\n")
    command = [str(installed / "whichlora"), "pick", config.name, "--out", "out", "--offline"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Choice: " in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "report.html"}


def test_every_command_is_documented() -> None:
    """The page of the command line names each command with its help."""
    from whichlora.cli import COMMANDS

    page = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert f"## whichlora {name}" in page


@pytest.mark.parametrize(
    "page",
    [
        ("", "configurations predicted"),
        ("compare", "Side by side"),
        ("cards/l4", "Measured here"),
        ("calibration", "Held-out errors"),
    ],
)
def test_a_wheel_serves_its_pages(browser: Any, served: str, page: tuple[str, str]) -> None:
    """Pages, styles and scripts travel with the wheel: each view shows what it is for, without an error."""
    path, text = page
    with quiet_page(browser, lambda url: url.startswith((served, "data:", "blob:"))) as found:
        found.goto(f"{served}{path}")
        found.get_by_text(text).first.wait_for()
        style = "getComputedStyle(document.querySelector('.bar')).display"
        assert found.evaluate(style) == "flex"
        if not path:
            found.locator("#plot .scatterlayer .point").first.wait_for()


@pytest.fixture(scope="module")
def served(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the server of the installed wheel, with its extra, from a folder of its own."""
    folder = tmp_path_factory.mktemp("served")
    (wheel,) = installed.parents[1].glob("whichlora-*.whl")
    pip = [str(installed / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, f"{wheel}[serve]"], check=True)
    (port,) = free_ports()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "whichlora"), "serve", "--db", "store.duckdb", "--port", str(port), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=folder, env=environ)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), "the server does not answer")
        yield f"http://127.0.0.1:{port}/"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
