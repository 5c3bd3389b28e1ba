"""Who may import whom, read off the source files, and what has to work without torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMON = {
    "vlm",
    "vlm.errors",
    "vlm.geometry",
    "vlm.levels",
    "vlm.sample",
    "vlm.batch",
    "vlm.codec",
    "vlm.seeding",
}
"""What everything may import; `vlm` itself is the import hook."""

READING = {"vlm.checkpoints.files", "vlm.checkpoints.tables"}
"""A part's description reads its base weights."""

ALLOWED = {
    "vlm.bert": {"vlm.functional"},
    "vlm.vision": {"vlm.functional", *READING},
    "vlm.connectors": {"vlm.functional", "vlm.bert", *READING},
    "vlm.language": {"vlm.functional", "vlm.bert", *READING},
    "vlm.systems": {
        *("vlm.module", "vlm.vision", "vlm.connectors", "vlm.language", "vlm.prompts"),
        *("vlm.functional", "vlm.in_batch", "vlm.moving"),
        *("vlm.evaluation.retrieval", "vlm.evaluation.retrieval_table"),
    },
}
"""Package -> what it may import from `vlm` besides itself and `COMMON`."""

WITHOUT_LIGHTNING = (
    "vlm.bert",
    "vlm.vision",
    "vlm.connectors",
    "vlm.language",
    "vlm.prompts",
    "vlm.batch",
    "vlm.codec",
)


def _files() -> dict[str, Path]:
    """Module name -> file, of everything that ships."""
    paths = [ROOT / "cli.py", *(ROOT / "vlm").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


def _imports(path: Path, modules: set[str]) -> set[str]:
    """Absolute names a file imports anywhere; `from vlm import batch` counts as `vlm.batch`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in full if name in modules} or {str(node.module)}
    return found


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


FILES = _files()
IMPORTS = {name: _imports(path, set(FILES)) for name, path in FILES.items()}


def test_the_files_are_seen() -> None:
    assert {"cli", "callbacks", "vlm", "vlm.batch", "vlm.vision", "vlm.systems"} <= FILES.keys()
    assert "vlm.errors" in IMPORTS["vlm.sample.parse"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows(name: str) -> None:
    imports = IMPORTS[name]
    if _is_in(name, "vlm"):
        assert not [i for i in imports if _is_in(i, "callbacks") or _is_in(i, "cli")]
    if _is_in(name, "callbacks"):
        assert not [i for i in imports if _is_in(i, "cli")]
    for package, allowed in ALLOWED.items():
        if _is_in(name, package):
            ours = {
                i for i in imports if _is_in(i, "vlm") and not _is_in(i, package) and not _is_in(i, "vlm.sample")
            } - COMMON
            assert not [i for i in ours if not any(_is_in(i, other) for other in allowed)]
    if any(_is_in(name, package) for package in WITHOUT_LIGHTNING):
        assert not [i for i in imports if i.split(".")[0] in ("lightning", "pytorch_lightning", "torchmetrics")]
    assert name.split(".")[-1] != "utils"


def test_rooms_form_no_circle() -> None:
    """A room is a folder, or a file at the root of `vlm`; the packages' own files only list what they export."""
    rooms: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        room = _room(name)
        rooms.setdefault(room, set()).update(_room(i) for i in imports if i in FILES and _room(i) != room)
    list(TopologicalSorter(rooms).static_order())  # a CycleError names the rooms


def _room(name: str) -> str:
    folder = FILES[name].parent.relative_to(ROOT)
    return name if folder in (Path(), Path("vlm")) else ".".join(folder.parts)


@pytest.mark.parametrize(
    "program",
    [
        "import vlm",
        "import vlm.recipes.run_folder, vlm.recipes, vlm.demo",
        "import cli; cli.main(['systems'])",
        "import cli; cli.main(['--help'])",
        "import cli; cli.main(['fit', '--recipe', 'llava_1_5', '--demo', '--dry-run'])",
        "from vlm.procedures.instruct import command, engine, endpoint, local, coco; command._parser().format_help()",
        "import cli; cli.main(['demo-data', {folder!r}, '--num_train', '2', '--num_val', '1'])",
    ],
)
def test_without_torch(program: str, tmp_path: Path) -> None:
    program = program.replace("{folder!r}", repr(str(tmp_path / "data")))
    program += "; import sys; heavy = {'torch', 'lightning', 'transformers', 'timm'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; assert not heavy, heavy"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
