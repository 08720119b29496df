"""Shared by the Talker's stages: spoken answers, the Thinker's states for them, and their codes."""

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.config import IGNORE_INDEX, SamplingConfig, TokenIds
from minomni.data.batching import batched, similar_lengths
from minomni.data.codes import cache_key, encode_corpus
from minomni.data.corpus import FIRST_VOICE_OFFSET, corpus, sampling_weights, voices_of_corpus
from minomni.data.examples import ExampleBuilder, estimated_tokens
from minomni.data.scenes import Example
from minomni.data.vocabulary import english
from minomni.data.word_errors import word_error_rate, word_errors
from minomni.files import write_atomically
from minomni.inputs.prompt import Inputs
from minomni.talker.codec import ids_to_letters
from minomni.talker.talker import Talker, TalkerInputs, reply_embeds, special_embeds
from minomni.thinker.thinker import Thinker
from minomni.train import losses
from minomni.train.loop import Stage

if TYPE_CHECKING:
    from minomni.omni import Omni

THINKER = ("language", "audio_align", "vision_align", "thinker1", "thinker2", "thinker3", "chat")
BATCH = 32  # rows per forward pass of the Thinker
# Kinds of prompts to which the recorded sentences are the answers, with sampling weights.
CONTEXTS = {
    "say-typed": 6,
    "say-spoken": 1,
    "scene-typed": 2,
    "scene-spoken": 2,
    "handwriting-typed": 0.3,
    "video-typed": 0.6,
    "sync-typed": 0.4,
}


@dataclass
class TalkerExample:
    """One answer to speak: the Thinker's outputs and the speech codes."""

    prompt: Tensor  # [L, E] final states plus text embeddings
    position_ids: Tensor  # [3, L]
    states: Tensor  # [n - 1, E] of the reply
    voice: int  # token id
    codes: Tensor  # [m]
    text: str
    words: Tensor | None = None  # [m] index of the word that each code speaks; None if unknown


