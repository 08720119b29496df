"""Every size of the model as data: frozen dataclasses and one literal OmniConfig per model size.

There are no defaults and no branches. The axes have the same letters in every file of the package:

    B  batch rows              L  tokens of a sequence        D  model width
    H  attention heads         F  mel frames (10 ms each)     T  time steps, of any length
    N  patches, clips or tokens packed one after another      C  channels or codes

Field names are the keys of the release's config.json, so that reading one is copying it. All sizes
share the time base: a mel frame is 10 ms, an audio token and a TMRoPE id 40 ms, a block of the
audio encoder 2 s.
"""

import math
from dataclasses import dataclass, fields, is_dataclass

IGNORE_INDEX = -100  # the target that every cross-entropy skips, as in PyTorch
INPUT_SAMPLE_RATE = 16_000  # Hz, the sampling rate of the audio encoder's and the codec's input
MEL_RATE = 100  # mel frames per second, of input and of generated speech

# Bounds of a configuration that is read from a file.
MAX_SIZE = 2**24  # of any size: products of two stay far below 2**63
MAX_DIT_BLOCK = 1000  # mel frames; any speech is padded to whole blocks, the release has 24
MAX_LAYERS = 1024  # of any module, so that a model is built in seconds
MAX_LIST_LENGTH = 32  # kernel sizes, rates, channels: one entry per convolution
# Bounds of the fields of SamplingConfig. Dividing logits by a smaller temperature, or by a smaller
# penalty, would leave the range of float32.
SAMPLING_BOUNDS: dict[str, tuple] = {
    "temperature": (0.001, 1000),  # or 0
    "top_k": (-1, MAX_SIZE),
    "top_p": (1e-9, 1),
    "repetition_penalty": (0.001, 1000),
    "max_new_tokens": (1, 1_000_000),
}


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_int(name: str, value, low: int, high: int) -> None:
    """Raise ValueError unless the value is a whole number from low to high."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(
        whole and low <= value <= high,
        f"{name} is {value!r:.60}, expected a whole number from {low} to {high}",
    )


def require_number(name: str, value, low: float, high: float) -> None:
    """Raise ValueError unless the value is a finite number from low to high."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(
        number and low <= value <= high,
        f"{name} is {value!r:.60}, expected a number from {low:g} to {high:g}",
    )


def require_id(name: str, token: int, vocab_size: int) -> None:
    """Raise ValueError unless a token id has an embedding."""
    require(
        token < vocab_size,
        f"the token id {name} is {token}, expected one below vocab_size {vocab_size}",
    )


def require_sizes(config, indexes: tuple[str, ...] = (), layers: tuple[str, ...] = ()) -> None:
    """Check every whole number of a config dataclass, those in tuples included.

    Sizes are at least 1. `indexes` names the fields that count from 0, `layers` the fields that are
    a number of layers. Raises ValueError.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        low = 0 if field.name in indexes else 1
        high = MAX_LAYERS if field.name in layers else MAX_SIZE
        if field.type is int:
            require_int(field.name, value, low, high)
        elif field.type is not float and not is_dataclass(value):
            longest = MAX_LAYERS if field.name in indexes else MAX_LIST_LENGTH
            nested = field.type == tuple[tuple[int, ...], ...]
            require_list(field.name, value, low, longest, nested)


def require_list(name: str, value, low: int, longest: int, nested: bool = False) -> None:
    """Raise ValueError unless the value is a tuple of whole numbers, or of tuples of them."""
    kind = "a list of lists" if nested else "a list"
    require(isinstance(value, tuple), f"{name} is {value!r:.60}, expected {kind}")
    require(len(value) <= longest, f"{name} has {len(value)} entries, expected at most {longest}")
    for entry in value:
        if nested:
            require_list(f"an entry of {name}", entry, low, longest)
        else:
            require_int(f"an entry of {name}", entry, low, MAX_SIZE)


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens. No other place has them as numbers."""

    endoftext: int  # pads batches on the left
    im_start: int
    im_end: int  # ends a turn, stops the Thinker
    audio: int  # placeholder, one per audio token
    audio_bos: int
    audio_eos: int
    vision_bos: int
    vision_eos: int
    vision_pad: int
    image: int  # placeholder, one per merged image cell
    video: int  # placeholder, one per merged video cell
    tts_text_start: int  # part of the release, used by nothing
    tts_text_end: int  # the Talker's input after the last text token
    tts_text_pad: int  # the Talker's input at every step after that

    def __post_init__(self):
        require_sizes(self, indexes=tuple(field.name for field in fields(self)))

    def of_thinker(self) -> dict[str, int]:
        """The ids that a Thinker alone uses, by name."""
        return {name: token for name, token in vars(self).items() if name not in TTS_TOKENS}


