"""Stages that teach the Talker: next code, preference for what is understood (DPO), the voices
(paper, sec. 3.3).
"""

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

from minomni.config import SamplingConfig
from minomni.errors import UserError
from minomni.files import write_atomically
from minomni.talker.codec import align, ids_to_letters, letters_to_ids
from minomni.talker.talker import Script, text
from minomni.train import losses
from minomni.train.judge import edits
from minomni.train.loop import Stage
from minomni.train.speech import FIRST_VOICE, balanced, corpus, make_voices
from minomni.train.teacher import Teacher
from minomni.train.vocabulary import english, world_tokenizer
from minomni.train.voice_stages import coded, digest, similar_lengths

SPACE = int(letters_to_ids(" "))
THINKER = ("language", "ears", "eyes", "thinker1", "thinker2", "thinker3", "chat")
PLACES = 32  # words of an answer that are told apart by their number
PLACE = 0.3  # weight of each of the two losses on it
PAUSE = 8  # codes (a third of a second) without a letter that are no pause yet
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
class Lesson:
    """One answer to speak: what the Thinker hands over, and the codes that say it."""

    prompt: Tensor  # [L, E] final states plus text embeddings
    position_ids: Tensor  # [3, L]
    states: Tensor  # [n - 1, E] of the reply
    voice: int  # token id
    codes: Tensor  # [m]
    text: str
    words: Tensor | None = (
        None  # [m] which word of the text each code says, counted from 0; None where unknown
    )


def hand_over(thinker, inputs, targets) -> list[tuple[Tensor, Tensor, Tensor]]:
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
        begin, answer = total - int(mask.sum()), int((targets[row] != losses.IGNORE).sum())
        rows.append(
            (
                spoken[row, begin : total - answer].clone(),
                position_ids[:, row, begin : total - answer].clone(),
                spoken[row, total - answer : total - 1].clone(),
            )
        )
    return rows


def to_script(lessons: list[Lesson], tokens, table) -> Script:
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
    lines = [text(x.states.to(device), end, pad) for x in lessons]
    return Script(prompt.to(device), positions.to(device), mask.to(device), voice, lines)


