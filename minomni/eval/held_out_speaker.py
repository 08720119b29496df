"""Does a model understand a speaker whom it has not been fine-tuned on?

    minomni train tiny --data recordings/ --held-out jackson

trains on all other speakers and puts the questions of this one to the model before and after.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from minomni.data.jsonl import JsonlRow, read_dataset
from minomni.data.word_errors import word_errors
from minomni.eval.stats import Metric, markdown_table, word_error_metric

if TYPE_CHECKING:
    from minomni.omni import Omni


def held_out_rows(data: Path, omni: "Omni", speaker: str) -> list[JsonlRow]:
    """The rows of one speaker in training data. Raises UserError for data without this speaker."""
    with TemporaryDirectory() as run:
        return list(read_dataset(data, Path(run), omni, speaker).held_out())


def answer_metrics(omni: "Omni", rows: list[JsonlRow]) -> list[Metric]:
    """Answers that equal those of the rows to the letter, and their word error rate.

    The answers are the most likely ones, as text.
    """
    answers = []
    for row in rows:
        reply = omni.respond(
            row.question,
            speech=False,
            use_audio_in_video=row.use_audio_in_video,
            temperature=0.0,
        )
        answers.append(reply.text)
    pairs = [(row.answer, answer.split()) for row, answer in zip(rows, answers, strict=True)]
    correct = sum(answer.split() == words for answer, words in pairs)
    errors = [word_errors(answer, words) for answer, words in pairs]
    return [
        Metric("answers_right", correct / len(rows), len(rows)),
        word_error_metric("answer_wer", errors),
    ]


def comparison(before: list[Metric], after: list[Metric]) -> str:
    """A Markdown table of the same metrics before and after fine-tuning."""
    rows = []
    for one, other in zip(before, after, strict=True):
        name, value, interval, count = one.cells()
        _, tuned_value, tuned_interval, _ = other.cells()
        rows.append([name, f"{value} ({interval})", f"{tuned_value} ({tuned_interval})", count])
    header = ("held-out speaker", "before (95 % interval)", "after (95 % interval)", "of")
    return markdown_table(header, rows)
