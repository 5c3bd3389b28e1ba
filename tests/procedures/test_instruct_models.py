"""`vlm run instruct`: a server that plays an endpoint, a tiny model on this machine, and a system of ours."""

import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import vlm
import pytest
from PIL import Image

import cli
from tests.conftest import PATIENCE
from tests.support.chat_server import Asked, FakeClock, Raw, serving
from tests.support.instruct import KEY, LONG, ROOT, TALK, about, command_line, lines, records, talk, write
from tests.checkpoints.test_export import finished
from vlm.errors import SampleError, UserError
from vlm.procedures import main
from vlm.procedures.instruct import command
from vlm.procedures.instruct.answers import Rejected
from vlm.procedures.instruct.task_specs import load_kind
from vlm.procedures.instruct.rate_limiter import RateLimiter
from vlm.sample import ImagePart

pytestmark = pytest.mark.usefixtures("clock")

# -- the endpoint


def test_waits_as_long_as_the_server_says(tmp_path: Path, clock: FakeClock) -> None:
    def play(asked: Asked) -> str | Raw | None:
        bad = {
            1: Raw(429, {"error": {"message": "slow down"}}, {"Retry-After": "17"}),
            3: Raw(500, b"<html>oops</html>"),
            4: Raw(503, b""),
            5: None,
            7: Raw(body=b"<html>busy</html>"),
            9: Raw(body={"choices": []}),
        }
        return bad.get(asked.number, TALK.format(0))

    with serving(play) as server:
        assert main(command_line(tmp_path, server.url)) == 0
    assert len(server.asked) == 6 + 6
    waits = [seconds for seconds in clock.slept if seconds]
    assert sum(waits[:1]) == pytest.approx(17)
    growing = waits[1:4]
    assert all(0.5 * 2**k <= wait <= 2**k for k, wait in enumerate(growing)), growing
    again = [(a.body["messages"][-1], a.body["seed"]) for a in server.asked]
    assert again[0] == again[1]
    assert again[2] == again[3] == again[4] == again[5]


def test_a_date_and_a_quota(tmp_path: Path, clock: FakeClock) -> None:
    def play(asked: Asked) -> str | Raw:
        later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
        return Raw(429, b"", {"Retry-After": later}) if asked.number == 1 else talk(asked)

    with serving(play) as server:
        assert main(command_line(tmp_path, server.url)) == 0
        assert 50 < max(clock.slept) < 101  # a slow machine reads the date late
        (tmp_path / "out.json.progress.jsonl").unlink()
        (tmp_path / "out.json").unlink()
        said = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}
        server.play = lambda asked: Raw(429, said)
        with pytest.raises(UserError, match=r"the quota is used up, .* when there is more .429: You exceeded"):
            main(command_line(tmp_path, server.url))
        server.play = lambda asked: Raw(429, b"", {"Retry-After": "86400"})
        with pytest.raises(UserError, match="it asks to wait 86400 s, start again then"):
            main(command_line(tmp_path, server.url))
        server.play = lambda asked: Raw(529, b"")
        with pytest.raises(UserError, match=r"no answer in 3 tries, the last: 529: .*; the same command goes on"):
            main(command_line(tmp_path, server.url, "--tries", "3"))


ENDINGS = {
    "key": (Raw(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}), r"refuses the key, .*\*\*\*"),
    "model": (Raw(404, {"error": {"message": "The model `writer` does not exist"}}), "no model 'writer', or no such"),
    "html": (Raw(body=b"<html>Welcome</html>"), "is no chat completion: '<html>Welcome</html>'; correct --endpoint"),
    "moved": (Raw(302, b"", {"Location": "https://elsewhere.test/"}), "sends on to 'https://elsewhere.test/'"),
    "method": (Raw(405, b""), "cannot be used .405: Method Not Allowed.; correct --endpoint"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_no_retry_mends_ends_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], clock: FakeClock
) -> None:
    answer, message = ENDINGS[name]
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda asked: answer) as server:
        assert cli.main(["run", *command_line(tmp_path, server.url, "--key-env", "MY_KEY")]) == 2
        assert [asked.key for asked in server.asked] == [f"Bearer {KEY}"]
    assert [file.name for file in tmp_path.iterdir()] == ["in.json"], "nothing that would hold another --model back"
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vlm: error: {server.url}/chat/completions: ")
    assert re.search(message, error), error
    assert not any(clock.slept)


