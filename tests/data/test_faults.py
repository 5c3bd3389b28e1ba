"""What is wrong with records as people have them: nothing is lost in silence, and one bad record is one bad record."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vlm.data
from vlm.data import ChatJson, LlavaJson, MessagesJson, QwenJson
from vlm.errors import SampleError, UserError
from vlm.sample import ImagePart, Sample, TextPart, parse_sample

ASKED = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A boat."}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
FORMS: dict[str, dict[str, Any]] = {
    "llava": {"id": "7", "image": "a.png", "conversations": LLAVA},
    "llava_text": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A boat."}]},
    "sharegpt": {"system": "Be brief.", "images": ["a.png"], "conversations": LLAVA},
    "chatml": {
        "image": "a.png",
        "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "A boat."}],
    },
    "qwen": {
        "conversations": [
            {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
            {"from": "assistant", "value": "<ref>A boat.</ref><box>(10,20),(30,40)</box>"},
        ]
    },
    "qwen_human": {
        "conversations": [{"from": "human", "value": "<img>a.png</img>\nWhat?"}, {"from": "gpt", "value": "A boat."}]
    },
    "messages": {"messages": ASKED, "images": ["a.png"]},
    "messages_image": {"messages": ASKED, "image": "a.png"},
    "parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A boat."},
        ],
    },
    "own_paths": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A boat."},
        ]
    },
    "openai": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "A boat."},
        ]
    },
    "mmc4": {"text_list": ["A boat."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
    "obelics": {"images": ["a.png", None], "texts": [None, "A boat."]},
    "grit": {"image": "a.png", "caption": "A boat.", "ref_exps": [[0, 7, 0.1, 0.2, 0.5, 0.9, 0.98]]},
    "refcoco": {"image": "a.png", "bbox": [1, 1, 2, 2], "sentences": ["A boat."]},
    "qwen_refcoco": {"image": "a.png", "sent": "A boat.", "bbox": [1, 1, 2, 2], "width": 8, "height": 8},
    "ocr": {"image": "a.png", "lines": [{"text": "A boat.", "quad": [0, 0, 2, 0, 2, 2, 0, 2]}]},
    "screens": {"image": "a.png", "elements": [{"html": "A boat.", "box": [1, 1, 2, 2]}]},
    "chart": {"imgname": "a.png", "query": "What?", "label": "A boat."},
    "pairs": {"images": ["a.png"], "question": "What?", "answer": "A boat."},
    "qwen_vqa": {"image": "a.png", "question": "What?", "question_id": 7, "answer": "A boat."},
    "flan": {"question": "What?", "answer": "A boat.", "image": ["a.png"]},
    "flan_text": {"inputs": "What?", "targets": "A boat."},
    "folder": {"file_name": "a.png", "text": "A boat."},
    "text": {"text": "A boat."},
    "coco": {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "A boat."}]},
    "karpathy": {
        "images": [{"imgid": 0, "filename": "a.png", "split": "test", "sentences": [{"raw": "A boat."}]}],
        "dataset": "flickr30k",
    },
    "docvqa": {"data": [{"questionId": 7, "question": "What?", "image": "a.png", "answers": ["A boat."]}]},
}
READS: dict[str, set[str]] = {
    "LlavaJson": {"llava", "llava_text", "sharegpt"},
    "MessagesJson": {
        *("llava", "llava_text", "sharegpt", "chatml"),
        *("messages", "messages_image", "parts", "own_paths", "openai"),
    },
    "ChatJson": {"parts", "own_paths", "openai"},
    "QwenJson": {"qwen"},
    "Mmc4": {"mmc4"},
    "Mmc4Pairs": {"mmc4"},
    "Obelics": {"obelics"},
    "GroundedCaptions": {"grit"},
    "ReferringExpressions": {"refcoco"},
    "QwenReferring": {"qwen_refcoco"},
    "TextLines": {"ocr"},
    "ScreenElements": {"screens"},
    "ChartQA": {"chart"},
    "ImagePairs": {"pairs"},
    "QwenQuestions": {"qwen_vqa"},
    "VisualFlan": {"flan", "flan_text", "qwen_vqa"},
    "PlainText": {"text"},
    "ImageFolder": {"folder"},
    "CocoCaptions": {"coco"},
    "KarpathyCaptions": {"karpathy"},
    "DocVQA": {"docvqa"},
}
"""Which forms each reader takes. All other pairs have to be refused."""
READER_OF = {form: [name for name in READS if form in READS[name]] for form in FORMS}


def read(folder: Path, reader: str, *records: Any) -> Any:
    file = folder / ("metadata.jsonl" if reader == "ImageFolder" else "data.json")
    single = len(records) == 1 and reader in ("CocoCaptions", "KarpathyCaptions", "DocVQA")
    file.write_text(json.dumps(records[0]) if single else "\n".join(json.dumps(record) for record in records))
    task = {"task": "vqa"} if reader == "QwenQuestions" else {}
    return getattr(vlm.data, reader)(folder if reader == "ImageFolder" else file, **task)


@pytest.mark.parametrize("reader", READS)
def test_every_reader_reads_a_form_rightly_or_names_the_reader_for_it(tmp_path: Path, reader: str) -> None:
    for form, record in FORMS.items():
        if form in READS[reader]:
            source = read(tmp_path, reader, record)
            sample: Sample = source[0]
            shown = form not in ("llava_text", "flan_text", "text")
            assert source.has_image(0) == bool(source.image_mask()[0]) == shown, form
            assert [image.name for image in sample.images] == ["a.png"] * shown, form
            texts = [part.text for message in sample.messages for part in message.content if hasattr(part, "text")]
            assert any("A boat." in text for text in (*texts, *(text for text, _ in sample.answers))) or form in (
                "qwen_refcoco",
            ), form
            assert [message.role for message in sample.messages][0] == (
                "system" if form == "sharegpt" else sample.messages[0].role
            ), form
            continue
        if form == "qwen_human" and reader == "QwenJson":
            continue  # refused for its roles, as the form that it is
        with pytest.raises(UserError) as caught:
            read(tmp_path, reader, record)[0]
        message = str(caught.value)
        wanted = READER_OF[form] or ["QwenJson"]
        assert any(f"vlm.data.{name}" in message for name in wanted), (form, message)
        assert "\n" not in message
        assert len(message) < 1000
