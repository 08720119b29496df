"""Messages to one sequence of ids: ChatML, places for media, a video's sound and picture in turns of 2 seconds."""

from dataclasses import dataclass, field
from itertools import groupby, zip_longest

import torch
from torch import Tensor

from ..config import OmniConfig
from ..errors import UserError
from .media import load_audio, load_image, load_video, name_of
from .mel import audio_tokens, log_mel
from .patches import Grid, image_patches, video_patches
from .tokenizer import Tokenizer, special_tokens

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful assistant."
MARKS = {"image": "<|vision_bos|><|IMAGE|><|vision_eos|>", "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
         "video": "<|vision_bos|><|VIDEO|><|vision_eos|>"}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the special tokens that a text may hold
COUNTED_AS = {"image": "Picture", "audio": "Audio", "video": "Video"}


@dataclass
class Inputs:
    """What the Thinker reads. Media lists go in reading order over the whole batch."""

    input_ids: Tensor  # [B, L], padded on the left
    attention_mask: Tensor  # [B, L], 1 where a token is real
    mels: list[Tensor] = field(default_factory=list)  # each [128, F]
    image_patches: Tensor | None = None  # [N, patch_dim]
    image_grids: list[Grid] = field(default_factory=list)
    video_patches: Tensor | None = None  # [N, patch_dim]
    video_grids: list[Grid] = field(default_factory=list)
    video_seconds: list[Tensor] = field(default_factory=list)  # each [t] float32, when a grid step begins
    peaks: list[float] = field(default_factory=list)  # of each sound, its loudest sample: 1 is full scale


def kind_and_source(item: dict) -> tuple[str, object]:
    """What a content item is (image, audio, video or text), and what it holds. Raises UserError for anything else."""
    if not isinstance(item, dict):
        raise UserError(f"a content item is a {type(item).__name__}; expected a dictionary with one of image, audio, "
                        f"video, text")
    for kind in ("image", "audio", "video", "text"):
        if item.get("type") in (kind, f"{kind}_url") or kind in item or f"{kind}_url" in item:
            for key in (kind, f"{kind}_url", "path", "url"):
                if key in item:
                    return kind, item[key]
    raise UserError(f"a content item has the keys {sorted(item)}; expected one of image, audio, video, text")


def parts_of(messages: list[dict], add_generation_prompt: bool, add_vision_id: bool = False,
             add_audio_id: bool = False) -> list[str | tuple[str, object]]:
    """The release's ChatML as a list of texts and of (kind, source) media, in reading order.

    A conversation that does not begin with a system message gets the template's own. Raises UserError for unknown roles
    and items.
    """
    counts, parts = dict.fromkeys(COUNTED_AS, 0), []
    if not messages or messages[0].get("role") != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(f"unknown role {message.get('role')!r}; roles are {', '.join(ROLES)}")
        parts.append(f"<|im_start|>{message['role']}\n")
        content = message.get("content") or ""
        for item in [{"text": content}] if isinstance(content, str) else content:
            kind, source = kind_and_source(item)
            if kind == "text":
                parts.append(str(source))
                continue
            counts[kind] += 1
            if add_audio_id if kind == "audio" else add_vision_id:
                parts.append(f"{COUNTED_AS[kind]} {counts[kind]}: ")
            parts.append((kind, source))
        parts.append("<|im_end|>\n")
    return parts + (["<|im_start|>assistant\n"] if add_generation_prompt else [])


def render(messages: list[dict], add_generation_prompt: bool = True, add_vision_id: bool = False,
           add_audio_id: bool = False) -> str:
    """Messages -> the release's ChatML text, with one placeholder for each picture, sound and video."""
    parts = parts_of(messages, add_generation_prompt, add_vision_id, add_audio_id)
    return "".join(part if isinstance(part, str) else MARKS[part[0]] for part in parts)


def chunk_bounds(times: Tensor, ids_per_chunk: int) -> list[tuple[int, int]]:
    """Cut increasing times [n], in position ids, into chunks -> (begin, end) index pairs.

    A new chunk begins where a time reaches the next multiple of ids_per_chunk. The threshold moves on by one step a
    crossing even if a time jumps over several (release behaviour), so sparse videos make one chunk for each grid step.
    """
    bounds, begin, chunk = [], 0, 1
    for i, time in enumerate(times.tolist()):
        if time >= chunk * ids_per_chunk:
            bounds.append((begin, i))
            begin, chunk = i, chunk + 1
    return bounds + [(begin, len(times))]


def video_times(seconds: Tensor, ids_per_second: int) -> Tensor:
    """Seconds [t] of the grid steps -> their times in position ids [t], not yet truncated (fp32 like the release)."""
    return seconds.float() * ids_per_second


