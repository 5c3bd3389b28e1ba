"""The table of memory, written for some of the systems."""

from benchmarks.memory_table import with_rows_of


def page(*rows: str) -> str:
    """Two tables with the same rows."""
    lines = "".join(f"| {row} |\n" for row in rows)
    return f"# Memory\n\n| | full |\n|---|---|\n{lines}\nMore\n\n| | LoRA | QLoRA |\n|---|---|---|\n{lines}"


def test_rows_of_other_systems_stay() -> None:
    assert with_rows_of(page("fuyu | 1", "vila | 2"), page("llava_1_5 | 3", "vila | 4")) == page(
        "fuyu | 1", "llava_1_5 | 3", "vila | 4"
    )
