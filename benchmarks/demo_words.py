"""What the demos' language model knows about a scene that stands before it in words: a bound on what it says to images.

    python -m benchmarks.demo_words [--language vlm/demo/assets/llama] [--scenes 100]
    python -m benchmarks.demo_words --language vlm/demo/assets/llama_chat --template minigpt4

Scenes of training compositions are told as sentences or as a drawing of 4 x 4 words (`vlm.demo.tasks`), and one
question of each task is asked in the form of the model's own training, or as a system asks whose template is named
(`vlm.demo.chat`). An answer counts if each of its tokens is the likeliest one behind the right ones; of lettered
options, the letter behind the right answer in the model's own mouth.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random

import torch

import vlm  # noqa: F401  (before transformers: repairs torchvision on CPU builds of torch)
from transformers import LlamaForCausalLM

from vlm.batch import IGNORE
from vlm.demo import tasks
from vlm.demo.chat import FORMS, in_form, tokenizers
from vlm.demo.scenes import make_scene
from vlm.prompts import get_template, tokenize
from vlm.sample import Message, TextPart

ASKED = ("vqa", "color", "position", "count", "ocr", "refer", "ground")
WITH_OPTIONS = ("vqa", "color", "position")
LETTERS = "ABCD"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", default="vlm/demo/assets/llama", help="folder (default %(default)s)")
    parser.add_argument("--template", choices=FORMS, help="default: v1, as the first LLaMA was trained")
    parser.add_argument("--scenes", type=int, default=100)
    options = parser.parse_args()
    found = known_in_words(options.language, template=options.template, scenes=options.scenes)
    for (task, told), right in sorted(found.items()):
        print(f"{task:<24} {told:<8} {sum(right) / len(right):.2f} of {len(right)}")


def known_in_words(folder: str, *, template: str | None, scenes: int) -> dict[tuple[str, str], list[float]]:
    """{(task, how the scene is told): 1.0 for a right answer}; of letters also what a guess is worth."""
    model = LlamaForCausalLM.from_pretrained(folder).float().eval()
    tokenizer = tokenizers(Path(folder))[template or "v1"]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)

    @torch.no_grad()
    def ask(told: str, question: str, answer: str) -> tuple[list[int], list[int]]:
        """The answer's tokens, and the likeliest one at each of their places."""
        if template is None:
            texts = {"system": ".", "user": f"{told}\n{question}", "assistant": answer}
            messages = [Message(role, (TextPart(text),)) for role, text in texts.items()]
            row = tokenize(get_template("v1").render(messages), tokenizer)
        else:
            row = in_form(template, told, [(question, answer)], tokenizer, is_prompt=True)
        places = [place for place, label in enumerate(row.labels) if label != IGNORE]
        if template is not None:  # how its answers end says whether another one follows
            places = [place for place in places if tokenizer.decode([row.ids[place]]).strip()]
        likeliest = model(input_ids=torch.tensor([row.ids])).logits[0].argmax(dim=-1)
        return [row.ids[place] for place in places], [int(likeliest[place - 1]) for place in places]

    for number in range(scenes):
        random = Random(f"words {number}")
        scene = make_scene(random, split="train", size=96)
        for how, told in (
            ("lines", tasks.as_lines(scene, "en", random)),
            ("grid", tasks.as_grid(scene, "en", cells=4)),
        ):
            asked = tasks.questions(scene, "en", random)
            for task in ASKED:
                turn = tasks.choose(asked, random, task=task)
                if turn is None or (how == "grid" and task in ("refer", "ground")):  # a drawing has no boxes
                    continue
                question = turn.question.removesuffix(f"\n{tasks.SHORT['en']}")
                right, said = ask(told, question, turn.answer)
                found[task, how].append(float(right == said))
                if task in WITH_OPTIONS:
                    offered = tasks.choices(turn.answer, tasks.OPTIONS[task], random)
                    listed = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, offered, strict=False))
                    letter = LETTERS[offered.index(turn.answer)]
                    question = f"{question}\nContext: N/A\nOptions: {listed}"
                    right, said = ask(told, question, f"So it is {turn.answer}. The answer is {letter}.")
                    at = max(i for i, token in enumerate(right) if tokenizer.decode([token]).strip() == letter)
                    found["letter", how].append(float(right[at] == said[at]))
                    found["letter, guessed", how].append(1 / len(offered))
    return found


if __name__ == "__main__":
    main()
