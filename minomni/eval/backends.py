"""The two backends of `bench parts`: each part is measured here and in the official code.

Methods of the same name measure the same part with the same weights on the same inputs, and return
a Measurement. The official code is transformers, which only this benchmark needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minomni import load
from minomni.chat.generate import generate_tokens, seeded_generator
from minomni.chat.reply import AudioChunk
from minomni.checkpoint.quantize import without_import_notes
from minomni.config import IGNORE_INDEX, INPUT_SAMPLE_RATE, SamplingConfig
from minomni.errors import UserError
from minomni.eval.benchmark_utils import Clock, cache_bytes, noise, weight_bytes
from minomni.inputs.mel import log_mel
from minomni.inputs.patches import image_patches, video_patches
from minomni.inputs.prompt import Inputs
from minomni.inputs.tokenizer import special_tokens
from minomni.omni import Omni
from minomni.token2wav.ode_solver import with_euler
from minomni.token2wav.streaming import SpeechStream, low_latency_schedule
from minomni.train.losses import next_token

WORDS_PER_S = 3  # text tokens per second of speech
TEXT_BEFORE_CODES = 2  # text tokens of the reply in which the Talker's steps are timed
VIDEO_SIZE = 336  # pixels of the height and width of a frame; the official processor keeps it
TRANSFORMERS = "5.24.0"  # the version of requirements-dev.txt


@dataclass(frozen=True)
class Workload:
    """Sizes of the inputs. Those in tokens are cut to what the model's context holds."""

    audio_s: int
    image_size: tuple[int, int]  # height and width in pixels
    video_frames: int
    prompt_tokens: int
    text_tokens: int  # generated after the prompt
    question_s: int  # of the spoken question
    answer_s: int  # of its spoken answer
    speech_s: int  # of the speech that Token2Wav makes
    training_tokens: int
    rounds: int  # repetitions of each measurement, after one that warms up
    probe_mib: int  # of the tensor that is copied to measure the bandwidth
    probe_width: int  # of the matrices that are multiplied to measure the rate


FULL = Workload(30, (448, 672), 16, 1024, 32, 10, 10, 10, 256, 5, 256, 2048)
ON_CPU = replace(FULL, speech_s=2, rounds=3)  # ten seconds of speech take minutes there
SHORT = Workload(2, (56, 84), 4, 64, 4, 1, 1, 1, 16, 1, 8, 256)  # takes seconds, to try it


@dataclass
class Measurement:
    """What one run of a part gives."""

    seconds: dict[str, float]  # by row of the table
    output: Tensor | None = None  # compared between the backends


class Row:
    """Names of the rows of `bench parts`."""

    LOAD = "load"
    LOAD_MEMORY = "load_memory"
    LOG_MEL = "log_mel"
    IMAGE = "image"
    VIDEO = "video"
    AUDIO_ENCODER = "audio_encoder"
    VISION_ENCODER = "vision_encoder"
    PREFILL = "prefill"
    THINKER_STEP = "thinker_step"
    TALKER_STEP = "talker_step"
    TOKEN2WAV = "token2wav"
    TOKEN2WAV_STREAMED = "token2wav_streamed"
    FIRST_AUDIO = "first_audio"
    THINKER_TRAINING = "thinker_training"
    TALKER_TRAINING = "talker_training"


def greedy(count: int) -> SamplingConfig:
    """Take `count` times the most probable token."""
    return SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=count
    )


class Samples:
    """Random inputs of the sizes of Workload, the same for both backends."""

    def __init__(self, omni: Omni, workload: Workload):
        talker, token2wav = omni.require_speech()
        random = seeded_generator(0)
        device = omni.thinker.device
        self.workload = workload
        self.device = device

        # Media.
        self.wave = noise(workload.audio_s, random)
        self.question = noise(workload.question_s, random)
        self.image = torch.randint(256, (*workload.image_size, 3), generator=random).byte()
        frames = (workload.video_frames, VIDEO_SIZE, VIDEO_SIZE, 3)
        self.video = torch.randint(256, frames, generator=random).byte()

        # Token ids of plain text.
        thinker = omni.config.thinker
        vocabulary = min(special_tokens(thinker.tokens).values())
        context = thinker.text.max_position_embeddings // 2
        length = min(workload.prompt_tokens, context)
        self.prompt = torch.randint(vocabulary, (1, length), generator=random).to(device)
        length = min(workload.training_tokens, context)
        self.training_ids = torch.randint(vocabulary, (1, length), generator=random).to(device)

        # Speech codes, and embeddings as the Talker reads them.
        codes_per_second = token2wav.config.codes_per_second
        self.answer_codes = workload.answer_s * codes_per_second
        self.num_codes = workload.speech_s * codes_per_second
        self.codes = torch.randint(omni.num_codes, (1, self.num_codes), generator=random).to(device)
        shape = (1, length, talker.config.embedding_size)
        dtype = talker.codec_head.weight.dtype
        self.talker_embeds = torch.randn(shape, generator=random).to(device, dtype)
        self.talker_targets = torch.randint(omni.num_codes, (1, length), generator=random)
        self.positions = torch.arange(length, device=device).expand(3, 1, -1)


