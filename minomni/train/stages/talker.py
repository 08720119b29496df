"""Stage talker: the next speech code from the Thinker's states (paper, sec. 3.3)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minomni.config import IGNORE_INDEX
from minomni.data.vocabulary import world_tokenizer
from minomni.talker.codec import ctc_align, letters_to_ids
from minomni.train import losses
from minomni.train.stages.speech import THINKER, SpeechStage, TalkerExample, collate

SPACE = int(letters_to_ids(" "))
MAX_WORDS = 32  # word indices of an answer that have a class of their own
WORD_WEIGHT = 0.3  # weight of each of the two auxiliary losses


class TalkerStage(SpeechStage):
    """Next-code loss plus two auxiliary losses on the word that each code speaks.

    An auxiliary head predicts the word's index in the text and its first token; it is discarded
    after training. The Talker must track the current word, but the codes alone give it a late
    signal: without the head it loses its position in long sentences, and confuses new words with
    known ones.
    """

    name = "talker"
    needs = ("codec", *THINKER[:5])  # also works with the later Thinkers, not only with thinker2's
    description = "next code: from the Thinker's states and words to speech codes"
    cache_prefix = "talker-examples-with-words"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.tokenizer = world_tokenizer(self.tokens)
        classes = MAX_WORDS + self.omni.config.thinker.text.vocab_size
        self.word_head = nn.Linear(self.talker.config.decoder.hidden_size, classes)
        self.word_head.to(self.device)

    def make_examples(self) -> list[TalkerExample]:
        examples = super().make_examples()
        return [replace(x, words=self.word_alignment(x.text, x.codes)) for x in examples]

    def word_alignment(self, text: str, codes: Tensor) -> Tensor | None:
        """Index of the word that each code speaks [m], by CTC alignment with our codec.

        None if there are too few codes for the text.
        """
        letters = letters_to_ids(text)
        alignment = ctc_align(self.letter_log_probs(codes), letters)
        if alignment is None:
            return None
        word_of_letter = (letters == SPACE).cumsum(0)
        return word_of_letter[alignment]

    def first_tokens(self, text: str) -> Tensor:
        """First token of each word of a text [words]."""
        return torch.tensor([self.tokenizer.encode(f" {word}")[0] for word in text.split()])

    def parameters(self) -> dict[str, nn.Parameter]:
        head = {f"word_head.{name}": p for name, p in self.word_head.named_parameters()}
        return super().parameters() | head

    def losses(self, batch: list[TalkerExample]) -> dict[str, Tensor]:
        talker = self.talker
        inputs = collate(batch, self.tokens, self.table)
        codes = [example.codes for example in batch]
        embeds, position_ids, mask, targets = talker.teacher_forced(inputs, codes)
        hidden = talker.hidden_states(embeds, position_ids, mask)  # [B, T, D]

        # Auxiliary losses on the current word.
        index_targets, token_targets = self.word_targets(batch, targets.cpu())
        vocab_size = self.omni.config.thinker.text.vocab_size
        word_logits = self.word_head(hidden)
        index_logits, token_logits = word_logits.split([MAX_WORDS, vocab_size], dim=-1)
        return {
            "codes": losses.next_token(talker.codec_head(hidden), targets),
            "word_index": WORD_WEIGHT * losses.next_token(index_logits, index_targets),
            "word": WORD_WEIGHT * losses.next_token(token_logits, token_targets),
        }

    def word_targets(self, examples: list[TalkerExample], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of the auxiliary head from code targets [B, T] -> two [B, T].

        The index of the spoken word, and its first token; IGNORE_INDEX where it is unknown.
        """
        index_targets = torch.full_like(targets, IGNORE_INDEX)
        token_targets = torch.full_like(targets, IGNORE_INDEX)
        for row, example in enumerate(examples):
            if example.words is None:
                continue
            begin = int((targets[row] != IGNORE_INDEX).nonzero()[0])
            end = begin + len(example.words)
            index_targets[row, begin:end] = example.words.clamp(max=MAX_WORDS - 1)
            token_targets[row, begin:end] = self.first_tokens(example.text)[example.words]
        return index_targets, token_targets