TTS_TOKENS = ("tts_text_start", "tts_text_end", "tts_text_pad")  # unused by a Thinker alone


@dataclass(frozen=True)
class AudioEncoderConfig:
    num_mel_bins: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    n_window: int  # half an attention block, in mel frames
    max_source_positions: int
    output_dim: int

    def __post_init__(self):
        require_sizes(self, layers=("encoder_layers",))
        heads = self.encoder_attention_heads
        require(
            self.d_model % (2 * heads) == 0,
            f"audio d_model {self.d_model} must split into {heads} heads of even size",
        )


@dataclass(frozen=True)
class VisionEncoderConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    spatial_merge_size: int  # patches along one side of a merge cell
    window_size: int  # pixels
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int

    def __post_init__(self):
        require_sizes(self, indexes=("fullatt_block_indexes",), layers=("depth",))
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"vision hidden_size {self.hidden_size} must split into {self.num_heads} heads of a "
            f"size divisible by 4 (2-D rotary)",
        )
        require(
            self.window_size % self.cell_size == 0,
            f"window_size {self.window_size} must be a multiple of the merge cell of "
            f"{self.cell_size} pixels",
        )

    @property
    def cell_size(self) -> int:
        """Pixels along one side of a merge cell, which becomes one visual token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen2.5 decoder: the Thinker's and, smaller, the Talker's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    # how many of the head_dim / 2 angles follow time, height, width
    mrope_section: tuple[int, int, int]

    def __post_init__(self):
        require_sizes(self, indexes=("mrope_section",), layers=("num_hidden_layers",))
        require_number("rms_norm_eps", self.rms_norm_eps, 0, 1)
        require_number("rope_theta", self.rope_theta, 1, 1e12)
        require(
            len(self.mrope_section) == 3,
            f"mrope_section {self.mrope_section} must have three entries: time, height, width",
        )
        require(
            2 * sum(self.mrope_section) == self.head_dim,
            f"mrope_section {self.mrope_section} must add up to half of head_dim {self.head_dim}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"{self.num_attention_heads} query heads must share {self.num_key_value_heads} "
            f"key/value heads evenly",
        )


@dataclass(frozen=True)
class ThinkerConfig:
    audio: AudioEncoderConfig
    vision: VisionEncoderConfig
    text: DecoderConfig
    tokens: TokenIds
    position_id_per_seconds: int  # TMRoPE ids per second
    seconds_per_chunk: int  # of the chunks in which audio and video of a clip interleave
    tie_word_embeddings: bool  # the text head shares the embedding's weight

    def __post_init__(self):
        for name in ("position_id_per_seconds", "seconds_per_chunk"):
            require_int(name, getattr(self, name), 1, 10_000)
        vocab_size = self.text.vocab_size
        for name, token in self.tokens.of_thinker().items():
            require_id(name, token, vocab_size)
        width = self.text.hidden_size
        require(
            self.audio.output_dim == width,
            f"audio output_dim {self.audio.output_dim} must equal the Thinker's {width}",
        )
        require(
            self.vision.out_hidden_size == width,
            f"vision out_hidden_size {self.vision.out_hidden_size} must equal the Thinker's "
            f"{width}",
        )


@dataclass(frozen=True)
class TalkerConfig:
    embedding_size: int  # width of the Thinker and of the code embeddings
    decoder: DecoderConfig
    codec_pad: int
    codec_bos: int
    codec_eos: int
    codec_mask: int

    def __post_init__(self):
        ids = ("codec_pad", "codec_bos", "codec_eos", "codec_mask")
        require_sizes(self, indexes=ids)
        vocab_size = self.decoder.vocab_size
        for name in ids:
            code = getattr(self, name)
            require(
                code < vocab_size,
                f"the code {name} is {code}, expected one below vocab_size {vocab_size}",
            )

    @property
    def stop_codes(self) -> tuple[int, int]:
        """The ids that end speech."""
        return self.codec_pad, self.codec_eos


@dataclass(frozen=True)
class DiTConfig:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    ff_mult: int
    emb_dim: int  # width of a code embedding
    num_embeds: int  # codes; the table has one row more
    repeats: int  # mel frames per code
    mel_dim: int
    dropout: float
    block_size: int  # mel frames per attention block
    look_ahead_layers: tuple[int, ...]
    look_backward_layers: tuple[int, ...]
    rope_theta: float
    enc_emb_dim: int  # size of the speaker vector `cond`
    enc_dim: int  # size of the ECAPA embedding of the reference mel
    enc_channels: tuple[int, ...]
    enc_kernel_sizes: tuple[int, ...]
    enc_dilations: tuple[int, ...]
    enc_attention_channels: int
    enc_res2net_scale: int
    enc_se_channels: int

    def __post_init__(self):
        require_sizes(
            self,
            indexes=("look_ahead_layers", "look_backward_layers"),
            layers=("num_hidden_layers",),
        )
        require_number("dropout", self.dropout, 0, 0.99)
        require_number("rope_theta", self.rope_theta, 1, 1e12)
        require(
            self.repeats <= MEL_RATE,
            f"repeats is {self.repeats}, expected at most {MEL_RATE} frames (a second) per code",
        )
        lengths = {len(self.enc_channels), len(self.enc_kernel_sizes), len(self.enc_dilations)}
        require(
            len(lengths) == 1 and len(self.enc_channels) > 2,
            "enc_channels, enc_kernel_sizes and enc_dilations must be of equal length, three or "
            "more",
        )
        require(
            len(set(self.enc_channels[:-1])) == 1,
            f"all of enc_channels {self.enc_channels} but the last must be equal",
        )
        require(
            self.enc_channels[0] % self.enc_res2net_scale == 0,
            f"enc_channels {self.enc_channels} must split into enc_res2net_scale "
            f"{self.enc_res2net_scale} groups",
        )
        # Attention grows with its square, and no tensor's shape depends on it.
        require(
            self.block_size <= MAX_DIT_BLOCK,
            f"block_size is {self.block_size}, expected at most {MAX_DIT_BLOCK} mel frames",
        )
        require(
            self.block_size % self.repeats == 0,
            f"block_size {self.block_size} must hold whole codes of {self.repeats} frames",
        )
        require(
            self.enc_channels[-1] == sum(self.enc_channels[1:-1]),
            f"the last of enc_channels {self.enc_channels} must be the sum of the ones between "
            f"first and last",
        )


@dataclass(frozen=True)
class BigVGANConfig:
    mel_dim: int
    upsample_initial_channel: int
    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        require_sizes(self)
        rates, kernels = self.upsample_rates, self.upsample_kernel_sizes
        require(
            len(rates) == len(kernels),
            f"upsample_rates {rates} and upsample_kernel_sizes {kernels} must be of equal length",
        )
        require(
            all(rate <= kernel for rate, kernel in zip(rates, kernels)),
            f"none of upsample_kernel_sizes {kernels} may be smaller than its rate of {rates}",
        )
        sample_rate = MEL_RATE * math.prod(rates)
        require(
            sample_rate <= 768_000,
            f"upsample_rates {rates} make {sample_rate} samples a second, expected at most 768000",
        )
        channels = self.upsample_initial_channel
        require(
            channels >= 2 ** len(rates),
            f"upsample_initial_channel {channels} must be halved {len(rates)} times",
        )
        kernels, dilations = self.resblock_kernel_sizes, self.resblock_dilation_sizes
        require(
            len(kernels) == len(dilations) > 0,
            f"resblock_kernel_sizes {kernels} and resblock_dilation_sizes {dilations} must be of "
            f"equal length",
        )


@dataclass(frozen=True)
class Token2WavConfig:
    dit: DiTConfig
    bigvgan: BigVGANConfig

    def __post_init__(self):
        require(
            self.dit.mel_dim == self.bigvgan.mel_dim,
            f"the DiT makes {self.dit.mel_dim} mel bands, BigVGAN reads {self.bigvgan.mel_dim}",
        )

    @property
    def sample_rate(self) -> int:
        """Sampling rate of the generated speech, in Hz."""
        return MEL_RATE * math.prod(self.bigvgan.upsample_rates)

    @property
    def codes_per_second(self) -> int:
        """Codes per second of speech."""
        return MEL_RATE // self.dit.repeats


@dataclass(frozen=True)
class CodecConfig:
    """Our speech tokenizer; the release has none. The product of the FSQ levels is num_codes."""

    mel_dim: int
    hidden_size: int
    num_hidden_layers: int  # before the quantizer
    num_attention_heads: int
    intermediate_size: int
    levels: tuple[int, ...]
    downsample: int  # mel frames per code, a power of two
    block_frames: int  # mel frames per attention block; encoding streams block by block
    ctc_vocab: int  # the blank and the letters

    def __post_init__(self):
        require_sizes(self, layers=("num_hidden_layers",))
        check_speech_encoder(self)

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return math.prod(self.levels)

    @property
    def highest_code(self) -> int:
        """Codes start at 1: 0 is "no code" in classifier-free guidance."""
        return self.num_codes


@dataclass(frozen=True)
class CodeClassifierConfig:
    """An encoder for codes that another program has defined; `train-encoder` makes it."""

    mel_dim: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_codes: int  # rows of the DiT's table of codes
    downsample: int  # mel frames per code, a power of two
    block_frames: int  # mel frames per attention block
    ctc_vocab: int  # the blank and the letters

    def __post_init__(self):
        require_sizes(self, layers=("num_hidden_layers",))
        check_speech_encoder(self)

    @property
    def highest_code(self) -> int:
        """Codes start at 0."""
        return self.num_codes - 1


def check_speech_encoder(config: CodecConfig | CodeClassifierConfig) -> None:
    """Raise ValueError for sizes that no speech encoder can have."""
    heads = config.num_attention_heads
    require(
        config.hidden_size % heads == 0,
        f"the codec's hidden_size {config.hidden_size} must split into {heads} heads",
    )
    require(
        config.downsample & (config.downsample - 1) == 0,
        f"downsample {config.downsample} must be a power of two",
    )
    require(
        config.block_frames >= config.downsample,
        f"block_frames {config.block_frames} must hold a code of {config.downsample} frames",
    )


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float  # 0 is greedy
    top_k: int  # 0 keeps all tokens; -1, as other programs write it, becomes 0
    top_p: float
    repetition_penalty: float
    max_new_tokens: int

    def __post_init__(self):
        if self.temperature != 0 or isinstance(self.temperature, bool):
            require_number("temperature", self.temperature, *SAMPLING_BOUNDS["temperature"])
        require_int("top_k", self.top_k, *SAMPLING_BOUNDS["top_k"])
        require_number("top_p", self.top_p, *SAMPLING_BOUNDS["top_p"])
        penalty_bounds = SAMPLING_BOUNDS["repetition_penalty"]
        require_number("repetition_penalty", self.repetition_penalty, *penalty_bounds)
        require_int("max_new_tokens", self.max_new_tokens, *SAMPLING_BOUNDS["max_new_tokens"])
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)


@dataclass(frozen=True)
class FlowConfig:
    """How the DiT's differential equation is solved."""

    points: int  # of the time grid, one more than its steps
    solver: str  # "rk4" or "euler"
    guidance: float  # scale of classifier-free guidance
    sway: float  # coefficient of sway sampling, which shifts the time grid

    def __post_init__(self):
        require_int("points", self.points, 2, 1000)
        require(
            self.solver in ("rk4", "euler"), f"solver is {self.solver!r:.60}, expected rk4 or euler"
        )
        require_number("guidance", self.guidance, -100, 100)
        require_number("sway", self.sway, -1, 1)