def test_nobody_there(tmp_path: Path) -> None:
    with serving(talk) as server:
        pass
    with pytest.raises(UserError, match=r"cannot be reached .Connection refused.; correct --endpoint, or start"):
        main(command_line(tmp_path, server.url))
    given_up = threading.Event()
    with serving(lambda asked: given_up.wait(PATIENCE) and None) as server:
        arguments = command_line(tmp_path, server.url, "--timeout", "0.05", "--tries", "2")
        with pytest.raises(UserError, match=r"no answer in 2 tries, the last: no answer within 0\.05 s"):
            main(arguments)
        given_up.set()


def test_a_rate_is_kept_by_all_threads_together(tmp_path: Path, clock: FakeClock) -> None:
    sent: list[float] = []
    with serving(lambda asked: (sent.append(clock.time), talk(asked))[1]) as server:
        arguments = command_line(tmp_path, server.url, "--requests-per-minute", "120", "--parallel", "1")
        assert main(arguments) == 0
    assert sent == pytest.approx([0.5 * k for k in range(6)])

    made, pace = [], RateLimiter(ticking := FakeClock(), requests_per_minute=60)

    def ask() -> None:
        for _ in range(20):
            pace.wait()
            made.append(ticking.time)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert ticking.time >= 159  # 160 requests: none comes early
    pace.pause(30)
    before = ticking.time
    pace.wait()
    assert ticking.time - before >= 30


def test_the_key_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY + "\n")

    def play(asked: Asked) -> str | Raw:
        if asked.number % 2:
            return Raw(500, {"error": {"message": f"bad header Authorization: {asked.key}"}})
        return Raw(400, {"error": f"told {asked.key}"}) if about(asked) == "3" else talk(asked)

    with serving(play) as server:
        assert cli.main(["run", *command_line(tmp_path, server.url, "--key_env", "MY_KEY", "--tries", "9")]) == 0
        server.play = lambda asked: Raw(403, {"error": {"message": f"no {KEY}"}})
        assert cli.main(["run", *command_line(tmp_path, server.url, "--key_env", "MY_KEY", "--attempts", "9")]) == 2
    said = capfd.readouterr()
    assert "***" in said.err
    everything = said.out + said.err + "".join(file.read_text() for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 4
    assert KEY not in everything
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(UserError, match="the key holds blanks") as error:
        main(command_line(tmp_path, server.url, "--key_env", "MY_KEY"))
    assert "two words" not in str(error.value)


def test_parallel_requests_give_the_same_file(tmp_path: Path) -> None:
    overtaken = threading.Event()

    def late(asked: Asked) -> str:
        if about(asked) == "7":  # whoever asks it has finished another record
            overtaken.set()
        if about(asked) == "0" and parallel == "7":
            overtaken.wait(PATIENCE)
        return TALK.format(about(asked)) if asked.body["seed"] % 3 else "nothing"

    files = []
    for parallel in ("1", "7"):
        folder = tmp_path / parallel
        folder.mkdir()
        with serving(late) as server:
            arguments = command_line(folder, server.url, "--parallel", parallel, "--attempts", "2", source=records(30))
            assert main(arguments) == 0
        files.append([(folder / name).read_bytes() for name in ("out.json", "out.json.rejected.jsonl")])
    assert files[0] == files[1]
    order = [[line["id"] for line in lines(tmp_path / p / "out.json.progress.jsonl")[1:]] for p in ("1", "7")]
    assert order[0] != order[1], "they were finished in another order"


def test_fields_of_the_request(tmp_path: Path) -> None:
    with serving(talk) as server:
        extra = ["--request", "max_tokens=null", "--request", "max_completion_tokens=99", "--request", 'stop=["#"]']
        assert main(command_line(tmp_path, server.url + "/chat/completions?version=2", *extra)) == 0
    body = server.asked[0].body
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["stop"]) == (99, ["#"])
    assert server.asked[0].path == "/v1/chat/completions?version=2"


# -- models on this machine


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's language model with a chat template of the kind that knows no system message."""
    from vlm.prompts import LlamaTokenizer

    folder = tmp_path_factory.mktemp("llama")
    shutil.copytree(ROOT / "vlm/demo/assets/llama", folder, dirs_exist_ok=True)
    LlamaTokenizer(str(folder)).save(folder)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"max_position_embeddings": 8192})
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    write(folder / "tokenizer_config.json", tokenizer | {"chat_template": template})
    return folder


