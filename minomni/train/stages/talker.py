"""Stage talker: the next speech code from the Thinker's states (paper, sec. 3.3)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minomni.config import IGNORE_INDEX
from minomni.data.vocabulary import world_tokenizer
from minomni.talker.codec import ctc_align, letters_to_ids
from minomni.train import losses
from minomni.train.stages.speech import THINKER, SpeechStage, TalkerExample, collate

SPACE = int(letters_to_ids(" "))
PLACES = 32  # words of an answer that are told apart by their number
PLACE = 0.3  # weight of each of the two losses on it


class TalkerStage(SpeechStage):
    """Besides the next code it is asked, at each code, which word it is saying, by a head that is
    thrown away.

    That is what a Talker must know to go on, and what the codes alone tell it late: without it, it
    loses its place in long sentences and takes new ones for those it knows.
    """

    name, needs = (
        "talker",
        ("codec", *THINKER[:5]),
    )  # it goes on with later Thinkers as well as with that of thinker2
    about = "next code: from the Thinker's states and words to speech codes"
    kept = "lessons-with-words"

    def __init__(self, *args):
        super().__init__(*args)
        config, encode = self.omni.config, world_tokenizer(self.tokens).encode
        self.first_tokens = lambda text: torch.tensor(
            [encode(f" {word}")[0] for word in text.split()]
        )
        self.place_head = nn.Linear(
            config.talker.decoder.hidden_size, PLACES + config.thinker.text.vocab_size
        )
        self.place_head.to(self.device)

    def make_examples(self):
        return [replace(x, words=self.words_said(x.text, x.codes)) for x in super().make_examples()]

    def words_said(self, text: str, codes: Tensor) -> Tensor | None:
        """Which word of a text each of its codes says [m], as our codec reads them; None where it
        cannot tell.
        """
        letters = letters_to_ids(text)
        places = ctc_align(self.letters(codes), letters)
        return None if places is None else (letters == SPACE).cumsum(0)[places]

    def parameters(self):
        return super().parameters() | {
            f"place_head.{n}": p for n, p in self.place_head.named_parameters()
        }

    def losses(self, lessons):
        omni, tokens = self.omni, self.omni.config.thinker.tokens
        script = collate(lessons, tokens, omni.thinker.model.embed_tokens)
        embeds, position_ids, mask, targets = omni.talker.teacher_forced(
            script, [x.codes for x in lessons]
        )
        hidden = omni.talker.hidden_states(embeds, position_ids, mask)  # [B, T, D]
        places, words = self.said(lessons, targets.cpu())
        at, word = (
            self.place_head(hidden).float().split([PLACES, omni.config.thinker.text.vocab_size], -1)
        )
        return {
            "codes": losses.next_token(omni.talker.codec_head(hidden).float(), targets),
            "place": PLACE * losses.next_token(at, places),
            "word": PLACE * losses.next_token(word, words),
        }

    def said(self, lessons: list[TalkerExample], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where codes are asked for, targets [B, T]: which word of the text is said, and its first
        token [B, T] each.
        """
        places, words = (
            torch.full_like(targets, IGNORE_INDEX),
            torch.full_like(targets, IGNORE_INDEX),
        )
        for row, lesson in enumerate(lessons):
            if lesson.words is not None:
                begin = int((targets[row] != IGNORE_INDEX).nonzero()[0])
                places[row, begin : begin + len(lesson.words)] = lesson.words.clamp(max=PLACES - 1)
                words[row, begin : begin + len(lesson.words)] = self.first_tokens(lesson.text)[
                    lesson.words
                ]
        return places, words