@dataclass(frozen=True)
class MediaConfig:
    """Limits of images, video frames and clips.

    Pixels count a whole image or frame; clip_max_pixels counts all frames of a clip together.
    """

    image_min_pixels: int
    image_max_pixels: int
    frame_min_pixels: int
    frame_max_pixels: int
    clip_max_pixels: int
    fps: float
    min_frames: int
    max_frames: int
    system_prompt: str  # added where a conversation has none and the reply is spoken

    def __post_init__(self):
        for low, high in (
            ("image_min_pixels", "image_max_pixels"),
            ("frame_min_pixels", "frame_max_pixels"),
            ("frame_min_pixels", "clip_max_pixels"),
            ("min_frames", "max_frames"),
        ):
            for name in (low, high):
                require_int(name, getattr(self, name), 1, 1_000_000_000)
            require(
                getattr(self, low) <= getattr(self, high),
                f"{low} {getattr(self, low)} is more than {high} {getattr(self, high)}",
            )
        require_number("fps", self.fps, 0.001, 1000)


@dataclass(frozen=True)
class OmniConfig:
    thinker: ThinkerConfig
    talker: TalkerConfig | None  # None for a model that answers in text alone
    token2wav: Token2WavConfig | None  # None where talker is None
    codec: CodecConfig | CodeClassifierConfig | None  # None for the release, which has none
    media: MediaConfig
    thinker_sampling: SamplingConfig
    talker_sampling: SamplingConfig
    flow: FlowConfig

    def __post_init__(self):
        half_block = self.thinker.audio.n_window
        require(
            half_block % 2 == 0,
            f"n_window is {half_block}, expected an even number: tokens would straddle the blocks",
        )
        bands = self.thinker.audio.num_mel_bins
        require(bands == 128, f"num_mel_bins is {bands}, expected 128 as in the input's mel")
        channels = self.thinker.vision.in_channels
        require(channels == 3, f"in_channels is {channels}, expected 3 (RGB)")
        if self.talker is None or self.token2wav is None:
            require(
                self.talker is None and self.token2wav is None and self.codec is None,
                "speech needs a Talker and Token2Wav: one of them, or a codec, is not enough",
            )
            return
        for name in TTS_TOKENS:
            require_id(name, getattr(self.thinker.tokens, name), self.thinker.text.vocab_size)
        require(
            self.talker.embedding_size == self.thinker.text.hidden_size,
            f"the Talker reads width {self.talker.embedding_size}, the Thinker writes "
            f"{self.thinker.text.hidden_size}",
        )
        require(
            self.codec is None or self.codec.downsample == self.token2wav.dit.repeats,
            "codec and DiT disagree on the mel frames per code",
        )
        require(
            self.codec is None or self.codec.highest_code <= self.token2wav.dit.num_embeds,
            "the codec has more codes than the DiT has embeddings",
        )

    @property
    def trained_here(self) -> bool:
        """Whether the model knows the generated world: its vocabulary is that of one of our sizes.

        The ids of the special tokens follow the words of the world and of no other vocabulary. They
        stay where speech is left out and where the codec is replaced.
        """
        own_ids = self.thinker.tokens.of_thinker()
        our_sizes = [size for size in SIZES.values() if isinstance(size.codec, CodecConfig)]
        return any(own_ids == size.thinker.tokens.of_thinker() for size in our_sizes)


