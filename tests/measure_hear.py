"""What Whisper writes down of the answers of `python run.py hear`.

    python run.py hear
    PYTHONPATH=. python tests/measure_hear.py

Prints what each answer should say and what Whisper base, with an open vocabulary, writes, and how
many of them it writes word for word.
"""

import json

import soundfile
import torch

from minomni import paths
from minomni.eval.outside_judges import OpenRecognizer, spoken_words


def main() -> None:
    recognizer = OpenRecognizer()
    questions = json.loads((paths.data_samples() / "questions.json").read_text(encoding="utf-8"))
    right = 0
    for question in questions:
        path = paths.runs() / "answers" / f"{question['name']}.wav"
        wave, rate = soundfile.read(path, dtype="float32")
        heard = recognizer.transcribe(torch.from_numpy(wave), rate).open
        is_right = heard == spoken_words(question["answer"])
        right += is_right
        print("right" if is_right else "wrong", question["answer"], "| heard:", " ".join(heard))
    print(f"{right} of {len(questions)} answers word for word")


if __name__ == "__main__":
    main()
