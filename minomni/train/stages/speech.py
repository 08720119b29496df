"""What the Talker's stages share: spoken answers, the Thinker's states for them, and their codes."""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from minomni.config import IGNORE_INDEX, SamplingConfig
from minomni.data.batching import similar_lengths
from minomni.data.codes import cache_key, encode_corpus
from minomni.data.corpus import FIRST_VOICE, corpus, make_voices, sampling_weights
from minomni.data.examples import ExampleBuilder
from minomni.data.vocabulary import english
from minomni.data.word_errors import edit_distance
from minomni.files import write_atomically
from minomni.talker.codec import ids_to_letters
from minomni.talker.talker import TalkerInputs, reply_embeds
from minomni.train import losses
from minomni.train.loop import Stage

THINKER = ("language", "audio_align", "vision_align", "thinker1", "thinker2", "thinker3", "chat")
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
    """One answer to speak: what the Thinker hands over, and the codes that say it."""

    prompt: Tensor  # [L, E] final states plus text embeddings
    position_ids: Tensor  # [3, L]
    states: Tensor  # [n - 1, E] of the reply
    voice: int  # token id
    codes: Tensor  # [m]
    reply_embeds: str
    words: Tensor | None = (
        None  # [m] which word of the text each code says, counted from 0; None where unknown
    )