QWEN7B = OmniConfig(
    thinker=ThinkerConfig(
        audio=AudioEncoderConfig(
            num_mel_bins=128,
            d_model=1280,
            encoder_layers=32,
            encoder_attention_heads=20,
            encoder_ffn_dim=5120,
            n_window=100,
            max_source_positions=1500,
            output_dim=3584,
        ),
        vision=VisionEncoderConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
            out_hidden_size=3584,
        ),
        text=DecoderConfig(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=152064,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
        ),
        tokens=TokenIds(
            endoftext=151643,
            im_start=151644,
            im_end=151645,
            audio=151646,
            audio_bos=151647,
            audio_eos=151648,
            vision_bos=151652,
            vision_eos=151653,
            vision_pad=151654,
            image=151655,
            video=151656,
            tts_text_start=151860,
            tts_text_end=151861,
            tts_text_pad=151859,
        ),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    ),
    talker=TalkerConfig(
        embedding_size=3584,
        decoder=DecoderConfig(
            hidden_size=896,
            intermediate_size=18944,
            num_hidden_layers=24,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=8448,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
        ),
        codec_pad=8292,
        codec_bos=8293,
        codec_eos=8294,
        codec_mask=8296,
    ),
    token2wav=Token2WavConfig(
        dit=DiTConfig(
            hidden_size=1024,
            num_hidden_layers=22,
            num_attention_heads=16,
            head_dim=64,
            ff_mult=2,
            emb_dim=512,
            num_embeds=8193,
            repeats=2,
            mel_dim=80,
            dropout=0.1,
            block_size=24,
            look_ahead_layers=(10,),
            look_backward_layers=(0, 20),
            rope_theta=1e4,
            enc_emb_dim=192,
            enc_dim=128,
            enc_channels=(256, 256, 256, 256, 768),
            enc_kernel_sizes=(5, 3, 3, 3, 1),
            enc_dilations=(1, 2, 3, 4, 1),
            enc_attention_channels=64,
            enc_res2net_scale=2,
            enc_se_channels=64,
        ),
        bigvgan=BigVGANConfig(
            mel_dim=80,
            upsample_initial_channel=1536,
            upsample_rates=(5, 3, 2, 2, 2, 2),
            upsample_kernel_sizes=(11, 7, 4, 4, 4, 4),
            resblock_kernel_sizes=(3, 7, 11),
            resblock_dilation_sizes=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        ),
    ),
    codec=None,
    media=MediaConfig(
        image_min_pixels=3136,
        image_max_pixels=12_845_056,
        frame_min_pixels=100_352,
        frame_max_pixels=602_112,
        clip_max_pixels=90_316_800,
        fps=2.0,
        min_frames=4,
        max_frames=768,
        system_prompt=(
            "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of "
            "perceiving auditory and visual inputs, as well as generating text and speech."
        ),
    ),
    thinker_sampling=SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=1024
    ),
    talker_sampling=SamplingConfig(
        temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05, max_new_tokens=4096
    ),
    flow=FlowConfig(points=10, solver="rk4", guidance=0.5, sway=-1.0),
)

