"""The examples of `docs/python.md` and the notebooks do what they say."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from tests.conftest import PATIENCE
from tests.support.systems import ROOT
from vlm.demo import write_demo_data

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = ROOT / "docs" / "notebooks"


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_demo_data(tmp_path / "demo", num_train=12, num_val=4, num_test=4)
    for name in ("vlm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.S | re.M)
    assert len(blocks) == 10
    names: dict = {"__name__": "docs"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert names["tuned"].generate(names["questions"][0], max_new_tokens=2)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_kept_without_outputs(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"/(home|root|work|Users|tmp)/", text), "a path of some machine"
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert "\n".join(line.rstrip() for line in cell.source.split("\n")) == cell.source


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_notebook_has_a_page_of_the_same_cells(file: Path) -> None:
    page = (PAGES / f"{file.stem}.md").read_text()
    for cell in nbformat.read(file, as_version=4).cells:
        if cell.cell_type == "code":
            assert f"```python\n{cell.source}\n```" in page, "the page is older than the notebook: make notebooks"
    assert not re.search(r"/(home|root|work|Users|tmp)/", page)
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (PAGES / target).exists(), f"a link to {target}, which is not there"
    files = [path for path in PAGES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert all(path.stat().st_size < 100_000 for path in files if path.suffix == ".webp")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from notebooks.render import execute, write_page

    monkeypatch.setenv("VLM_NOTEBOOKS", str(tmp_path / "work"))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = execute(file, folder=tmp_path)  # from any working directory
    assert write_page(notebook, file.stem, tmp_path / "pages").stat().st_size > 2000


INTERRUPTED = """
from callbacks import Progress, StageTransition
from tests.support.samples import pairs
from tests.support.systems import llava_1_5
from tests.support.training import ListSource, trainer
from vlm.data import BatchSpec, InstructionData
from vlm.stages import Trained
from pathlib import Path

folder = Path({folder!r})
data = InstructionData([ListSource(pairs(folder, 4))], batch=BatchSpec(2))
module = llava_1_5()


def fit(epochs):
    stage = StageTransition("mine", {{"connector": Trained(1e-3)}})
    made = trainer(folder / "run", max_epochs=epochs, callbacks=[stage, Progress()], enable_progress_bar=True)
    made.fit(module, data)
    return made
"""


@pytest.mark.slow
def test_an_interrupted_cell_can_be_run_again(tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    def run(code: str, *, interrupt_at: str | None = None) -> tuple[str, str]:
        """What a cell prints, and how it ends; stopped as a person does it, once it has printed a text."""
        said: list[str] = []

        def hear(message: dict) -> None:
            if message["msg_type"] == "stream":
                said.append(message["content"]["text"])
                if interrupt_at is not None and interrupt_at in said[-1]:
                    manager.interrupt_kernel()

        reply = client.execute_interactive(code, output_hook=hear, timeout=PATIENCE)["content"]
        return "".join(said), reply.get("ename", reply["status"])

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    try:
        assert run(INTERRUPTED.format(folder=str(tmp_path)))[1] == "ok"
        assert run("fit(10_000)", interrupt_at="stage mine: step 0 of")[1] == "SystemExit"
        assert run("fit(2).global_step")[1] == "ok"
        assert "mine is finished" in run("fit(1)")[0]
        answer = run("print(repr(module.generate({'prompt': 'Hello'}, max_new_tokens=2)))")
        assert answer[1] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