def talker_prompts(thinker, inputs, targets) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per row of a lesson: prompt [L, E], its position ids [3, L], reply states [n - 1, E]; no
    padding, on the CPU.
    """
    with torch.no_grad():
        reading = thinker.read(inputs)
    total, rows = inputs.input_ids.shape[1], []
    spoken, position_ids = (
        (reading.hidden + reading.text_embeds).cpu(),
        reading.position_ids.cpu(),
    )  # [B, L, E]
    for row, mask in enumerate(inputs.attention_mask):
        begin, answer = total - int(mask.sum()), int((targets[row] != IGNORE_INDEX).sum())
        rows.append(
            (
                spoken[row, begin : total - answer].clone(),
                position_ids[:, row, begin : total - answer].clone(),
                spoken[row, total - answer : total - 1].clone(),
            )
        )
    return rows


def collate(lessons: list[TalkerExample], tokens, table) -> TalkerInputs:
    """A batch of lessons as the Talker reads it, prompts padded on the left, on the device of the
    Thinker's table.
    """
    device = table.weight.device
    lengths = [len(lesson.prompt) for lesson in lessons]
    longest = max(lengths)
    prompt = torch.stack(
        [
            torch.nn.functional.pad(x.prompt, (0, 0, longest - n, 0))
            for x, n in zip(lessons, lengths)
        ]
    )
    positions = torch.stack(
        [
            torch.nn.functional.pad(x.position_ids, (longest - n, 0), value=1)
            for x, n in zip(lessons, lengths)
        ],
        1,
    )  # [3, B, L]
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()  # [B, L]
    end, pad = (
        table.weight[tokens.tts_text_end].detach(),
        table.weight[tokens.tts_text_pad].detach(),
    )
    voice = table.weight[torch.tensor([x.voice for x in lessons])].detach()
    lines = [reply_embeds(x.states.to(device), end, pad) for x in lessons]
    return TalkerInputs(prompt.to(device), positions.to(device), mask.to(device), voice, lines)


def code_loss(omni, lessons: list[TalkerExample]) -> Tensor:
    """Mean next-code loss of the Talker on some lessons."""
    script = collate(lessons, omni.config.thinker.tokens, omni.thinker.model.embed_tokens)
    embeds, position_ids, mask, targets = omni.talker.teacher_forced(
        script, [lesson.codes for lesson in lessons]
    )
    return losses.next_token(omni.talker(embeds, position_ids, mask), targets)


class SpeechStage(Stage):
    """What the three share: spoken sentences as answers, what the Thinker thinks of them, and how
    they sound.
    """

    learns, data = ("talker.",), "spoken sentences as answers, what the Thinker thinks of them"
    kept = "lessons"  # begins the name of the file that they are kept in

    def __init__(self, *args):
        super().__init__(*args)
        self.speech = corpus("speaking", self.cache, english(self.omni.config.thinker.tokens))
        self.voices = make_voices(
            self.speech, self.omni.config.thinker.tokens.tts_text_pad + FIRST_VOICE
        )
        self.table = self.omni.thinker.model.embed_tokens
        self.tokens = self.omni.config.thinker.tokens
        self.omni.eval()
        with torch.no_grad():
            self.examples = self.prepare()
        self.lengths = [
            (len(x.prompt) // 8, len(x.codes)) for x in self.examples
        ]  # each is padded on its own
        self.weights = sampling_weights([x.text for x in self.examples])

    def prepare(self) -> list[TalkerExample]:
        """One lesson for every recording, kept in a file that is named by what made them: dpo and
        speakers share it.
        """
        path = (
            self.cache
            / f"{self.kept}-{cache_key([self.omni.thinker, self.omni.codec], self.seed, self.speech.utterances)}.pt"
        )
        if path.exists():
            return [TalkerExample(**row) for row in torch.load(path, weights_only=True)]
        lessons = self.make_examples()
        rows = [vars(lesson) for lesson in lessons]
        write_atomically(path, lambda f: torch.save(rows, f))
        return lessons

    def make_examples(self) -> list[TalkerExample]:
        """For every recording a context in which its sentence is the answer, read by the finished
        Thinker.
        """
        teacher, random = ExampleBuilder(self.omni.config, self.cache), Random(self.seed + 11)
        codes, lessons = encode_corpus(self.omni.codec, self.speech, self.cache), []
        asked = self.questions(teacher, random)
        for begin in range(0, len(self.speech), 32):
            utterances = self.speech.utterances[begin : begin + 32]
            examples = [
                asked[u.text].pop() if asked.get(u.text) else teacher.say(u.text)
                for u in utterances
            ]
            rows = talker_prompts(
                self.omni.thinker, *teacher.collate([[example] for example in examples], random)
            )
            lessons += [
                TalkerExample(*row, self.voices[u.voice].bos_token, code.clone(), u.text)
                for row, u, code in zip(rows, utterances, codes[begin : begin + 32])
            ]
        return lessons

    def questions(self, teacher, random) -> dict[str, list]:
        """Examples about things seen and heard, by the sentence that answers them."""
        kinds = random.choices(list(CONTEXTS), weights=list(CONTEXTS.values()), k=len(self.speech))
        asked = {}
        for kind in kinds:
            if kind != "say-typed":
                example = teacher.example(kind, random)
                asked.setdefault(example.answer, []).append(example)
        return asked

    def batch(self, number):
        indices = similar_lengths(
            self.lengths, self.recipe.batch, self.seed, number, self.weights, pool=32
        )
        return [self.examples[i] for i in indices]

    def losses(self, batch):
        return {"codes": code_loss(self.omni, batch)}

    def speak(
        self, lessons: list[TalkerExample], sampling: SamplingConfig, generator=None
    ) -> list[Tensor]:
        """Codes the Talker says for some lessons."""
        rows = self.omni.config.token2wav.dit.num_embeds + 1
        return self.omni.talker.generate(
            collate(lessons, self.tokens, self.table), sampling, rows, generator
        )

    def letters(self, codes: Tensor) -> Tensor:
        """What our own codec reads in codes [m], as log-probabilities [m, classes]."""
        return self.omni.codec.letters(self.omni.codec.fsq.values(codes.to(self.device))[None])[0]

    def transcribe(self, codes: Tensor) -> str:
        """What our own codec reads in codes; the outside judge is kept for the report."""
        return ids_to_letters(self.letters(codes).argmax(-1)) if len(codes) else ""

    def sample(self):
        generator = torch.Generator(self.device).manual_seed(0)
        chosen = self.examples[:: max(1, len(self.examples) // 16)][:16]
        said = self.speak(chosen, self.omni.config.talker_sampling, generator)
        heard = [self.transcribe(codes) for codes in said]
        wrong = sum(edit_distance(x.text.split(), h.split()) for x, h in zip(chosen, heard)) / sum(
            len(x.text.split()) for x in chosen
        )
        return f"own reader's word error {wrong:.0%}; {chosen[0].text!r} -> {heard[0]!r}"

    def sound(self):
        lesson, codec, generator = (
            self.examples[0],
            self.omni.codec,
            torch.Generator(self.device).manual_seed(0),
        )
        codes = self.speak([lesson], self.omni.config.talker_sampling, generator)[0]
        voice = next(voice for voice in self.voices.values() if voice.bos_token == lesson.voice)
        if len(codes) == 0:
            return lesson.text, codes.new_zeros(
                self.omni.config.codec.downsample, codec.config.mel_dim
            )
        return lesson.text, codec.mel(codec.fsq.values(codes)[None], voice.cond.to(self.device))[0]