SMALL = OmniConfig(
    thinker=ThinkerConfig(
        audio=AudioEncoderConfig(
            num_mel_bins=128,
            d_model=256,
            encoder_layers=6,
            encoder_attention_heads=4,
            encoder_ffn_dim=1024,
            n_window=100,
            max_source_positions=1500,
            output_dim=512,
        ),
        vision=VisionEncoderConfig(
            depth=8,
            hidden_size=256,
            intermediate_size=688,
            num_heads=4,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(3, 7),
            out_hidden_size=512,
        ),
        text=DecoderConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=4096,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(8, 12, 12),
        ),
        tokens=TokenIds(
            endoftext=4000,
            im_start=4001,
            im_end=4002,
            audio=4003,
            audio_bos=4004,
            audio_eos=4005,
            vision_bos=4006,
            vision_eos=4007,
            vision_pad=4008,
            image=4009,
            video=4010,
            tts_text_start=4061,
            tts_text_end=4062,
            tts_text_pad=4060,
        ),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    ),
    talker=TalkerConfig(
        embedding_size=512,
        decoder=DecoderConfig(
            hidden_size=384,
            intermediate_size=1152,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=8448,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(8, 12, 12),
        ),
        codec_pad=8292,
        codec_bos=8293,
        codec_eos=8294,
        codec_mask=8296,
    ),
    token2wav=Token2WavConfig(
        dit=DiTConfig(
            hidden_size=384,
            num_hidden_layers=8,
            num_attention_heads=6,
            head_dim=64,
            ff_mult=2,
            emb_dim=256,
            num_embeds=8193,
            repeats=2,
            mel_dim=80,
            dropout=0.1,
            block_size=24,
            look_ahead_layers=(4,),
            look_backward_layers=(0, 7),
            rope_theta=1e4,
            enc_emb_dim=160,
            enc_dim=128,
            enc_channels=(128, 128, 128, 128, 384),
            enc_kernel_sizes=(5, 3, 3, 3, 1),
            enc_dilations=(1, 2, 3, 4, 1),
            enc_attention_channels=64,
            enc_res2net_scale=2,
            enc_se_channels=64,
        ),
        bigvgan=BigVGANConfig(
            mel_dim=80,
            upsample_initial_channel=256,
            upsample_rates=(5, 4, 2, 2, 2),
            upsample_kernel_sizes=(11, 8, 4, 4, 4),
            resblock_kernel_sizes=(3, 7, 11),
            resblock_dilation_sizes=((1, 3, 5), (1, 3, 5), (1, 3, 5)),
        ),
    ),
    codec=CodecConfig(
        mel_dim=80,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        levels=(8, 8, 8, 4, 4),
        downsample=2,
        block_frames=200,
        ctc_vocab=32,
    ),
    media=MediaConfig(
        image_min_pixels=3136,
        image_max_pixels=200_704,
        frame_min_pixels=3136,
        frame_max_pixels=50_176,
        clip_max_pixels=3_211_264,
        fps=2.0,
        min_frames=4,
        max_frames=256,
        system_prompt="You are a helpful assistant.",
    ),
    thinker_sampling=SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=256
    ),
    talker_sampling=SamplingConfig(
        temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.0, max_new_tokens=2048
    ),
    flow=FlowConfig(points=10, solver="rk4", guidance=0.5, sway=-1.0),
)

