"""Videos as frames: some images of one sample, taken evenly over a folder of frames."""

from functools import cache
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import IMAGE, RecordSource, exchange, text
from vlm.errors import UserError
from vlm.sample.keys import SUFFIXES


class VideoQuestions(RecordSource):
    """Questions about videos (iVQA, MSVD-QA, MSRVTT-QA), whose frames lie as images in a folder each.

    ::

        [{"video": "video7010.mp4", "question": "What is a man doing?", "answer": "sing", "question_id": 7}]

    `ffmpeg -i video7010.mp4 frames/video7010/%05d.jpg` makes such a folder. Of its n images, in the order of their
    names, those number 0, n / k, 2n / k, ... are taken, cut off to whole numbers, as LAVIS' uniform sampling does. A
    video of fewer frames shows some of them twice.

    Args:
        path: JSON list or JSONL.
        image_root: folder of the folders.
        task: of the samples.
        num_frames: k, images of a sample.
        video_key: of the video's name or number; an ending of a video file is left out.
        folder_pattern: name of the folder from that value.
        request: text with `{}` in the place of the question.
        **keywords: `name`, `max_pixels` as in `JsonSource`.
    """

    image_key = None

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path,
        task: str = "video_qa",
        num_frames: int = 4,
        video_key: str = "video",
        folder_pattern: str = "{}",
        request: str = "",
        **keywords: Any,
    ) -> None:
        if num_frames < 1:
            raise UserError(f"VideoQuestions: num_frames must be at least 1, found {num_frames}")
        super().__init__(path, image_root, **keywords)
        self.task, self.num_frames, self.request = task, num_frames, request
        self.video_key, self.folder_pattern = video_key, folder_pattern

    @staticmethod
    def _flag(record: Any) -> bool:  # type: ignore[override]
        return True  # every question is about a video

    def chat(self, fields: Fields) -> dict[str, Any]:
        value = fields.value(self.video_key)
        folder = self.folder_pattern.format(Path(value).stem if isinstance(value, str) else value)
        names = frame_names(Path(str(self.image_root)) / folder)
        if not names:
            raise fields.error(
                f"no frames of video {value!r} in {Path(str(self.image_root)) / folder}; write them there as images"
            )
        chosen = [names[at * len(names) // self.num_frames] for at in range(self.num_frames)]
        found = fields.record.get("answers", fields.record.get("answer"))
        answers = [found] if isinstance(found, str) and found.strip() else found
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise fields.error("'answer' must be a text, or 'answers' a list of texts")
        put = fill_instruction(self.request, fields.text("question"))
        made: dict[str, Any] = {"id": fields.record.get("question_id", fields.identity)}
        return made | {
            "images": [f"{folder}/{name}" for name in chosen],
            "messages": exchange([*[IMAGE] * self.num_frames, text(f"\n{put}")], [text(answers[0])]),
            "answers": answers,
        }


@cache
def frame_names(folder: Path) -> tuple[str, ...]:
    """Images of a folder by name, in order; none where there is no folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))
