"""Stage dpo: direct preference optimization for intelligible speech (paper, sec. 3.3)."""

from random import Random
from typing import Any

import torch
from torch import Tensor

from minomni.config import SamplingConfig
from minomni.data.batching import batched, equally_batched
from minomni.data.examples import ExampleBuilder
from minomni.data.word_errors import edit_distance
from minomni.errors import UserError
from minomni.train import losses
from minomni.train.stages.speech import (
    BATCH,
    THINKER,
    SpeechStage,
    TalkerExample,
    collate,
    talker_prompts,
)

PAUSE = 8  # codes (a third of a second) without a letter that do not yet count as a pause

Pair = tuple[TalkerExample, Tensor, Tensor]  # prompt, chosen codes [m], rejected codes [n]


class DPOStage(SpeechStage):
    """DPO on the Talker's own samples, beside next-code loss on chosen samples and recordings."""

    name = "dpo"
    needs = ("codec", *THINKER, "talker")
    description = (
        "direct preference optimization: the most intelligible of several samples over the worst"
    )
    data = "its own samples of sentences without a recording, and the recorded ones as before"
    beta = 1.0  # the best of 0.03, 0.1, 0.3 and 1 (lab log: sweep of beta)
    samples_per_prompt = 4
    num_prompts = 640
    # Weight of the next-code loss on chosen samples: preference alone did not help.
    sft_weight = 0.5

    def setup(self) -> None:
        """Also sample the preference pairs and compute the reference log-probabilities."""
        super().setup()
        with torch.no_grad():
            self.pairs = equally_batched(self.preference_pairs(), self.recipe.batch)
            self.reference = [self._log_probs(pairs) for pairs in self.pairs]  # [B, 2] each

    def preference_pairs(self) -> list[Pair]:
        """Best and worst of the Talker's samples for each prompt, sorted by length.

        Raises UserError if no sample of a prompt is better than another.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed + 12)
        longest = max(len(example.codes) for example in self.examples)
        sampling = SamplingConfig(
            temperature=0.6,
            top_k=0,
            top_p=0.9,
            repetition_penalty=1.0,
            max_new_tokens=longest * 3 // 2,
        )
        pairs = []
        for prompts in self.dpo_prompts():
            count = self.samples_per_prompt
            repeated = []
            for prompt in prompts:
                repeated += [prompt] * count
            samples = self.speak(repeated, sampling, generator)
            for prompt, own_samples in zip(prompts, batched(samples, count)):
                pair = self.best_and_worst(prompt, own_samples)
                if pair is not None:
                    pairs.append(pair)
        if not pairs:
            raise UserError(
                f"stage {self.name}: the samples of each of {self.num_prompts} "
                "sentences are equally good; the talker stage needs more steps"
            )
        # Pairs of a batch are padded together, so they should have similar lengths.
        pairs.sort(key=lambda pair: len(pair[1]) + len(pair[2]))
        return pairs

    def best_and_worst(self, prompt: TalkerExample, samples: list[Tensor]) -> Pair | None:
        """The samples with the lowest and the highest error score; None if the scores are close."""
        scores = [self.error_score(prompt.text, codes) for codes in samples]
        ranked = sorted(range(len(samples)), key=lambda i: scores[i])
        best = ranked[0]
        worst = ranked[-1]
        if scores[worst] <= scores[best] + 1 or len(samples[best]) == 0:
            return None
        return prompt, samples[best], samples[worst]

    def dpo_prompts(self) -> list[list[TalkerExample]]:
        """Batches of prompts to say long sentences in random voices, without codes."""
        builder = ExampleBuilder(self.omni.config, self.cache)
        random = Random(self.seed + 12)
        examples = [builder.example("say-long", random) for _ in range(self.num_prompts)]
        voices = [voice.bos_token for voice in self.voices.values()]
        no_codes = torch.zeros(0, dtype=torch.long)

        batches = []
        for part in batched(examples, BATCH):
            inputs, targets = builder.collate([[x] for x in part], [random] * len(part))
            batch = []
            for row, example in zip(talker_prompts(self.omni.thinker, inputs, targets), part):
                voice = random.choice(voices)
                batch.append(TalkerExample(*row, voice, no_codes, example.answer))
            batches.append(batch)
        return batches

    def error_score(self, text: str, codes: Tensor) -> float:
        """Letters that our codec transcribes differently, plus a penalty for long pauses."""
        return edit_distance(text, self.transcribe(codes)) + self.long_pauses(codes)

    def long_pauses(self, codes: Tensor) -> float:
        """Half the number of codes by which pauses between letters exceed PAUSE."""
        if len(codes) == 0:
            return 0.0
        letters = self.letter_log_probs(codes).argmax(-1)
        runs, lengths = torch.unique_consecutive(letters, return_counts=True)
        pauses = lengths[runs == 0].tolist()
        # The first and last pause are silence before and after the speech.
        return sum(max(0, length - PAUSE) for length in pauses[1:-1]) / 2

    def _log_probs(self, pairs: list[Pair]) -> Tensor:
        """Log-probabilities [B, 2] of the chosen and the rejected codes."""
        prompts = [prompt for prompt, _, _ in pairs]
        chosen = [codes for _, codes, _ in pairs]
        rejected = [codes for _, _, codes in pairs]
        inputs = collate(prompts + prompts, self.tokens, self.table)
        embeds, position_ids, mask, targets = self.talker.teacher_forced(inputs, chosen + rejected)
        logits = self.talker.codec_head(self.talker.hidden_states(embeds, position_ids, mask))
        return losses.sequence_log_prob(logits, targets).view(2, -1).T

    def whole_batch(self, number: int) -> Any:
        # Each epoch visits all batches of pairs in a random order.
        batches = len(self.pairs)
        epoch = number // batches
        order = Random(f"{self.seed}-dpo-{epoch}").sample(range(batches), batches)
        index = order[number % batches]
        return self.pairs[index], self.reference[index], super().whole_batch(number)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        pairs, reference, examples = batch
        chosen, rejected = self._log_probs(pairs).unbind(1)
        dpo = losses.dpo(chosen, rejected, reference[:, 0], reference[:, 1], self.beta)
        # Each sample counts with its stop code.
        chosen_codes = torch.tensor(sum(len(codes) + 1 for _, codes, _ in pairs))
        return {
            "dpo": dpo,
            "sft": -self.sft_weight * losses.ratio(chosen.sum(), chosen_codes),
            **super().losses(examples),
        }