TINY = OmniConfig(
    thinker=ThinkerConfig(
        audio=AudioEncoderConfig(
            num_mel_bins=128,
            d_model=96,
            encoder_layers=3,
            encoder_attention_heads=3,
            encoder_ffn_dim=256,
            n_window=100,
            max_source_positions=1500,
            output_dim=128,
        ),
        vision=VisionEncoderConfig(
            depth=4,
            hidden_size=96,
            intermediate_size=192,
            num_heads=3,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=(1, 3),
            out_hidden_size=128,
        ),
        text=DecoderConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=512,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(4, 6, 6),
        ),
        tokens=TokenIds(
            endoftext=480,
            im_start=481,
            im_end=482,
            audio=483,
            audio_bos=484,
            audio_eos=485,
            vision_bos=486,
            vision_eos=487,
            vision_pad=488,
            image=489,
            video=490,
            tts_text_start=496,
            tts_text_end=497,
            tts_text_pad=495,
        ),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        tie_word_embeddings=False,
    ),
    talker=TalkerConfig(
        embedding_size=128,
        decoder=DecoderConfig(
            hidden_size=160,
            intermediate_size=480,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=32,
            vocab_size=1024,
            max_position_embeddings=2048,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(4, 6, 6),
        ),
        codec_pad=1012,
        codec_bos=1013,
        codec_eos=1014,
        codec_mask=1016,
    ),
    token2wav=Token2WavConfig(
        dit=DiTConfig(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=2,
            head_dim=64,
            ff_mult=2,
            emb_dim=64,
            num_embeds=1001,
            repeats=4,
            mel_dim=80,
            dropout=0.0,
            block_size=24,
            look_ahead_layers=(3,),
            look_backward_layers=(0, 5),
            rope_theta=50.0,
            enc_emb_dim=160,
            enc_dim=32,
            enc_channels=(32, 32, 32, 32, 96),
            enc_kernel_sizes=(5, 3, 3, 3, 1),
            enc_dilations=(1, 2, 3, 4, 1),
            enc_attention_channels=16,
            enc_res2net_scale=2,
            enc_se_channels=16,
        ),
        bigvgan=BigVGANConfig(
            mel_dim=80,
            upsample_initial_channel=128,
            upsample_rates=(8, 2, 2, 5),
            upsample_kernel_sizes=(16, 4, 4, 11),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
    ),
    codec=CodecConfig(
        mel_dim=80,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        levels=(8, 5, 5, 5),
        downsample=4,
        block_frames=200,
        ctc_vocab=32,
    ),
    media=MediaConfig(
        image_min_pixels=3136,
        image_max_pixels=12_544,
        frame_min_pixels=3136,
        frame_max_pixels=7_056,
        clip_max_pixels=451_584,
        fps=2.0,
        min_frames=4,
        max_frames=64,
        system_prompt="You are a helpful assistant.",
    ),
    thinker_sampling=SamplingConfig(
        temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=256
    ),
    talker_sampling=SamplingConfig(
        temperature=0.5, top_k=20, top_p=0.8, repetition_penalty=1.0, max_new_tokens=256
    ),
    flow=FlowConfig(points=7, solver="rk4", guidance=1.5, sway=-1.0),
)

SIZES = {"tiny": TINY, "small": SMALL, "qwen7b": QWEN7B}
