"""`vlm run`: captions as LLaVA's conversations, and its balanced part of noisy captions."""

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import vlm  # noqa: F401
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data import LlavaJson
from vlm.errors import SampleError, UserError
from vlm.procedures import PROCEDURES, main
from vlm.procedures.filter_captions import select
from vlm.procedures.llava_captions import requests
from vlm.procedures.noun_phrases import rule_phrases

ROOT = Path(__file__).parents[2]


def write(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records))
    return path


# -- llava-captions


def records(num: int) -> list[dict]:
    return [
        {"id": f"c{i}", "image": f"{i}.png", "caption": f"Caption {i}", "blip_caption": f"b{i}"} for i in range(num)
    ]


def converted(tmp_path: Path, name: str, source: list, *options: str) -> dict[str, dict]:
    write(tmp_path / "captions.json", source)
    assert main(["llava-captions", str(tmp_path / "captions.json"), str(tmp_path / name), *options]) == 0
    file = LlavaJson(tmp_path / name)
    assert len(file) == len(source)
    lines = (tmp_path / name).read_text()
    found = [json.loads(line) for line in lines.splitlines()] if name.endswith("l") else json.loads(lines)
    return {record["id"]: record for record in found}


def test_requests_are_the_published_ones() -> None:
    assert (len(requests("brief")), len(requests("detailed"))) == (11, 16)
    assert requests("brief")[0] == "Describe the image concisely."
    assert requests("detailed")[-1] == "Write an exhaustive depiction of the given image."
    assert all(text == text.strip() and text.endswith(".") for kind in ("brief", "detailed") for text in requests(kind))


def test_every_request_and_both_places_are_drawn_by_seed_and_id(tmp_path: Path) -> None:
    found = converted(tmp_path, "chat.json", records(400))
    turns = {name: record["conversations"] for name, record in found.items()}
    assert [turn["value"] for turn in turns["c7"]][1:] == ["Caption 7"]
    humans = Counter(human["value"] for human, _ in turns.values())
    both = {f"{text}\n<image>" for text in requests("brief")} | {f"<image>\n{text}" for text in requests("brief")}
    assert set(humans) == both
    assert 150 < sum(count for text, count in humans.items() if text.startswith("<image>")) < 250

    # other records, another order, another form of file: the same draw for the same id
    fewer = converted(tmp_path, "fewer.jsonl", records(400)[399:99:-1], "--caption_key", "blip_caption")
    assert all(fewer[name]["conversations"][0] == found[name]["conversations"][0] for name in fewer)
    assert fewer["c399"]["conversations"][1]["value"] == "b399"
    other = converted(tmp_path, "other.json", records(400), "--seed", "1", "--requests", "detailed")
    assert {turn["conversations"][0]["value"].replace("<image>", "").strip() for turn in other.values()} == set(
        requests("detailed")
    )


def test_wrong_captions_are_refused_in_one_line(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.json", [*records(1), {"id": "x", "image": "1.png"}])
    for name in ("llava-captions", "filter-captions"):
        with pytest.raises(SampleError, match=r"bad\.json: sample 'x': 'caption' must be a text, found keys"):
            main([name, str(bad), str(tmp_path / "out.json")])
        assert not (tmp_path / "out.json").exists()
        with pytest.raises(UserError, match="exists already"):
            main([name, str(write(tmp_path / "good.json", records(3))), str(bad)])
    with pytest.raises(UserError, match=r"--cap is 0; it must be at least 1"):
        main(["filter-captions", str(bad), "x.json", "--cap", "0"])
    with pytest.raises(UserError, match="vlm run capture: no such procedure; choose one of android-screens, bootstrap"):
        main(["capture"])


def test_procedures_are_listed_and_run_without_torch(tmp_path: Path) -> None:
    source = write(tmp_path / "captions.json", records(3))
    code = f"""
        import sys, cli
        assert cli.main(["run"]) == 0
        for name in ["filter-captions", "llava-captions"]:
            assert cli.main(["run", name, {str(source)!r}, {str(tmp_path)!r} + "/" + name]) == 0
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}" in done.stdout for name in PROCEDURES)


# -- filter-captions


def as_published(captions: list[list[str]], *, min_frequency: int, cap: int) -> tuple[set[int], dict[str, list[int]]]:
    """The paper's words, step by step: what is kept for certain, and the phrases of which some are drawn."""
    frequency = Counter(phrase for found in captions for phrase in set(found))
    pool: set[int] = set()
    drawn: dict[str, list[int]] = {}
    for phrase, count in sorted(frequency.items(), key=lambda item: item[1]):
        if count < min_frequency:
            continue
        containing = [index for index, found in enumerate(captions) if phrase in found]
        if count > cap:
            drawn[phrase] = containing
        else:
            pool |= set(containing)
    return pool, drawn


@given(
    captions=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=4), max_size=40),
    min_frequency=st.integers(1, 5),
    cap=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_the_filter_follows_the_paper(captions: list[list[str]], min_frequency: int, cap: int, seed: int) -> None:
    chosen = select(captions, min_frequency=min_frequency, cap=cap, seed=seed)
    certain, drawn = as_published(captions, min_frequency=min_frequency, cap=cap)
    kept = set(chosen.kept)
    assert chosen.kept == sorted(kept)
    assert certain <= kept
    extra = kept - certain
    assert all(any(index in containing for containing in drawn.values()) for index in extra)
    assert len(extra) <= cap * len(drawn)
    assert all(len(kept & set(containing)) >= cap for containing in drawn.values())
    assert (chosen.num_captions, chosen.num_capped) == (len(captions), len(drawn))
    again = select([found[::-1] for found in captions], min_frequency=min_frequency, cap=cap, seed=seed)
    assert again == chosen, "the order of phrases in a caption has no say"


def test_the_draw_depends_on_the_seed() -> None:
    same = [["a"]] * 50
    kept = [select(same, cap=10, seed=seed).kept for seed in (0, 0, 1)]
    assert kept[0] == kept[1] != kept[2]
    assert [len(places) for places in kept] == [10, 10, 10]


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*["A dog on the grass."] * 3, *["A cat and a red ball"] * 5, "an axolotl"]
    source = write(tmp_path / "in.json", [{"id": i, "image": "x.png", "caption": text} for i, text in enumerate(texts)])
    arguments = ["filter-captions", str(source), "--cap", "4", "--extractor", "rules"]
    assert main([*arguments, str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out.splitlines()
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept[:3] == json.loads(source.read_text())[:3], "records stay as they are, in their order"
    assert out == [
        f"{tmp_path / 'out.json'}: {len(kept)} of 9 captions ({len(kept) / 9:.1%})",
        "noun phrases by rules: 5, 1 of them in fewer than 3 captions, 2 in more than 4",
    ]
    assert 7 <= len(kept) <= 8  # four of five for each of two phrases


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man riding a brown horse in the park.", ["a man", "a brown horse", "the park"]),
        ("Two dogs, three cats & my sister's hat", ["two dogs", "three cats", "my sister's hat"]),
        ("running shoes on sale!", ["running shoes", "sale"]),
        ("She is smiling happily", []),
        ("the", []),
        ("état-major of a café", ["état-major", "a café"]),
    ],
)
def test_phrases_by_rules(caption: str, phrases: list[str]) -> None:
    assert rule_phrases(caption) == phrases
