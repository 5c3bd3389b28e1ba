"""Videos as frames: some images of one sample, taken evenly over a folder of frames."""

from functools import cache
from pathlib import Path
from typing import Any

from vlm.data.sources.fields import Fields
from vlm.data.sources.instructions import fill_instruction
from vlm.data.sources.record_sources import IMAGE, RecordSource, exchange, text
from vlm.errors import UserError
from vlm.sample.keys import SUFFIXES


class VideoSource(RecordSource):
    """Records about videos, whose frames lie as images in a folder each.

    `ffmpeg -i video7010.mp4 frames/video7010/%05d.jpg` makes such a folder. Of its n images, in the order of their
    names, those number 0, n / k, 2n / k, ... are taken, cut off to whole numbers, as LAVIS' uniform sampling does. A
    video of fewer frames shows some of them twice.

    Args:
        path: JSON list or JSONL.
        image_root: folder of the folders.
        num_frames: k, images of a sample.
        video_key: of the video's name or number; an ending of a video file is left out.
        folder_pattern: name of the folder from that value.
        whole_steps: n / k itself is cut off to a whole number before it is taken 0, 1, 2, ... times, as the sampling
            of BLIP's own code does.
        **keywords: `name`, `max_pixels` as in `JsonSource`.
    """

    image_key = None

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path,
        num_frames: int,
        video_key: str = "video",
        folder_pattern: str = "{}",
        whole_steps: bool = False,
        **keywords: Any,
    ) -> None:
        if num_frames < 1:
            raise UserError(f"{type(self).__name__}: num_frames must be at least 1, found {num_frames}")
        super().__init__(path, image_root, **keywords)
        self.num_frames, self.whole_steps = num_frames, whole_steps
        self.video_key, self.folder_pattern = video_key, folder_pattern

    @staticmethod
    def _flag(record: Any) -> bool:  # type: ignore[override]
        return True  # every record is about a video

    def frames(self, fields: Fields) -> list[str]:
        """The images of a record's video, from `image_root` on.

        Raises:
            SampleError: there are none.
        """
        value = fields.value(self.video_key)
        folder = self.folder_pattern.format(Path(value).stem if isinstance(value, str) else value)
        names = frame_names(Path(str(self.image_root)) / folder)
        if not names:
            raise fields.error(
                f"no frames of video {value!r} in {Path(str(self.image_root)) / folder}; write them there as images"
            )
        number, step = self.num_frames, len(names) // self.num_frames
        places = [at * step if self.whole_steps else at * len(names) // number for at in range(number)]
        return [f"{folder}/{names[place]}" for place in places]


class VideoQuestions(VideoSource):
    """Questions about videos (iVQA, MSVD-QA, MSRVTT-QA).

    ::

        [{"video": "video7010.mp4", "question": "What is a man doing?", "answer": "sing", "question_id": 7}]

    Args:
        path: JSON list or JSONL.
        image_root: folder of the folders of frames.
        task: of the samples.
        num_frames: images of a sample.
        request: text with `{}` in the place of the question.
        **keywords: of `VideoSource`.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path,
        task: str = "video_qa",
        num_frames: int = 4,
        request: str = "",
        **keywords: Any,
    ) -> None:
        super().__init__(path, image_root, num_frames, **keywords)
        self.task, self.request = task, request

    def chat(self, fields: Fields) -> dict[str, Any]:
        found = fields.record.get("answers", fields.record.get("answer"))
        answers = [found] if isinstance(found, str) and found.strip() else found
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise fields.error("'answer' must be a text, or 'answers' a list of texts")
        put = fill_instruction(self.request, fields.text("question"))
        made: dict[str, Any] = {"id": fields.record.get("question_id", fields.identity)}
        return made | {
            "images": self.frames(fields),
            "messages": exchange([*[IMAGE] * self.num_frames, text(f"\n{put}")], [text(answers[0])]),
            "answers": answers,
        }


class VideoCaptions(VideoSource):
    """Videos and what is said about them, to be found by each other (MSRVTT's split of 1,000 videos).

    ::

        {"clip_name": "video7020", "caption": "a woman creating a fondant baby and flower"}     BLIP's msrvtt_test.jsonl
        [{"video": "video7020.mp4", "caption": ["a woman creating ...", "..."]}]                LAVIS'

    Args:
        path: JSONL or JSON list; each video stands there once, with all of its texts.
        image_root: folder of the folders of frames.
        num_frames: images of a sample.
        video_key: of the video's name.
        **keywords: of `VideoSource`.
    """

    task = "caption"

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path,
        num_frames: int = 8,
        video_key: str = "clip_name",
        **keywords: Any,
    ) -> None:
        super().__init__(path, image_root, num_frames, video_key, **keywords)

    def chat(self, fields: Fields) -> dict[str, Any]:
        several = isinstance(fields.value("caption"), list)
        captions = fields.texts("caption") if several else [fields.text("caption")]
        if not captions:
            raise fields.error("'caption' is empty; remove the video")
        return {
            "id": str(fields.value(self.video_key)),
            "images": self.frames(fields),
            "messages": exchange([IMAGE] * self.num_frames, [text(captions[0])]),
            "answers": captions,
        }


@cache
def frame_names(folder: Path) -> tuple[str, ...]:
    """Images of a folder by name, in order; none where there is no folder."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES))