class Backend:
    """What both backends share."""

    device: torch.device

    def timed(self, row: str, run: Callable[[], Tensor]) -> Measurement:
        """Time one call."""
        clock = Clock(self.device)
        with torch.no_grad():
            output = run()
        return Measurement({row: clock.mark()}, output)


class MinomniBackend(Backend):
    """This package."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, workload: Workload):
        """Raises UserError for a model that does not speak."""
        self.omni = load(folder, device, dtype)
        talker, self.token2wav = self.omni.require_speech()
        self.voice = self.omni.voice(next(iter(self.omni.voices)))
        self.device = self.omni.thinker.device
        self.samples = Samples(self.omni, workload)
        self.tokens = self.omni.config.thinker.tokens
        if self.device.type == "cuda":
            self.omni.use_static_steps()

        # The encoders' inputs, on the device, so that no copy is timed.
        config = self.omni.config
        self.mel = log_mel(self.samples.wave).to(self.device, dtype)
        self.still = Image.fromarray(self.samples.image.numpy())
        patches, self.grid = image_patches(self.still, config.thinker.vision, config.media)
        self.patches = patches.to(self.device, dtype)

        # A spoken question. No answer stops by itself: the ids that would stop it never come.
        content = [{"type": "audio", "audio": self.samples.question.numpy()}]
        self.messages = [{"role": "user", "content": content}]
        _, self.question_inputs = self.omni.prepare(self.messages, None, True, False)
        thinker = self.omni.thinker
        unused = replace(self.tokens, im_end=self.tokens.vision_pad)
        thinker.config = replace(thinker.config, tokens=unused)
        bos = talker.config.codec_bos
        talker.config = replace(talker.config, codec_pad=bos, codec_eos=bos)

    def log_mel(self) -> Measurement:
        return self.timed(Row.LOG_MEL, lambda: log_mel(self.samples.wave))

    def image(self) -> Measurement:
        config = self.omni.config
        return self.timed(
            Row.IMAGE, lambda: image_patches(self.still, config.thinker.vision, config.media)[0]
        )

    def video(self) -> Measurement:
        config = self.omni.config
        frames = self.samples.video
        return self.timed(
            Row.VIDEO, lambda: video_patches(frames, config.thinker.vision, config.media)[0]
        )

    def audio_encoder(self) -> Measurement:
        tower = self.omni.thinker.audio_tower
        return self.timed(Row.AUDIO_ENCODER, lambda: tower([self.mel]))

    def vision_encoder(self) -> Measurement:
        visual = self.omni.thinker.visual
        return self.timed(Row.VISION_ENCODER, lambda: visual(self.patches, [self.grid]))

    def prefill(self) -> Any:
        """The prefill of the text prompt."""
        prompt = Inputs(self.samples.prompt, torch.ones_like(self.samples.prompt))
        with torch.no_grad():
            return self.omni.thinker.prefill(prompt, self.omni.thinker.model.new_cache())

    def thinker(self) -> Measurement:
        """Prefill and greedy steps."""
        sampling = (greedy(self.samples.workload.text_tokens), self.omni.config.talker_sampling)
        clock = Clock(self.device)
        ids = []
        for _, step_ids in generate_tokens(self.omni, self.prefill(), None, 0, sampling):
            ids.append(step_ids.cpu())
            clock.mark()
        return Measurement(
            {Row.PREFILL: clock.times[0], Row.THINKER_STEP: clock.step()}, torch.stack(ids, dim=1)
        )

    def answer(self) -> Measurement:
        """A spoken question: until the first audio of the answer, and steps of the Talker."""
        clock = Clock(self.device)
        events = self.omni.stream(
            self.messages,
            temperature=0,
            max_new_tokens=WORDS_PER_S * self.samples.workload.answer_s,
            talker_max_new_tokens=self.samples.answer_codes,
        )
        next(event for event in events if isinstance(event, AudioChunk))
        first_audio_s = clock.mark()
        del events  # stops the answer

        # Each text token starts the clock again, so the last one's codes are left.
        talker_sampling = replace(
            self.omni.config.talker_sampling, max_new_tokens=self.samples.answer_codes
        )
        sampling = (greedy(TEXT_BEFORE_CODES), talker_sampling)
        with torch.no_grad():
            cache = self.omni.thinker.model.new_cache()
            prefill = self.omni.thinker.prefill(self.question_inputs, cache)
        for kind, _ in generate_tokens(self.omni, prefill, [self.voice.bos_token], 0, sampling):
            if kind == "text":
                clock = Clock(self.device)
            else:
                clock.mark()
        return Measurement({Row.FIRST_AUDIO: first_audio_s, Row.TALKER_STEP: clock.step()})

    def speech(self) -> Measurement:
        """Token2Wav, whole."""
        flow = self.omni.config.flow
        generator = seeded_generator(0, self.device)
        return self.timed(
            Row.TOKEN2WAV,
            lambda: self.token2wav(self.samples.codes, self.voice, flow, generator),
        )

    def streamed_speech(self) -> Measurement:
        """Token2Wav in the chunks of a streamed answer."""

        def run() -> Tensor:
            stream = SpeechStream(
                self.token2wav,
                self.voice,
                with_euler(self.omni.config.flow),
                low_latency_schedule(self.token2wav),
                seeded_generator(0),
            )
            return torch.cat([*stream.feed(self.samples.codes), *stream.finish()])

        return self.timed(Row.TOKEN2WAV_STREAMED, run)

    def thinker_training(self) -> Measurement:
        """Forward and backward pass of next-token prediction."""
        ids = self.samples.training_ids
        # The last token has no next one. Its row of the logits is ignored and not cut off, because
        # the gradient of a slice is a copy of all logits. The official code does the same.
        targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)

        def loss() -> Tensor:
            logits = self.omni.thinker(Inputs(ids, torch.ones_like(ids)))
            return next_token(logits, targets)

        return time_backward(Row.THINKER_TRAINING, loss, self.omni.thinker, self.device)

    def talker_training(self) -> Measurement:
        """Forward and backward pass of next-code prediction."""
        talker, _ = self.omni.require_speech()
        samples = self.samples

        def loss() -> Tensor:
            logits = talker(samples.talker_embeds, samples.positions)
            return next_token(logits, samples.talker_targets)

        return time_backward(Row.TALKER_TRAINING, loss, talker, self.device)

    def measurements(self) -> list[Callable[[], Measurement]]:
        """The methods that measure a part."""
        return [
            self.log_mel,
            self.image,
            self.video,
            self.audio_encoder,
            self.vision_encoder,
            self.thinker,
            self.answer,
            self.speech,
            self.streamed_speech,
            self.thinker_training,
            self.talker_training,
        ]

    def flops(self) -> dict[str, int]:
        """Floating-point operations of the rows whose limit is the rate of matrix products."""
        calls: dict[str, Callable[[], object]] = {
            Row.AUDIO_ENCODER: self.audio_encoder,
            Row.VISION_ENCODER: self.vision_encoder,
            Row.PREFILL: self.prefill,
            Row.TOKEN2WAV: self.speech,
            Row.TOKEN2WAV_STREAMED: self.streamed_speech,
            Row.THINKER_TRAINING: self.thinker_training,
            Row.TALKER_TRAINING: self.talker_training,
        }
        counts = {}
        for row, run in calls.items():
            counts[row] = count_flops(run)
        return counts

    def step_bytes(self) -> dict[str, int]:
        """Bytes of weights and of the KV cache that one step reads."""
        talker, _ = self.omni.require_speech()
        thinker = self.omni.thinker
        prompt = self.samples.prompt
        question = self.question_inputs.input_ids
        return {
            Row.THINKER_STEP: weight_bytes(thinker.model.layers, thinker.lm_head)
            + cache_bytes(thinker.model.config, prompt.shape[1], thinker.lm_head.weight.dtype),
            Row.TALKER_STEP: weight_bytes(talker.model.layers, talker.codec_head)
            + cache_bytes(talker.model.config, question.shape[1], talker.codec_head.weight.dtype),
        }


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call.

    Attention is computed by plain matrix products here: torch's counter does not know the fused
    kernel of a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def time_backward(
    row: str, loss: Callable[[], Tensor], module: nn.Module, device: torch.device
) -> Measurement:
    """Time a loss and its gradients. The output is the loss."""
    clock = Clock(device)
    value = loss()
    value.backward()
    seconds = clock.mark()
    module.zero_grad(set_to_none=True)
    return Measurement({row: seconds}, value.detach().float().reshape(1))


def require_transformers() -> Any:
    """The module transformers. Raises UserError where it is not installed."""
    try:
        with without_import_notes():
            import transformers
            from transformers import Qwen2_5OmniForConditionalGeneration  # noqa: F401
            from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl  # noqa: F401
    except ImportError:
        raise UserError(
            f"bench parts compares with transformers {TRANSFORMERS}, and what is installed lacks "
            f"this model or its image processor; run: pip install -r requirements-dev.txt"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class TransformersBackend(Backend):
    """The official code, with the options of MinomniBackend."""

    def __init__(self, folder: Path, dtype: torch.dtype, ours: MinomniBackend):
        """Raises UserError where transformers is not installed."""
        transformers = require_transformers()
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

        hf_class = transformers.Qwen2_5OmniForConditionalGeneration
        with without_import_notes():  # it imports torchao
            self.model = hf_class.from_pretrained(folder, dtype=dtype).to(ours.device).eval()
        self.model.token2wav.float()  # as generate() does
        self.transformers = transformers
        self.feature_extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
        image_class = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil
        self.image_processor = image_class.from_pretrained(folder)
        self.folder = folder
        self.ours = ours
        self.samples = ours.samples
        self.device = ours.device

        # What its own processor makes of the media.
        audio = self.extract(self.samples.wave)
        self.features = audio["input_features"].to(self.device, dtype)
        self.features_mask = audio["attention_mask"].to(self.device)
        self.patches = ours.patches.to(self.device, dtype)
        self.grid = torch.tensor([ours.grid], device=self.device)

    def extract(self, wave: Tensor) -> Any:
        """Log-mel features [1, 128, F] and their mask, with the padding that its processor uses."""
        return self.feature_extractor(
            wave.numpy(),
            sampling_rate=INPUT_SAMPLE_RATE,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )

    def log_mel(self) -> Measurement:
        found = self.timed(Row.LOG_MEL, lambda: self.extract(self.samples.wave)["input_features"])
        assert found.output is not None
        found.output = found.output[0, :, : self.ours.mel.shape[1]]  # without the padding
        return found

    def image(self) -> Measurement:
        still = self.ours.still
        return self.timed(
            Row.IMAGE,
            lambda: self.image_processor([still], return_tensors="pt")["pixel_values"],
        )

    def video(self) -> Measurement:
        """Raises ImportError without torchvision, which the official processor of video needs."""
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        processor = Qwen2VLVideoProcessor.from_pretrained(self.folder)
        frames = self.samples.video.permute(0, 3, 1, 2)
        return self.timed(
            Row.VIDEO,
            lambda: processor([frames], do_sample_frames=False, return_tensors="pt")[
                "pixel_values_videos"
            ],
        )

    def audio_encoder(self) -> Measurement:
        thinker = self.model.thinker
        return self.timed(
            Row.AUDIO_ENCODER,
            lambda: (
                thinker.get_audio_features(
                    self.features, feature_attention_mask=self.features_mask
                ).last_hidden_state
            ),
        )

    def vision_encoder(self) -> Measurement:
        thinker = self.model.thinker
        return self.timed(
            Row.VISION_ENCODER,
            lambda: torch.cat(
                thinker.get_image_features(self.patches, image_grid_thw=self.grid).pooler_output
            ),
        )

    def marks(self, clock: Clock) -> Any:
        """A stopping criterion that records the time of every step and never stops."""

        def mark(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
            clock.mark()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return self.transformers.StoppingCriteriaList([mark])

    def thinker(self, **options: Any) -> Measurement:
        """Prefill and greedy steps. options: of generate()."""
        prompt = self.samples.prompt
        clock = Clock(self.device)
        ids = self.model.thinker.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.samples.workload.text_tokens,
            do_sample=False,
            eos_token_id=[self.ours.tokens.vision_pad],
            pad_token_id=self.ours.tokens.endoftext,
            stopping_criteria=self.marks(clock),
            **options,
        )
        return Measurement(
            {Row.PREFILL: clock.times[0], Row.THINKER_STEP: clock.step()},
            ids[:, prompt.shape[1] :].cpu(),
        )

    def static_thinker(self) -> Measurement:
        """thinker() with a cache of fixed size."""
        return self.thinker(cache_implementation="static", disable_compile=True)

    def compiled_thinker(self) -> Measurement:
        """static_thinker() with compiled steps; the first call compiles, which takes minutes."""
        config = self.transformers.CompileConfig(mode="default")
        config._compile_all_devices = True  # also on a CPU
        return self.thinker(cache_implementation="static", compile_config=config)

    def answer(self) -> Measurement:
        """A spoken question: until the audio of the answer, which comes all at once, and steps of
        the Talker.
        """
        question = self.ours.question_inputs
        sampling = self.ours.omni.config.talker_sampling
        talker_clock = Clock(self.device)
        clock = Clock(self.device)
        audio = self.extract(self.samples.question)

        # Random weights say ids for which there is no sound, and would stop there.
        largest = self.ours.omni.num_codes - 1
        hook = self.model.token2wav.register_forward_pre_hook(
            lambda module, args: (args[0].clamp(max=largest), *args[1:])
        )
        try:
            self.model.generate(
                input_ids=question.input_ids.to(self.device),
                attention_mask=question.attention_mask.to(self.device),
                input_features=audio["input_features"].to(self.device, self.features.dtype),
                feature_attention_mask=audio["attention_mask"].to(self.device),
                speaker=self.ours.voice.name,
                thinker_max_new_tokens=WORDS_PER_S * self.samples.workload.answer_s,
                thinker_do_sample=False,
                thinker_eos_token_id=[self.ours.tokens.vision_pad],
                thinker_pad_token_id=self.ours.tokens.endoftext,
                talker_max_new_tokens=self.samples.answer_codes,
                talker_temperature=sampling.temperature,
                talker_top_k=sampling.top_k,
                talker_top_p=sampling.top_p,
                talker_repetition_penalty=sampling.repetition_penalty,
                talker_eos_token_id=[self.model.talker.codec_bos_token],  # never sampled
                talker_stopping_criteria=self.marks(talker_clock),
                **self.flow(),
            )
        finally:
            hook.remove()
        return Measurement({Row.FIRST_AUDIO: clock.mark(), Row.TALKER_STEP: talker_clock.step()})

    def flow(self) -> dict[str, Any]:
        """Options of generate() for Token2Wav."""
        flow = self.ours.omni.config.flow
        return {
            "token2wav_num_steps": flow.points,
            "token2wav_guidance_scale": flow.guidance,
            "token2wav_sway_coefficient": flow.sway,
        }

    def speech(self) -> Measurement:
        """Token2Wav, whole."""
        voice = self.model.speaker_map[self.ours.voice.name]
        torch.manual_seed(0)  # the noise of MinomniBackend
        options = {name.removeprefix("token2wav_"): value for name, value in self.flow().items()}
        return self.timed(
            Row.TOKEN2WAV,
            lambda: self.model.token2wav(
                self.samples.codes,
                conditioning=voice["cond"].float().to(self.device),
                reference_mel=voice["ref_mel"].float().to(self.device),
                **options,
            ).reshape(-1),
        )

    def thinker_training(self) -> Measurement:
        """Forward and backward pass of next-token prediction."""
        ids = self.samples.training_ids
        thinker = self.model.thinker
        return time_backward(
            Row.THINKER_TRAINING,
            lambda: (
                thinker(
                    input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
                ).loss
            ),
            thinker,
            self.device,
        )

    def talker_training(self) -> Measurement:
        """Forward and backward pass of next-code prediction."""
        samples = self.samples
        talker = self.model.talker

        def loss() -> Tensor:
            logits = talker(
                inputs_embeds=samples.talker_embeds,
                position_ids=samples.positions,
                use_cache=False,
            ).logits
            return next_token(logits, samples.talker_targets)

        return time_backward(Row.TALKER_TRAINING, loss, talker, self.device)
