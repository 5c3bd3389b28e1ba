"""`vlm run instruct`: what is asked, what is written, what is not, and going on after a stop."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import PATIENCE
from tests.support.chat_server import Asked, Raw, completion, serving
from tests.support.instruct import LONG, ROOT, TALK, about, command_line, lines, records, talk, write
from vlm.data import LlavaJson
from vlm.data.loading.encoder import Seeds
from vlm.data.modules.instruction import instruct
from vlm.errors import UserError
from vlm.procedures import main
from vlm.procedures.instruct.answers import Rejected, check, repeats, rounds_of, tidy
from vlm.procedures.instruct.task_specs import NAMES, detailed_request, load_kind, styles
from vlm.procedures.instruct.rate_limiter import Clock
from vlm.procedures.llava_captions import requests
from vlm.sample import ImagePart

pytestmark = pytest.mark.usefixtures("clock")

# -- what is asked


@pytest.mark.parametrize(("name", "examples"), [("conversation", 2), ("detail", 3), ("reasoning", 3)])
def test_the_examples_keep_to_their_own_rules(name: str, examples: int) -> None:
    kind = load_kind(name)
    assert len(kind.examples) == examples, "as many as the paper shows"
    for asked, answer in kind.examples:
        assert ("[0." in asked) == (name != "conversation"), "boxes for two of the kinds, captions alone for the third"
        if kind.form == "pairs":
            assert rounds_of(answer, kind)
        else:
            assert check(answer, kind, part="answer")


def test_every_kind_is_whole() -> None:
    for name in NAMES:
        kind = load_kind(name)
        assert kind.what
        assert kind.system
        assert {*re.findall(r"{(\w+)}", kind.request)} <= {"captions", "boxes", "question", "dialogue", "description"}
    assert (load_kind("curate").short, load_kind("curate").limits["answer"][0]) == (80, 50)  # the paper's
    assert len(styles()) == len(set(styles())) >= 10


def test_messages_of_a_conversation(tmp_path: Path) -> None:
    boxes = [{"name": "dog", "box": [0.12345, 0.2, 0.5, 1.0]}, {"name": "ball", "box": [0, 0.25, 0.125, 0.5]}]
    source = [{"id": "a", "image": "a.png", "captions": ["Caption 1.\n"], "boxes": boxes}]
    with serving(talk) as server:
        assert main(command_line(tmp_path, server.url, "--seed", "3", source=source)) == 0
        (tmp_path / "out.json").unlink()
        (tmp_path / "out.json.progress.jsonl").unlink()
        server.play = lambda asked: LONG.format("")
        assert main(command_line(tmp_path, server.url, "--top-p", "0.5", kind="detail")) == 0
    first, second = (asked.body for asked in server.asked)
    assert server.asked[0].path == "/v1/chat/completions"
    assert server.asked[0].key is None
    assert [m["role"] for m in first["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert first["messages"][-1]["content"] == "Caption 1.", "a conversation is written from captions alone"
    assert (first["model"], first["temperature"], first["top_p"], first["max_tokens"]) == ("writer", 0.7, 1.0, 1024)
    assert 0 <= first["seed"] < 2**31
    assert [m["role"] for m in second["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert second["messages"][-1]["content"] == (
        "Caption 1.\n\ndog: [0.123, 0.200, 0.500, 1.000]\nball: [0.000, 0.250, 0.125, 0.500]"
    )
    assert second["top_p"] == 0.5


def test_coco_as_it_is_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = {"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480}
    told = [{"id": i, "image_id": 9, "caption": f"Caption {i}. "} for i in range(5)]
    captions = write(tmp_path / "captions.json", {"images": [picture], "annotations": told})
    box = {"image_id": 9, "category_id": 18, "iscrowd": 0}
    annotations = [
        box | {"id": 1, "bbox": [64, 48, 320, 240]},
        box | {"id": 2, "bbox": [600.5, 470, 39.6, 10.02]},  # a little outside, as some are
        box | {"id": 3, "bbox": [1, 1, 0, 5]},
        box | {"id": 4, "bbox": [0, 0, 10, 10], "iscrowd": 1},
        box | {"id": 5, "bbox": [0, 0, 10, 10], "image_id": 10},
    ]
    instances = {"annotations": annotations, "categories": [{"id": 18, "name": "dog"}]}
    write(tmp_path / "instances.json", instances)
    arguments = ["instruct", "--kind", "detail", "--captions", str(captions), "--out", str(tmp_path / "o.json")]
    with serving(lambda asked: LONG.format("")) as server:
        arguments += ["--endpoint", server.url, "--model", "m"]
        assert main([*arguments, "--instances", str(tmp_path / "instances.json")]) == 0
    assert server.asked[0].text == (
        "Caption 0.\nCaption 1.\nCaption 2.\nCaption 3.\nCaption 4.\n\n"
        "dog: [0.100, 0.100, 0.600, 0.600]\ndog: [0.938, 0.979, 1.000, 1.000]"
    )
    (record,) = json.loads((tmp_path / "o.json").read_text())
    assert (record["id"], record["image"]) == ("9", "000000000009.jpg")
    with pytest.raises(UserError, match=r"in\.json: must be a JSON object, found a list"):
        main([*arguments[:4], str(write(tmp_path / "in.json", [])), *arguments[5:]])
    with pytest.raises(UserError, match=r"captions\.json: holds no list 'categories'"):
        main([*arguments, "--instances", str(captions)])
    instances["annotations"][0]["category_id"] = 7
    write(tmp_path / "instances.json", instances)
    with pytest.raises(UserError, match=r"instances\.json: sample '1': category 7 is not in 'categories'"):
        main([*arguments, "--instances", str(tmp_path / "instances.json")])
    capsys.readouterr()


# -- what is written


def test_llavas_own_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(talk) as server:
        assert main(command_line(tmp_path, server.url, source=records(40))) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f"{tmp_path}/out.json: 40 of 40 records; 40 requests, 280 tokens written"]
    for i in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    file = LlavaJson(tmp_path / "out.json")
    assert [sample.id for sample in file] == [f"r{i}" for i in range(40)]
    in_front = Counter()
    for at, sample in enumerate(file):
        assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
        assert sum(isinstance(p, ImagePart) for p in sample.messages[0].content) == 1
        (text,) = (part.text for part in sample.messages[0].content if not isinstance(part, ImagePart))
        assert text.strip() == f"How many dogs are there in {at}?"
        in_front[isinstance(sample.messages[0].content[0], ImagePart)] += 1
        assert sample.messages[3].content[0].text == "They run."
        assert sample.images[0].path == (tmp_path / f"{at}.png").resolve()
    assert min(in_front.values()) > 10


def test_a_detailed_description_answers_one_of_llavas_requests(tmp_path: Path) -> None:
    with serving(lambda asked: LONG.format(about(asked))) as server:
        assert main(command_line(tmp_path, server.url, source=records(20), kind="detail")) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        for name in ("out.json", "out.json.progress.jsonl"):
            (tmp_path / name).unlink()
        write(tmp_path / "in.json", records(20)[::-1][:10])
        assert main(command_line(tmp_path, server.url, kind="detail")) == 0
    asked = [record["conversations"][0]["value"].replace("<image>", "").strip() for record in found]
    assert asked == [detailed_request(0, f"r{i}") for i in range(20)]
    assert {detailed_request(0, f"r{i}") for i in range(200)} == set(requests("detailed"))
    assert asked != [detailed_request(1, f"r{i}") for i in range(20)]
    assert json.loads((tmp_path / "out.json").read_text()) == found[::-1][:10], "drawn by seed and id alone"


def test_answers_from_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "a.jpg")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (20, 10), (0, 0, 200)).save(tmp_path / "c.jpg", exif=turned)
    (tmp_path / "d.png").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    source = [{"id": n[0], "image": n, "question": f"What is {n}?"} for n in ("a.jpg", "b.bmp", "c.jpg", "d.png")]
    source.append({"id": "e", "image": "a.jpg", "question": "Who is e?"})
    with serving(lambda asked: "SKIP" if "Who" in asked.text else f"Red. Red. {asked.text}") as server:
        assert main(command_line(tmp_path, server.url, source=source, kind="image-answer")) == 0
    sent = {}
    for asked in server.asked:
        image, _ = asked.body["messages"][-1]["content"]
        head, data = image["image_url"]["url"].split(",")
        sent[asked.text] = head, base64.b64decode(data)
    assert sent["What is a.jpg?"] == ("data:image/jpeg;base64", (tmp_path / "a.jpg").read_bytes()), "as stored"
    for name in ("b.bmp", "c.jpg"):  # the second as it is trained on: what EXIF says of it is not applied
        head, data = sent[f"What is {name}?"]
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(data)).size == (20, 10)
    assert len(server.asked) == 4, "one request each; none for a broken picture, one for a request to leave alone"
    found = json.loads((tmp_path / "out.json").read_text())
    assert [record["id"] for record in found] == ["a", "b", "c"]
    assert found[0]["conversations"][1]["value"] == "Red. Red. What is a.jpg?"
    reasons = {line["id"]: line["reasons"] for line in lines(tmp_path / "out.json.rejected.jsonl")}
    assert reasons["e"] == ["the model advises against this request"]
    assert "is not a readable picture" in reasons["d"][0] or "cannot be decoded" in reasons["d"][0]


def test_prompts_for_pictures(tmp_path: Path) -> None:
    said = "Request:\nDraw me a cat, please\n===\nPrompt:\na fluffy cat on a wall,\nevening light, oil painting\n==="
    turns = [{"from": "human", "value": "I like {cats}."}, {"from": "gpt", "value": "So do I."}]
    with serving(lambda asked: said) as server:
        source = [{"id": i, "caption": f"Cat {i}."} for i in range(12)]
        assert main(command_line(tmp_path, server.url, source=source, kind="recaption")) == 0
        first = json.loads((tmp_path / "out.json").read_text())[0]
        assert [len(sample.images) for sample in LlavaJson(tmp_path / "out.json")] == [0] * 12
        for file in tmp_path.iterdir():
            file.unlink()
        assert main(command_line(tmp_path, server.url, source=[{"conversations": turns}], kind="in-context")) == 0
    cat = {"from": "gpt", "value": "<h>a fluffy cat on a wall, evening light, oil painting</h>"}
    assert first == {"id": "0", "conversations": [{"from": "human", "value": "Draw me a cat, please <GEN>"}, cat]}
    assert json.loads((tmp_path / "out.json").read_text())[0]["conversations"] == [
        *turns,
        first["conversations"][0],
        cat,
    ]
    systems = [asked.body["messages"][0]["content"] for asked in server.asked]
    shown = [[style for style in styles() if style in system] for system in systems[:12]]
    assert {len(five) for five in shown} == {5}
    assert len({*map(tuple, shown)}) > 6
    assert server.asked[0].text == "Cat 0."
    assert server.asked[-1].text == "Person: I like {cats}.\n\nAssistant: So do I."


# -- what is not


BAD = {
    "I'm sorry, but I cannot help with that.": "no Question and Answer",
    "": "empty",
    "Sure! Here it is.\n" + TALK: "text outside of Question and Answer",
    TALK.replace("===\nAnswer", "===\nTwo dogs.\n===\nAnswer", 1): "text outside of Question and Answer",
    TALK.replace("They run.", "They run. They bark. They run."): "repeats a sentence",
    TALK + "\n===\nQuestion:\nAnd?": "Question and Answer do not take turns",
    TALK.replace("There are two.", " "): "empty answer",
    TALK.replace("What do they do?", "How many dogs are there in {0}?"): "a question is asked twice",
    TALK.split("===\nQuestion:\nWhat")[0]: "not 2 to 10 rounds",
    TALK.replace("They run.", "The captions do not say."): "mentions captions, boxes or coordinates",
    TALK.replace("They run.", "One is at [0.12, 0.50]."): "mentions captions, boxes or coordinates",
    TALK.replace(
        "They run.", "According to the image description, they run."
    ): "mentions captions, boxes or coordinates",
    TALK.replace("They run.", "As an AI language model I cannot say."): "refuses",
    TALK.replace("They run.", "I am sorry, I can't see it."): "refuses",
    TALK.replace("They run.", "They run \ud83d."): "holds half a surrogate pair, which is no character",
    TALK.replace("They run.", "See <image>."): "holds a mark of the data format",
    TALK.replace("They run.", "x" * 2001): "answer over 2000",
    TALK.replace("What do they do?", "Why?"): "question shorter than 6 characters",
}


@pytest.mark.parametrize(("said", "reason"), BAD.items())
def test_answers_that_may_not_be_trained_on(said: str, reason: str) -> None:
    with pytest.raises(Rejected) as error:
        rounds_of(tidy(said), load_kind("conversation"))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "said",
    [
        TALK,
        TALK.replace("===\n", "").replace("Question:\n", "**Question:** "),
        f"<think>Two dogs.\nQuestion: no</think>\n\n{TALK}\n===\n",
        TALK.replace("They run.", "They sit in a box of doughnuts; the sign reads 0.5 l, and a man describes it."),
    ],
)
def test_answers_that_may(said: str) -> None:
    rounds = rounds_of(tidy(said), load_kind("conversation"))
    assert [question for question, _ in rounds] == ["How many dogs are there in {0}?", "What do they do?"]


def test_a_refusal_is_tried_again_and_then_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tries: Counter[str] = Counter()

    def play(asked: Asked) -> str | Raw:
        tries[about(asked)] += 1
        if about(asked) == "1" and tries["1"] < 3:
            return "I'm sorry, I can't assist with that."
        if about(asked) == "2":
            return Raw(body=completion(TALK.format(2), end="length"))
        if about(asked) == "3":
            return Raw(body=completion(None, refusal="No."))
        if about(asked) == "4":
            return Raw(400, {"error": {"message": "flagged by the content filter", "code": "content_filter"}})
        return talk(asked)

    with serving(play) as server:
        assert main(command_line(tmp_path, server.url)) == 0
        seeds = [asked.body["seed"] for asked in server.asked if about(asked) == "1"]
        assert len(set(seeds)) == 3
        assert [r["id"] for r in json.loads((tmp_path / "out.json").read_text())] == ["r0", "r1", "r5"]
        refused = "the endpoint refuses the request (400: flagged by the content filter)"
        assert lines(tmp_path / "out.json.rejected.jsonl") == [
            {"id": "r2", "image": "2.png", "reasons": ["cut off by --max_tokens"] * 3},
            {"id": "r3", "image": "3.png", "reasons": ["refuses"] * 3},
            {"id": "r4", "image": "4.png", "reasons": [refused] * 3},
        ]
        line = f"3 of 6 records; 3 rejected: 1 cut off by --max_tokens, 1 refuses, 1 {refused} ("
        assert line in capsys.readouterr().out

        # more attempts go on where the others ended
        server.play = talk
        before = len(server.asked)
        assert main(command_line(tmp_path, server.url, "--attempts", "4")) == 0
        assert len(server.asked) == before + 3
        assert len(json.loads((tmp_path / "out.json").read_text())) == 6
        assert not (tmp_path / "out.json.rejected.jsonl").exists()
        assert main(command_line(tmp_path, server.url, "--attempts", "1")) == 0
        assert len(json.loads((tmp_path / "out.json").read_text())) == 6, "what was accepted stays"


def test_a_model_that_never_keeps_to_the_rules_is_not_paid_for_long(tmp_path: Path) -> None:
    with serving(lambda asked: "I cannot see any image.") as server:
        arguments = command_line(tmp_path, server.url, "--attempts", "1", source=records(50))
        with pytest.raises(UserError, match="the first 20 records were all rejected, most often: no Question and"):
            main(arguments)
        assert 20 <= len(server.asked) <= 21, "one more may be under way"
        before = len(server.asked)
        short = tmp_path / "short"
        short.mkdir()
        assert main(command_line(short, server.url, "--temperature", "0", source=records(2))) == 1
        assert len(server.asked) == before + 2, "the likeliest answer is asked for once"
        assert not (short / "out.json").exists()


# -- going on


def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    held, ended = threading.Event(), threading.Event()

    def play(asked: Asked) -> str:
        if asked.number == 4:
            held.set()
            ended.wait(PATIENCE)
        return talk(asked)

    with serving(play) as server:
        arguments = command_line(tmp_path, server.url)
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        child = subprocess.Popen([sys.executable, "-m", "cli", "run", *arguments], cwd=ROOT, env=environment)
        assert held.wait(PATIENCE)
        with pytest.raises(UserError, match="another process writes this file"):
            main(arguments)
        child.send_signal(signal.SIGKILL)
        child.wait()
        ended.set()
        progress = tmp_path / "out.json.progress.jsonl"
        assert len(lines(progress)) == 1 + 3
        assert not (tmp_path / "out.json").exists()
        with open(progress, "ab") as file:
            file.write(b'{"id": "r3", "attem')
        server.play = talk
        assert main(arguments) == 0
        assert [about(asked) for asked in server.asked] == ["0", "1", "2", "3", "3", "4", "5"]
        whole = (tmp_path / "out.json").read_bytes()
        assert len(json.loads(whole)) == 6
        assert len(lines(progress)) == 1 + 6

        # once more asks nothing and writes the same; so does a longer input for what it had
        assert main(arguments) == 0
        assert (tmp_path / "out.json").read_bytes() == whole
        write(tmp_path / "in.json", records(7))
        assert main(arguments) == 0
    assert [about(asked) for asked in server.asked][7:] == ["6"]
    assert json.loads((tmp_path / "out.json").read_text())[:6] == json.loads(whole)


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    with serving(talk) as server:
        assert main(command_line(tmp_path, server.url)) == 0
        with pytest.raises(UserError, match=r"progress\.jsonl: begun with other settings .seed: 0 -> 1.; give those"):
            main(command_line(tmp_path, server.url, "--seed", "1"))
        with pytest.raises(UserError, match=r"model: 'writer' -> 'other'"):
            main([*command_line(tmp_path, server.url), "--model", "other"])
        with pytest.raises(UserError, match=r"kind: 'conversation' -> 'detail'.*prompts: "):
            main(command_line(tmp_path, server.url, kind="detail"))
        changed = records(6)
        changed[2]["captions"] = ["Caption 9."]
        write(tmp_path / "in.json", changed)
        with pytest.raises(UserError, match="record 'r2' of the input is another one now"):
            main(command_line(tmp_path, server.url))
        write(tmp_path / "in.json", records(5))
        with pytest.raises(UserError, match="record 'r5' of the input is no longer there"):
            main(command_line(tmp_path, server.url))
        progress = tmp_path / "out.json.progress.jsonl"
        progress.write_text(progress.read_text().replace('"attempt"', '"attention"', 1))
        with pytest.raises(UserError, match="line 2 is none of this procedure's"):
            main(command_line(tmp_path, server.url))
        progress.unlink()
        with pytest.raises(UserError, match=r"out\.json: exists already"):
            main(command_line(tmp_path, server.url))
        assert len(server.asked) == 6


def test_a_part_by_lot_grows(tmp_path: Path) -> None:
    with serving(talk) as server:
        assert main(command_line(tmp_path, server.url, "--num", "10", source=records(40))) == 0
        first = json.loads((tmp_path / "out.json").read_text())
        assert main(command_line(tmp_path, server.url, "--num", "20")) == 0
        second = json.loads((tmp_path / "out.json").read_text())
    assert (len(first), len(second), len(server.asked)) == (10, 20, 20)
    assert [record for record in second if record in first] == first
    assert [r["id"] for r in second] == sorted((r["id"] for r in second), key=lambda name: int(name[1:])) != first


def test_waiting_ends_when_the_work_ends() -> None:
    clock = Clock()
    threading.Timer(0.05, clock.stop).start()
    with pytest.raises(Exception):  # noqa: B017  (at the end of its time it would return)
        clock.sleep(PATIENCE)


# -- MiniGPT-4's curation


def test_curation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    source = [{"id": str(i), "image": f"{i}.png"} for i in range(5)]
    kind = load_kind("curate")
    shades = {}

    def play(asked: Asked) -> Raw:
        messages = asked.body["messages"]
        picture = next((m["content"][0] for m in messages if isinstance(m["content"], list)), None)
        if picture is None:  # to repair
            number = re.findall(r"picture (\d)", asked.text)[0]
            fine = LONG.format(f"This is picture {number}.")
            said = {"2": LONG.format("Sorry, incomplete."), "3": LONG.format("They wait. They  wait!"), "4": "Short."}
            return Raw(body=completion(said.get(number, fine)))
        data = base64.b64decode(picture["image_url"]["url"].split(",")[1])
        number = str(Image.open(io.BytesIO(data)).getpixel((0, 0))[0])
        shades[number] = shades.get(number, 0) + 1
        if asked.text == "Continue":
            assert [m["role"] for m in messages] == ["user", "assistant", "user"]
            assert messages[1]["content"] == f"This is picture {number} and"
            return Raw(body=completion("there is more.", tokens=4))
        assert asked.text == kind.describe
        short = number != "1"
        return Raw(body=completion(f"This is picture {number} and", tokens=79 if short else 80, end="length"))

    with serving(play) as server:
        assert main(command_line(tmp_path, server.url, source=source, kind="curate")) == 0
    assert shades == {"0": 2, "1": 1, "2": 2, "3": 2, "4": 2}, "asked to go on below 80 tokens"
    repairs = [asked for asked in server.asked if asked.body["messages"][0]["role"] == "system"]
    assert [asked.text for asked in repairs[:2]] == ["This is picture 0 and there is more.", "This is picture 1 and"]
    assert {(a.body["temperature"], a.body["max_tokens"]) for a in repairs} == {(0.7, 400)}
    found = json.loads((tmp_path / "out.json").read_text())
    assert [record["id"] for record in found] == ["0", "1"]
    question, answer = (turn["value"] for turn in found[0]["conversations"])
    assert question == "<image>"
    assert answer == LONG.format("This is picture 0.")
    curated = LlavaJson(tmp_path / "out.json", image_root=tmp_path)
    told = instruct(
        curated[0], Seeds(0, 1), instructions=["What is it?", "Describe it."]
    )  # as MiniGPT-4's second stage
    assert [part.text for part in told.messages[0].content if not isinstance(part, ImagePart)] == ["Describe it."]
    assert [line["reasons"] for line in lines(tmp_path / "out.json.rejected.jsonl")] == [
        ["apologises or calls itself incomplete"],
        ["repeats a sentence"],
        ["answer shorter than 50 characters"],
    ]
    assert LlavaJson(tmp_path / "out.json")[1].images
    assert "2 of 5 records; 3 rejected" in capsys.readouterr().out


def test_repeated_sentences() -> None:
    assert repeats("A dog runs. It is brown. A  Dog runs!")
    assert repeats("It is here\nIt is here")
    assert not repeats("A dog runs. A dog runs fast. It costs 1.5 or 1.5 dollars")