def test_a_local_model(llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlm.procedures.instruct.task_specs import Sampling
    from vlm.procedures.instruct.local import LocalChat
    from vlm.procedures.instruct.models import Turn

    chat = LocalChat(llama, dtype="float32")
    turns = [Turn("system", "Be brief."), Turn("user", "Describe the image.")]
    greedy = chat.reply(turns, seed=1, sampling=Sampling(temperature=0, max_tokens=9))
    network = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(
        "<s>user: Be brief.\n\nDescribe the image.\nassistant:", add_special_tokens=False, return_tensors="pt"
    )
    expected = network.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert greedy.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert greedy.tokens == len(expected)
    drawn = [chat.reply(turns, seed=s, sampling=Sampling(temperature=2.0, max_tokens=9)).text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    hot, asked = Sampling(temperature=2.0, max_tokens=9), [[Turn("user", "What? " * k)] for k in (1, 5, 2, 9)]
    alone = [chat.reply(turns, seed=seed, sampling=hot) for seed, turns in enumerate(asked)]
    batched, sizes = LocalChat(llama, dtype="float32", parallel=4), []
    inner = batched._together._answer
    batched._together._answer = lambda requests: (sizes.append(len(requests)), inner(requests))[1]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda at: batched.reply(asked[at], seed=at, sampling=hot), range(4)))
    assert together == alone
    assert max(sizes) > 1
    with pytest.raises(Rejected, match="more than the 8192 tokens that the model has room for"):
        chat.reply(turns, seed=1, sampling=Sampling(max_tokens=8192))

    # no model of this size keeps to the form: everything is rejected, counted, and not asked again
    source = write(tmp_path / "in.json", records(2))
    arguments = ["instruct", "--kind", "conversation", "--records", str(source), "--out", str(tmp_path / "out.json")]
    arguments += ["--local", str(llama), "--max_tokens", "8", "--attempts", "2", "--dtype", "float32"]
    assert main(arguments) == 1
    said = lines(tmp_path / "out.json.progress.jsonl")[1:]
    assert [(line["id"], line["attempt"]) for line in said] == [("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1)]
    assert main(arguments) == 1
    assert lines(tmp_path / "out.json.progress.jsonl")[1:] == said


def test_a_system_of_ours_describes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.procedures.instruct import local
    from vlm.procedures.instruct.task_specs import Sampling
    from vlm.procedures.instruct.local import OwnSystem
    from vlm.procedures.instruct.models import Turn
    from vlm.procedures.instruct.records import Item
    from vlm.sample import ImageFile, Message, Sample, TextPart

    run = finished(tmp_path / "run")
    Image.new("RGB", (30, 20), (9, 90, 200)).save(tmp_path / "0.png")
    picture = Item("0", image="0.png", file=ImageFile("0.png", tmp_path / "0.png")).sample
    own, greedy = OwnSystem(str(run)), Sampling(temperature=0, max_tokens=5)
    turns = [Turn("user", "What?", picture), Turn("assistant", "A ball."), Turn("user", "Continue")]
    messages = [
        Message("user", (ImagePart(), TextPart("\nWhat?"))),
        Message("assistant", (TextPart("A ball."),)),
        Message("user", (TextPart("Continue"),)),
    ]
    sample = Sample("0", tuple(messages), picture.images)
    (expected,) = own.module.generate([sample], decoding=vlm.language.Decoding(max_new_tokens=5))
    assert own.reply(turns, seed=0, sampling=greedy).text == expected

    hot = replace(greedy, temperature=1.5)
    alone = [own.reply(turns, seed=seed, sampling=hot) for seed in range(3)]
    own._together._parallel = 3
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda seed: own.reply(turns, seed=seed, sampling=hot), range(3))) == alone
    assert len({reply.text for reply in alone}) == 3
    (tmp_path / "half.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    half = Item("half", image="half.png", file=ImageFile("half.png", tmp_path / "half.png")).sample
    with pytest.raises(SampleError, match=r"sample 'half': image 'half\.png'"):
        own.reply([Turn("user", "What?", half)], seed=0, sampling=greedy)

    brief = replace(load_kind("curate"), describing=Sampling(max_tokens=5))
    monkeypatch.setattr(command, "load_kind", lambda name: brief if name == "curate" else load_kind(name))
    monkeypatch.setattr(local, "OwnSystem", lambda *_, **__: own)
    with serving(lambda asked: LONG.format("")) as server:
        source = [{"id": "0", "image": "0.png"}]
        arguments = command_line(tmp_path, server.url, "--weights", str(run), source=source, kind="curate")
        assert main(arguments) == 0
    assert len(server.asked) == 1, "only the repair is the endpoint's"
    said = lines(tmp_path / "out.json.progress.jsonl")[1:]
    assert [line["step"] for line in said] == ["describe", "continue", "repair"]
    assert said[0]["tokens"] <= 6, "its own tokens are counted"
    assert server.asked[0].text == f"{said[0]['text'].strip()} {said[1]['text'].strip()}"
