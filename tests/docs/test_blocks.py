"""What README and docs show works: every code block is run, every link leads somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest

from sign_fast.cli.main import cli, main
from tests.docs.blocks import FILES, ROOT, Block, blocks, commands, new_side
from tests.docs.given import give

LANGUAGES = {"python", "diff", "bash", "text", "json"}


@pytest.mark.parametrize("name", FILES)
def test_code_blocks_run(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / name)
    give(tmp_path, "\n".join(block.text for block in found))
    namespace = {"__name__": "__main__"}
    for block in found:
        assert block.language in LANGUAGES, f"{name}:{block.line}: {block.language}"
        if block.how.startswith("by "):
            _run_by_another_test(block)
        elif block.language in ("python", "diff"):
            text = new_side(block.text) if block.language == "diff" else block.text
            exec(compile("\n" * (block.line - 1) + text, name, "exec"), namespace)
        elif block.language == "bash":
            for environment, words in commands(block.text):
                with monkeypatch.context() as patch:
                    for key, value in environment.items():
                        patch.setenv(key, value)
                    _run(words, block, name)
        capfd.readouterr()


def _run_by_another_test(block: Block) -> None:
    """Scripts, options and make's targets must be named there."""
    test = (ROOT / block.how.removeprefix("by ")).read_text(encoding="utf-8")
    for environment, words in commands(block.text):
        assert words[0] in ("python", "make", "pip"), f"{words[0]} is not run by tests"
        told = [Path(word).stem for word in words if word.endswith(".py")]
        told += [word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")]
        told += words[1:2] if words[0] == "make" else []
        missing = [word for word in (*environment, *told) if word not in test.replace("-", "_")]
        assert told and not missing, f"{block.how} knows nothing of {missing} in {' '.join(words)}"


def _run(words: list[str], block: Block, name: str) -> None:
    where = f"{name}, {' '.join(words)}"
    if words[0] == "torchrun":
        words = ["sign-fast", *(word for word in words[words.index("sign_fast.cli") + 1 :] if word != "--")]
        assert block.how == "parsed", f"{where}: several processes are not started here"
    assert words[0] == "sign-fast", f"{where}: say who tests it"
    if block.how == "parsed":
        command = cli.get_command(click.Context(cli), words[1])
        assert command is not None, where
        command.make_context(words[1], words[2:])
        return
    if block.how == "dry run":
        words = [*words, "--dry-run"]
    else:
        assert not block.how, f"{where}: {block.how}?"
    try:
        main(words[1:])
    except SystemExit as ended:
        assert not ended.code, f"{where}: exit status {ended.code}"


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {_anchor(head) for head in heads}, f"{name} links to {target}"


def _anchor(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


def test_no_command_hides_in_an_indented_block():
    """Indented text is not run."""
    for name in FILES:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in text.splitlines():
            assert not re.match(r"^    (sign-fast|torchrun|python|pip|make|[A-Z_]+=\S+ \w)", line), f"{name}: {line}"


def test_a_block_that_fails_is_seen(tmp_path, monkeypatch):
    """The harness itself can fail."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="exit status 2"):
        _run(["sign-fast", "generate", "--nonsense"], Block("bash", "", 1, ""), "x.md")
    with pytest.raises(click.UsageError):
        _run(["sign-fast", "generate", "--nonsense"], Block("bash", "", 1, "parsed"), "x.md")
    with pytest.raises(AssertionError, match="say who tests it"):
        _run(["rm", "-r", "x"], Block("bash", "", 1, ""), "x.md")
    with pytest.raises(AssertionError, match="knows nothing of"):
        _run_by_another_test(Block("bash", "python benchmarks/nothing_of_this_name.py", 1, "by tests/docs/given.py"))
    shutil.copy(ROOT / "README.md", tmp_path / "broken.md")
    with open(tmp_path / "broken.md", "a") as file:
        file.write("```python\n")
    with pytest.raises(AssertionError, match="not closed"):
        blocks(tmp_path / "broken.md")
