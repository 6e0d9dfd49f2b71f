"""What the docs tell to type exists: commands with their options, scripts, files, links, and names that Python imports."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from whichlora.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/decisions/*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
#: Folders of the tree, by which a path in the text is known as one.
FOLDERS = "benchmarks|calibration|deploy|docs|estimators|examples|profiles_db|tests|whichlora"
#: Files that the page on extending has its reader make.
MADE = ("families/seed_oss.py", "methods/ln_tuning.py", "golden_seed_oss.jsonl", "golden_ln_tuning.jsonl")


def code(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the blocks of code of a page, fenced ones with their language, indented ones as shell."""
    text = page.read_text(encoding="utf-8")
    fences = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    yield from fences.findall(text)
    for block in re.findall(r"(?:^    \S.*\n)+", fences.sub("", text), re.MULTILINE):
        yield "console", block


def commands(page: Path, beginning: str) -> list[list[str]]:
    """Return the words of the commands that begin alike, up to a pipe, a redirection or a script of the user's own."""
    found = []
    for language, block in code(page):
        for line in block.replace("\\\n", " ").splitlines() if language != "python" else ():
            words = line.strip().removeprefix("$ ")
            if words.startswith(beginning):
                found.append(re.split(r" (?:[|>]|--) ", f"{words} ")[0])
    inline = re.findall(rf"`({beginning}[^`]*)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    return [shlex.split(each, comments=True) for each in [*found, *inline] if "…" not in each]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_there_with_their_options(page: Path) -> None:
    """Every `whichlora` command of a page parses: the command, its subcommand and each option exist."""
    for words in commands(page, "whichlora "):
        command: click.Command = main
        context, rest = click.Context(main, info_name="whichlora"), words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            child = command.get_command(context, rest[0])
            assert child is not None, words
            command, context, rest = child, click.Context(child, info_name=rest[0], parent=context), rest[1:]
        context.resilient_parsing = True  # a page may name a command without its arguments
        command.make_parser(context).parse_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_scripts_are_there_with_their_options(page: Path) -> None:
    """Every script that a page runs exists, and its source names each option."""
    for words in commands(page, "python "):
        name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        if re.match(FOLDERS, name):
            source = (ROOT / name).read_text(encoding="utf-8")
            assert [word for word in words if word.startswith("--") and word.split("=")[0] not in source] == [], words


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    """Relative links, and paths in the text that begin with a folder of the tree, are files or folders of it."""
    text = page.read_text(encoding="utf-8")
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    paths = [ROOT / path for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text) if not path.endswith(MADE)]
    # what Transformers has under the same name is no folder of ours
    assert [str(path) for path in [*links, *paths] if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_names_that_python_imports_are_there(page: Path) -> None:
    """Every block of Python is Python, and what it imports of ours is there."""
    for language, block in code(page):
        tree = ast.parse(block) if language == "python" else ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("whichlora"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], node.module