def code_loss(omni, lessons: list[Lesson]) -> Tensor:
    """Mean next-code loss of the Talker on some lessons."""
    script = to_script(lessons, omni.config.thinker.tokens, omni.thinker.model.embed_tokens)
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
            self.lessons = self.prepare()
        self.lengths = [
            (len(x.prompt) // 8, len(x.codes)) for x in self.lessons
        ]  # each is padded on its own
        self.weights = balanced([x.text for x in self.lessons])

    def prepare(self) -> list[Lesson]:
        """One lesson for every recording, kept in a file that is named by what made them: dpo and
        speakers share it.
        """
        path = (
            self.cache
            / f"{self.kept}-{digest([self.omni.thinker, self.omni.codec], self.seed, self.speech.utterances)}.pt"
        )
        if path.exists():
            return [Lesson(**row) for row in torch.load(path, weights_only=True)]
        lessons = self.make_lessons()
        rows = [vars(lesson) for lesson in lessons]
        write_atomically(path, lambda f: torch.save(rows, f))
        return lessons

    def make_lessons(self) -> list[Lesson]:
        """For every recording a context in which its sentence is the answer, read by the finished
        Thinker.
        """
        teacher, random = Teacher(self.omni.config, self.cache), Random(self.seed + 11)
        codes, lessons = coded(self.omni.codec, self.speech, self.cache), []
        asked = self.questions(teacher, random)
        for begin in range(0, len(self.speech), 32):
            utterances = self.speech.utterances[begin : begin + 32]
            examples = [
                asked[u.text].pop() if asked.get(u.text) else teacher.say(u.text)
                for u in utterances
            ]
            rows = hand_over(
                self.omni.thinker, *teacher.lesson([[example] for example in examples], random)
            )
            lessons += [
                Lesson(*row, self.voices[u.voice].bos_token, code.clone(), u.text)
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
        return [self.lessons[i] for i in indices]

    def losses(self, batch):
        return {"codes": code_loss(self.omni, batch)}

    def speak(
        self, lessons: list[Lesson], sampling: SamplingConfig, generator=None
    ) -> list[Tensor]:
        """Codes the Talker says for some lessons."""
        rows = self.omni.config.token2wav.dit.num_embeds + 1
        return self.omni.talker.generate(
            to_script(lessons, self.tokens, self.table), sampling, rows, generator
        )

    def letters(self, codes: Tensor) -> Tensor:
        """What our own codec reads in codes [m], as log-probabilities [m, classes]."""
        return self.omni.codec.letters(self.omni.codec.fsq.values(codes.to(self.device))[None])[0]

    def hear(self, codes: Tensor) -> str:
        """What our own codec reads in codes; the outside judge is kept for the report."""
        return ids_to_letters(self.letters(codes).argmax(-1)) if len(codes) else ""

    def sample(self):
        generator = torch.Generator(self.device).manual_seed(0)
        chosen = self.lessons[:: max(1, len(self.lessons) // 16)][:16]
        said = self.speak(chosen, self.omni.config.talker_sampling, generator)
        heard = [self.hear(codes) for codes in said]
        wrong = sum(edits(x.text.split(), h.split()) for x, h in zip(chosen, heard)) / sum(
            len(x.text.split()) for x in chosen
        )
        return f"own reader's word error {wrong:.0%}; {chosen[0].text!r} -> {heard[0]!r}"

    def sound(self):
        lesson, codec, generator = (
            self.lessons[0],
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

    def make_lessons(self):
        return [replace(x, words=self.words_said(x.text, x.codes)) for x in super().make_lessons()]

    def words_said(self, text: str, codes: Tensor) -> Tensor | None:
        """Which word of a text each of its codes says [m], as our codec reads them; None where it
        cannot tell.
        """
        letters = letters_to_ids(text)
        places = align(self.letters(codes), letters)
        return None if places is None else (letters == SPACE).cumsum(0)[places]

    def parameters(self):
        return super().parameters() | {
            f"place_head.{n}": p for n, p in self.place_head.named_parameters()
        }

    def losses(self, lessons):
        omni, tokens = self.omni, self.omni.config.thinker.tokens
        script = to_script(lessons, tokens, omni.thinker.model.embed_tokens)
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

    def said(self, lessons: list[Lesson], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where codes are asked for, targets [B, T]: which word of the text is said, and its first
        token [B, T] each.
        """
        places, words = (
            torch.full_like(targets, losses.IGNORE),
            torch.full_like(targets, losses.IGNORE),
        )
        for row, lesson in enumerate(lessons):
            if lesson.words is not None:
                begin = int((targets[row] != losses.IGNORE).nonzero()[0])
                places[row, begin : begin + len(lesson.words)] = lesson.words.clamp(max=PLACES - 1)
                words[row, begin : begin + len(lesson.words)] = self.first_tokens(lesson.text)[
                    lesson.words
                ]
        return places, words


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
        for part in self.wishes():
            tried = self.speak(
                [lesson for lesson in part for _ in range(self.tries)], varied, generator
            )
            for i, lesson in enumerate(part):
                ours = tried[i * self.tries :][: self.tries]
                ranked = sorted(
                    (self.faults(lesson.text, codes), number) for number, codes in enumerate(ours)
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

    def wishes(self) -> list[list[Lesson]]:
        """Long sentences to say, in any voice, without codes: nobody has said them yet. In batches."""
        teacher, random = Teacher(self.omni.config, self.cache), Random(self.seed + 12)
        examples = [teacher.example("say-long", random) for _ in range(self.prompts)]
        voices, nothing = (
            [voice.bos_token for voice in self.voices.values()],
            torch.zeros(0, dtype=torch.long),
        )
        parts = []
        for begin in range(0, len(examples), 32):
            part = examples[begin : begin + 32]
            rows = hand_over(
                self.omni.thinker, *teacher.lesson([[example] for example in part], random)
            )
            parts.append(
                [
                    Lesson(*row, random.choice(voices), nothing, x.answer)
                    for row, x in zip(rows, part)
                ]
            )
        return parts

    def faults(self, text: str, codes: Tensor) -> float:
        """What is wrong with some speech: letters that our own codec misreads, and stretches of
        silence within.
        """
        return edits(text, self.hear(codes)) + self.stalls(codes)

    def stalls(self, codes: Tensor) -> float:
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
        script = to_script([*lessons, *lessons], self.tokens, self.table)
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


class SpeakersStage(SpeechStage):
    name, needs = "speakers", ("codec", *THINKER, "talker", "dpo")
    about = "speaker tuning: all voices once more, at a low rate"
