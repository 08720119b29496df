"""Stage dpo: preference for speech that is understood (paper, sec. 3.3)."""

from random import Random

import torch
from torch import Tensor

from minomni.config import SamplingConfig
from minomni.data.examples import ExampleBuilder
from minomni.data.word_errors import edit_distance
from minomni.errors import UserError
from minomni.train import losses
from minomni.train.stages.speech import THINKER, SpeechStage, TalkerExample, collate, talker_prompts

PAUSE = 8  # codes (a third of a second) without a letter that are no pause yet


class DPOStage(SpeechStage):
    name, needs = "dpo", ("codec", *THINKER, "talker")
    about = "direct preference optimisation: of some tries at long sentences, the best understood over the worst"
    data = "its own tries at sentences that nobody has recorded, and the recorded ones as before"
    beta, tries, prompts = 0.05, 4, 640
    better = 0.5  # weight of the better try as a lesson: preference alone has not helped

    def prepare(self):
        """Pairs (lesson, better codes, worse codes) from the Talker's samples; reference
        log-probabilities.
        """
        lessons = super().prepare()
        generator = torch.Generator(self.device).manual_seed(self.seed + 12)
        room = max(len(lesson.codes) for lesson in lessons) * 3 // 2
        varied = SamplingConfig(
            temperature=0.6, top_k=0, top_p=0.9, repetition_penalty=1.0, max_new_tokens=room
        )
        self.pairs = []
        for part in self.dpo_prompts():
            tried = self.speak(
                [lesson for lesson in part for _ in range(self.tries)], varied, generator
            )
            for i, lesson in enumerate(part):
                ours = tried[i * self.tries :][: self.tries]
                ranked = sorted(
                    (self.error_score(lesson.text, codes), number)
                    for number, codes in enumerate(ours)
                )
                (fewest, best), (most, worst) = ranked[0], ranked[-1]
                if most > fewest + 1 and len(ours[best]):
                    self.pairs.append((lesson, ours[best], ours[worst]))
        if not self.pairs:
            raise UserError(
                f"stage {self.name}: in {self.prompts} sentences no try was better than another; the talker stage needs "
                f"more steps"
            )
        self.pairs.sort(
            key=lambda pair: len(pair[1]) + len(pair[2])
        )  # what is computed together is about as long
        self.reference = [
            self._log_probs(self.pairs[i : i + 16]) for i in range(0, len(self.pairs), 16)
        ]
        return lessons

    def dpo_prompts(self) -> list[list[TalkerExample]]:
        """Long sentences to say, in any voice, without codes: nobody has said them yet. In batches."""
        teacher, random = ExampleBuilder(self.omni.config, self.cache), Random(self.seed + 12)
        examples = [teacher.example("say-long", random) for _ in range(self.prompts)]
        voices, nothing = (
            [voice.bos_token for voice in self.voices.values()],
            torch.zeros(0, dtype=torch.long),
        )
        parts = []
        for begin in range(0, len(examples), 32):
            part = examples[begin : begin + 32]
            rows = talker_prompts(
                self.omni.thinker, *teacher.collate([[example] for example in part], random)
            )
            parts.append(
                [
                    TalkerExample(*row, random.choice(voices), nothing, x.answer)
                    for row, x in zip(rows, part)
                ]
            )
        return parts

    def error_score(self, text: str, codes: Tensor) -> float:
        """What is wrong with some speech: letters that our own codec misreads, and stretches of
        silence within.
        """
        return edit_distance(text, self.transcribe(codes)) + self.long_pauses(codes)

    def long_pauses(self, codes: Tensor) -> float:
        """Codes without a letter, those beyond PAUSE at a time, between the first letter and the
        last; two a fault.
        """
        if len(codes) == 0:
            return 0.0
        runs = torch.unique_consecutive(self.letters(codes).argmax(-1), return_counts=True)
        inner = [n for letter, n in zip(*(row.tolist() for row in runs)) if letter == 0][1:-1]
        return sum(max(0, n - PAUSE) for n in inner) / 2

    def _log_probs(self, pairs):
        """Log-probabilities [2, B] of the better and the worse codes."""
        lessons, better, worse = zip(*pairs)
        script = collate([*lessons, *lessons], self.tokens, self.table)
        embeds, position_ids, mask, targets = self.omni.talker.teacher_forced(
            script, [*better, *worse]
        )
        logits = self.omni.talker(embeds, position_ids, mask)
        return losses.sequence_log_prob(logits, targets).view(2, -1)

    def batch(self, number):
        parts = len(self.reference)
        order = Random(f"{self.seed}-dpo-{number // parts}").sample(range(parts), parts)
        chosen, lessons = order[number % parts], super().batch(number)
        return self.pairs[chosen * 16 : chosen * 16 + 16], self.reference[chosen], lessons

    def losses(self, batch):
        pairs, reference, lessons = batch
        chosen, rejected = self._log_probs(pairs)
        said = sum(len(better) + 1 for _, better, _ in pairs)  # the stop is said too
        return {
            "dpo": losses.dpo(chosen, rejected, *reference, self.beta),
            "better": -self.better * chosen.sum() / said,
            **super().losses(lessons),
        }