def talker_prompts(
    thinker: Thinker, inputs: Inputs, targets: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run the Thinker over a batch with answers -> what the Talker needs of each row.

    inputs: B rows of length L with left padding; targets [B, L], IGNORE_INDEX outside the answers.
    Per row: prompt [n, E], its position ids [3, n] and reply states [m - 1, E], without padding, on
    the CPU.
    """
    with torch.no_grad():
        prefill = thinker.prefill(inputs)
    states = (prefill.hidden + prefill.text_embeds).cpu()  # [B, L, E]
    position_ids = prefill.position_ids.cpu()  # [3, B, L]
    end = inputs.input_ids.shape[1]

    prompts = []
    for row, mask in enumerate(inputs.attention_mask):
        start = end - int(mask.sum())
        # The last state predicts the answer's first token; the answer's last token is not an input.
        reply_start = end - int((targets[row] != IGNORE_INDEX).sum())
        prompts.append(
            (
                states[row, start:reply_start].clone(),
                position_ids[:, row, start:reply_start].clone(),
                states[row, reply_start : end - 1].clone(),
            )
        )
    return prompts


def collate(examples: list[TalkerExample], tokens: TokenIds, table: nn.Embedding) -> TalkerInputs:
    """A batch for the Talker, prompts left-padded, on the device of the Thinker's embeddings."""
    device = table.weight.device
    lengths = [len(example.prompt) for example in examples]
    longest = max(lengths)

    # Left-pad the prompts, their position ids and the attention mask.
    prompts = []
    positions = []
    for example, length in zip(examples, lengths):
        padding = longest - length
        prompts.append(F.pad(example.prompt, (0, 0, padding, 0)))
        positions.append(F.pad(example.position_ids, (padding, 0), value=1))
    prompt = torch.stack(prompts)  # [B, L, E]
    position_ids = torch.stack(positions, dim=1)  # [3, B, L]
    left_pad = longest - torch.tensor(lengths)[:, None]
    attention_mask = (torch.arange(longest) >= left_pad).long()  # [B, L]

    # Embeddings of the voices and of the replies.
    voice_ids = [example.voice for example in examples]
    text_end, text_pad, voices = special_embeds(tokens, voice_ids, table)
    replies = [reply_embeds(example.states.to(device), text_end, text_pad) for example in examples]
    return TalkerInputs(
        prompt.to(device),
        position_ids.to(device),
        attention_mask.to(device),
        voices,
        replies,
    )


def code_loss(omni: "Omni", examples: list[TalkerExample]) -> Tensor:
    """Mean next-code loss of the Talker on some examples."""
    inputs = collate(examples, omni.config.thinker.tokens, omni.thinker.model.embed_tokens)
    codes = [example.codes for example in examples]
    talker = omni.talker
    assert talker is not None  # only models that speak are trained on speech
    embeds, position_ids, mask, targets = talker.teacher_forced(inputs, codes)
    hidden = talker.hidden_states(embeds, position_ids, mask)
    return losses.next_token(talker.codec_head(hidden), targets)


class SpeechStage(Stage):
    """A stage of the Talker: next-code loss on the recorded sentences as answers."""

    trainable = ("talker.",)
    data = "spoken sentences as answers, with the Thinker's states for them"
    cache_prefix = "talker-examples"  # of the file in the cache

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.tokens = self.omni.config.thinker.tokens
        self.table = self.omni.thinker.model.embed_tokens

    @property
    def talker(self) -> Talker:
        """The Talker. Every size that is trained here has one."""
        assert self.omni.talker is not None
        return self.omni.talker

    def setup(self) -> None:
        """Read the corpus, run the Thinker and the codec over it, and compute the sampling
        weights.
        """
        super().setup()
        self.speech = corpus("speaking", self.cache, english(self.tokens))
        self.recordings = self.draw_recordings()
        self.voices = voices_of_corpus(self.speech, self.tokens.tts_text_pad + FIRST_VOICE_OFFSET)
        self.omni.eval()
        with torch.no_grad():
            self.examples = self.prepare()
        # Prompts and codes are padded separately, so batches are similar in both lengths.
        self.lengths = [(len(x.prompt) // 8, len(x.codes)) for x in self.examples]
        self.weights = sampling_weights([example.text for example in self.examples])

    def draw_recordings(self) -> list[int]:
        """Indices of the recordings that become examples: all, or as many draws as the stage has
        rows.

        A short stage would never see most of the examples, each of which costs a pass of the
        Thinker. Its batches draw from these again, so it sees fewer different recordings: for the
        quick budget's `dpo` about 690, where all examples would give about 1,060.
        """
        utterances = self.speech.utterances
        rows = self.recipe.steps * self.recipe.accumulate * self.recipe.batch
        if rows >= len(utterances):
            return list(range(len(utterances)))
        random = Random(f"{self.seed}-{self.name}-recordings")
        weights = sampling_weights([utterance.text for utterance in utterances])
        drawn = random.choices(range(len(utterances)), weights, k=rows)
        return sorted(set(drawn))

    def prepare(self) -> list[TalkerExample]:
        """One example per chosen recording, from the cache if models and recordings are as then."""
        models = [self.omni.thinker, self.codec]
        key = cache_key(models, self.seed, self.speech.utterances, self.recordings)
        path = self.cache / f"{self.cache_prefix}-{key}.pt"
        if path.exists():
            return [TalkerExample(**row) for row in torch.load(path, weights_only=True)]
        examples = self.make_examples()
        rows = [vars(example) for example in examples]
        write_atomically(path, lambda file: torch.save(rows, file))
        return examples

    def make_examples(self) -> list[TalkerExample]:
        """For each chosen recording a prompt whose answer is its sentence, with the Thinker's
        states.
        """
        builder = ExampleBuilder(self.omni.config, self.cache)
        random = Random(self.seed + 11)
        codes = encode_corpus(self.codec, self.speech, self.cache)
        questions = self.questions(builder, random)

        # A question with the recorded sentence as the answer, or else the request to say it.
        prompts: dict[int, Example] = {}  # by index of the recording
        for i in self.recordings:
            text = self.speech.utterances[i].text
            candidates = questions.get(text)
            prompts[i] = candidates.pop() if candidates else builder.say(text)

        # Prompts of similar length together, to keep padding small.
        order = sorted(self.recordings, key=lambda i: estimated_tokens(prompts[i]))
        examples: dict[int, TalkerExample] = {}
        for indices in batched(order, BATCH):
            dialogues = [[prompts[i]] for i in indices]
            inputs, targets = builder.collate(dialogues, [random] * len(dialogues))
            rows = talker_prompts(self.omni.thinker, inputs, targets)
            for i, row in zip(indices, rows, strict=True):
                utterance = self.speech.utterances[i]
                voice = self.voices[utterance.voice].bos_token
                examples[i] = TalkerExample(*row, voice, codes[i].clone(), utterance.text)
        return [examples[i] for i in self.recordings]

    def questions(self, builder: ExampleBuilder, random: Random) -> dict[str, list[Example]]:
        """Examples about images, video and audio, grouped by their answers."""
        kinds = random.choices(list(CONTEXTS), weights=list(CONTEXTS.values()), k=len(self.speech))
        by_answer: dict[str, list[Example]] = {}
        for kind in kinds:
            if kind != "say-typed":
                example = builder.example(kind, random)
                by_answer.setdefault(example.answer, []).append(example)
        return by_answer

    def whole_batch(self, number: int) -> list[TalkerExample]:
        indices = similar_lengths(
            self.lengths,
            self.recipe.batch,
            self.seed,
            number,
            self.weights,
            pool=32,
        )
        return [self.examples[i] for i in indices]

    def losses(self, batch: list[TalkerExample]) -> dict[str, Tensor]:
        return {"codes": code_loss(self.omni, batch)}

    def speak(
        self,
        examples: list[TalkerExample],
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Codes [m] that the Talker generates for each example."""
        inputs = collate(examples, self.tokens, self.table)
        return self.talker.generate(inputs, sampling, self.omni.num_codes, generator)

    def letter_log_probs(self, codes: Tensor) -> Tensor:
        """Log-probabilities of our codec's CTC head for codes [m] -> [m, classes]."""
        codec = self.codec
        grid = codec.fsq.values(codes.to(self.device))[None]
        return codec.letters(grid)[0]

    def transcribe(self, codes: Tensor) -> str:
        """Our codec's transcript of codes [m].

        The speech recognizer of the evaluation is not used in training.
        """
        if len(codes) == 0:
            return ""
        return ids_to_letters(self.letter_log_probs(codes).argmax(-1))

    def preview_text(self) -> str:
        generator = torch.Generator(self.device).manual_seed(0)
        chosen = self.examples[:: max(1, len(self.examples) // 16)][:16]
        generated = self.speak(chosen, self.omni.config.talker_sampling, generator)
        transcripts = [self.transcribe(codes) for codes in generated]
        errors = [word_errors(x.text, text.split()) for x, text in zip(chosen, transcripts)]
        rate = word_error_rate(errors)
        return f"codec's word error rate {rate:.0%}; {chosen[0].text!r} -> {transcripts[0]!r}"

    def preview_audio(self) -> tuple[str, Tensor]:
        example = self.examples[0]
        codec = self.codec
        generator = torch.Generator(self.device).manual_seed(0)
        codes = self.speak([example], self.omni.config.talker_sampling, generator)[0]
        if len(codes) == 0:
            return example.text, codes.new_zeros(codec.config.downsample, codec.config.mel_dim)
        voice = next(voice for voice in self.voices.values() if voice.bos_token == example.voice)
        grid = codec.fsq.values(codes)[None]
        return example.text, codec.mel(grid, voice.cond.to(self.device))[0]