class Processor:
    """Turns conversations into Inputs for one size of the model."""

    def __init__(self, config: OmniConfig, tokenizer: Tokenizer):
        """Raises UserError where tokenizer and config disagree on a special token."""
        for name, i in special_tokens(config.thinker.tokens).items():
            if tokenizer.special_tokens.get(name) != i:
                raise UserError(f"{name} is {tokenizer.special_tokens.get(name)} in the tokenizer and {i} in the "
                                f"configuration; use files of one model")
        self.config, self.tokenizer = config, tokenizer

    def __call__(self, conversations: list[list[dict]], use_audio_in_video: bool = False,
                 add_generation_prompt: bool = True) -> Inputs:
        """Conversations -> one left-padded batch.

        use_audio_in_video: every video brings its sound track along, in prompt, features and positions alike. Raises
        UserError for unreadable media, unknown roles or items, and prompts longer than the context.
        """
        rows = [self._row(messages, use_audio_in_video, add_generation_prompt) for messages in conversations]
        return join(rows, pad=self.config.thinker.tokens.endoftext)

    def _row(self, messages, use_audio_in_video, add_generation_prompt):
        inputs, pieces, images, videos = Inputs(torch.empty(0), torch.empty(0)), [], [], []
        for is_text, parts in groupby(parts_of(messages, add_generation_prompt), lambda part: isinstance(part, str)):
            if is_text:  # neighbours merge before they are encoded: words reach over their border
                pieces.append(("a text", self.encode("".join(parts))))
                continue
            for kind, source in parts:
                filled = self._fill(kind, source, use_audio_in_video, inputs, images, videos)
                pieces.append((name_of(source, kind), filled))
        ids = [i for _, piece in pieces for i in piece]
        limit = self.config.thinker.text.max_position_embeddings
        if len(ids) > limit:
            name, longest = max(pieces, key=lambda piece: len(piece[1]))
            raise UserError(f"the prompt has {len(ids)} tokens and the context holds {limit}; the longest item is "
                            f"{name} with {len(longest)} tokens, shorten it")
        inputs.input_ids = torch.tensor([ids])
        inputs.attention_mask = torch.ones_like(inputs.input_ids)
        inputs.image_patches, inputs.video_patches = _packed(images), _packed(videos)
        return inputs

    def encode(self, text: str) -> list[int]:
        """Ids of text, in which nobody may type what stands for media: positions and features would go astray."""
        ids, special = self.tokenizer.encode(text), special_tokens(self.config.thinker.tokens)
        typed = [name for name, i in special.items() if name not in CHATML and i in ids]
        if typed:
            raise UserError(f"a text holds {typed[0]}, which only media may put there; give the item instead")
        return ids

    def _fill(self, kind, source, use_audio_in_video, inputs, images, videos) -> list[int]:
        """Load one item, note its features in `inputs`, and return the ids that stand for it."""
        ids, vision, media = self.config.thinker.tokens, self.config.thinker.vision, self.config.media
        merge = vision.spatial_merge_size**2
        if kind == "audio":
            return [ids.audio_bos] + [ids.audio] * self._listen(load_audio(source), inputs) + [ids.audio_eos]
        if kind == "image":
            patches, grid = image_patches(load_image(source), vision, media, name_of(source, kind))
            images.append(patches)
            inputs.image_grids.append(grid)
            return [ids.vision_bos] + [ids.image] * (len(patches) // merge) + [ids.vision_eos]
        clip = load_video(source, media, use_audio_in_video, vision.cell_size)
        patches, grid = video_patches(clip.frames, vision, media, name_of(source, kind))
        videos.append(patches)
        inputs.video_grids.append(grid)
        seconds = clip.seconds[:: vision.temporal_patch_size] - clip.seconds[0]
        inputs.video_seconds.append(seconds)
        cells = grid[1] * grid[2] // merge
        if not use_audio_in_video:
            return [ids.vision_bos] + [ids.video] * (grid[0] * cells) + [ids.vision_eos]
        return self._interleave(seconds, cells, self._listen(clip.wave, inputs))

    def _listen(self, wave, inputs) -> int:
        """Note a wave's mel and return how many tokens it makes."""
        inputs.mels.append(log_mel(wave))
        inputs.peaks.append(float(wave.abs().max()))
        return audio_tokens(inputs.mels[-1].shape[-1])

    def _interleave(self, seconds, cells, sound_tokens) -> list[int]:
        """Ids of a video with its sound: both cut every 2 seconds, picture first (paper, sec. 2.2; release order)."""
        thinker, ids = self.config.thinker, self.config.thinker.tokens
        per_chunk = thinker.seconds_per_chunk * thinker.position_id_per_seconds
        pictures = chunk_bounds(video_times(seconds, thinker.position_id_per_seconds), per_chunk)
        sounds = chunk_bounds(torch.arange(sound_tokens), per_chunk)
        body = []
        for seen, heard in zip_longest(pictures, sounds, fillvalue=(0, 0)):
            body += [ids.video] * ((seen[1] - seen[0]) * cells) + [ids.audio] * (heard[1] - heard[0])
        return [ids.vision_bos, ids.audio_bos, *body, ids.audio_eos, ids.vision_eos]


def join(rows: list[Inputs], pad: int) -> Inputs:
    """Put single rows into one batch, shorter ones padded on the left with the id `pad`."""
    longest = max(row.input_ids.shape[1] for row in rows)
    lefts = [longest - row.input_ids.shape[1] for row in rows]
    return Inputs(
        torch.cat([torch.nn.functional.pad(row.input_ids, (n, 0), value=pad) for row, n in zip(rows, lefts)]),
        torch.cat([torch.nn.functional.pad(row.attention_mask, (n, 0)) for row, n in zip(rows, lefts)]),
        mels=[mel for row in rows for mel in row.mels],
        image_patches=_packed([row.image_patches for row in rows]),
        image_grids=[grid for row in rows for grid in row.image_grids],
        video_patches=_packed([row.video_patches for row in rows]),
        video_grids=[grid for row in rows for grid in row.video_grids],
        video_seconds=[seconds for row in rows for seconds in row.video_seconds],
        peaks=[peak for row in rows for peak in row.peaks])


def _packed(patches: list[Tensor | None]) -> Tensor | None:
    """Those that are there, one after another [N, patch_dim]; None where there are none."""
    there = [x for x in patches if x is not None]
    return torch.cat(there) if there else None
