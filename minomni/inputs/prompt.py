"""Messages to one sequence of ids: ChatML, places for media, a video's sound and picture in turns
of 2 seconds.
"""

from dataclasses import dataclass, field
from itertools import groupby, zip_longest

import numpy as np
import torch
from torch import Tensor

from minomni.arguments import shown
from minomni.config import OmniConfig
from minomni.errors import UserError
from minomni.inputs.item import Item, kind_and_source, parse_item
from minomni.inputs.media import load_audio, load_image, load_video, name_of
from minomni.inputs.mel import log_mel, num_audio_tokens
from minomni.inputs.patches import (
    Grid,
    frame_size,
    image_patches,
    image_size,
    num_video_tokens,
    video_patches,
)
from minomni.inputs.tokenizer import Tokenizer, special_tokens, valid_unicode

__all__ = [
    "DEFAULT_SYSTEM",
    "Inputs",
    "Processor",
    "join",
    "kind_and_source",
    "messages_of",
    "parts_of",
    "render",
]

ROLES = ("system", "user", "assistant")
SAME_ROLE = {"developer": "system"}  # OpenAI's newer name
# Keys of a message that other programs write, and that could not change an answer here.
WITHOUT_MEANING = frozenset(
    ("annotations", "date", "id", "loss", "metadata", "name", "refusal", "timestamp", "weight")
)
DEFAULT_SYSTEM = "You are a helpful assistant."
MARKS = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}
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
    video_seconds: list[Tensor] = field(
        default_factory=list
    )  # each [t] float32, when a grid step begins
    peaks: list[float] = field(
        default_factory=list
    )  # of each sound, its loudest sample: 1 is full scale


def messages_of(messages: list[dict]) -> list[dict]:
    """Messages as users write them -> the same with role and content alone, developer messages as
    system messages.

    Contents are a text or a list of items, not looked at here. Raises UserError for everything
    else.
    """
    if not isinstance(messages, (list, tuple)):
        raise UserError(
            f"messages is {shown(messages)}; expected a list of dictionaries, such as "
            f"[{{'role': 'user', 'content': 'hello'}}]"
        )
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(message: dict, number: int) -> dict:
    if not isinstance(message, dict):
        raise UserError(
            f"message {number} is {shown(message)}; expected a dictionary with role and content"
        )
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role in ("tool", "function"):
        raise UserError(
            f"the role {role!r} is not known to this model; put what the tool answered into a user message"
        )
    role = SAME_ROLE.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise UserError(f"unknown role {shown(role)}; roles are {', '.join(ROLES)}")
    for key, value in message.items():
        is_empty = isinstance(value, (list, dict)) and not value
        if key not in ("role", "content") and key not in WITHOUT_MEANING and not is_empty:
            raise UserError(
                f"a message has the unknown key {shown(key)}; expected role and content"
            )
    content = message.get("content", "")
    if not isinstance(content, (str, list, tuple)):
        raise UserError(
            f"the content of a message is {shown(content)}; expected a text or a list of items"
        )
    return {"role": role, "content": content}


def parts_of(
    messages: list[dict],
    add_generation_prompt: bool,
    add_vision_id: bool = False,
    add_audio_id: bool = False,
) -> list[str | Item]:
    """The release's ChatML as a list of texts and of media items, in reading order.

    A conversation that does not begin with a system message gets the template's own. Raises
    UserError for what are no messages, unknown roles and unknown items.
    """
    counts, parts = dict.fromkeys(COUNTED_AS, 0), []
    messages = messages_of(messages)
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    for message in messages:
        parts.append(f"<|im_start|>{message['role']}\n")
        content = message["content"]
        for item in (
            [Item("text", content)] if isinstance(content, str) else map(parse_item, content)
        ):
            if item.kind == "text":
                parts.append(item.source)
                continue
            counts[item.kind] += 1
            if add_audio_id if item.kind == "audio" else add_vision_id:
                parts.append(f"{COUNTED_AS[item.kind]} {counts[item.kind]}: ")
            parts.append(item)
        parts.append("<|im_end|>\n")
    return parts + (["<|im_start|>assistant\n"] if add_generation_prompt else [])


def render(
    messages: list[dict],
    add_generation_prompt: bool = True,
    add_vision_id: bool = False,
    add_audio_id: bool = False,
) -> str:
    """Messages -> the release's ChatML text, with one placeholder for each picture, sound and
    video.
    """
    parts = parts_of(messages, add_generation_prompt, add_vision_id, add_audio_id)
    return "".join(part if isinstance(part, str) else MARKS[part.kind] for part in parts)


def chunk_bounds(times: Tensor, ids_per_chunk: int) -> list[tuple[int, int]]:
    """Cut increasing times [n], in position ids, into chunks -> (begin, end) index pairs.

    A new chunk begins where a time reaches the next multiple of ids_per_chunk. The threshold moves
    on by one step a crossing even if a time jumps over several (release behaviour), so sparse
    videos make one chunk for each grid step.
    """
    bounds, begin, chunk = [], 0, 1
    for i, time in enumerate(times.tolist()):
        if time >= chunk * ids_per_chunk:
            bounds.append((begin, i))
            begin, chunk = i, chunk + 1
    return bounds + [(begin, len(times))]


def video_times(seconds: Tensor, ids_per_second: int) -> Tensor:
    """Seconds [t] of the grid steps -> their times in position ids [t], not yet truncated (fp32
    like the release).
    """
    return seconds.float() * ids_per_second


class Processor:
    """Turns conversations into Inputs for one size of the model."""

    def __init__(self, config: OmniConfig, tokenizer: Tokenizer):
        """Raises UserError where tokenizer and config disagree on a special token."""
        for name, i in special_tokens(config.thinker.tokens).items():
            if tokenizer.special_tokens.get(name) != i:
                raise UserError(
                    f"{name} is {tokenizer.special_tokens.get(name)} in the tokenizer and {i} in the "
                    f"configuration; use files of one model"
                )
        self.config, self.tokenizer = config, tokenizer

    @property
    def context(self) -> int:
        """Tokens that fit into one prompt."""
        return self.config.thinker.text.max_position_embeddings

    def __call__(
        self,
        conversations: list[list[dict]],
        use_audio_in_video: bool = False,
        add_generation_prompt: bool = True,
    ) -> Inputs:
        """Conversations -> one left-padded batch.

        use_audio_in_video: every video brings its sound track along, in prompt, features and
        positions alike; a video item's own key of this name decides for that video. Raises
        UserError for unreadable media, unknown roles, items or keys, and prompts longer than the
        context.
        """
        if not isinstance(conversations, (list, tuple)) or not conversations:
            raise UserError(
                f"the conversations are {shown(conversations)}; expected a list of at least one, each a "
                f"list of messages"
            )
        rows = [
            self._row(messages, use_audio_in_video, add_generation_prompt)
            for messages in conversations
        ]
        return join(rows, pad=self.config.thinker.tokens.endoftext)

    def _row(self, messages, use_audio_in_video, add_generation_prompt):
        inputs, pieces, images, videos = Inputs(torch.empty(0), torch.empty(0)), [], [], []
        for is_text, parts in groupby(
            parts_of(messages, add_generation_prompt), lambda part: isinstance(part, str)
        ):
            if is_text:  # neighbours merge before they are encoded: words reach over their border
                pieces.append(("a text", self.encode("".join(parts))))
                continue
            for item in parts:
                filled = self._fill(item, use_audio_in_video, inputs, images, videos)
                pieces.append((name_of(item.source, item.kind), filled))
        ids = [i for _, piece in pieces for i in piece]
        if len(ids) > self.context:
            name, longest = max(pieces, key=lambda piece: len(piece[1]))
            raise UserError(
                f"the prompt has {len(ids)} tokens and the context holds {self.context}; the longest item "
                f"is {name} with {len(longest)} tokens, shorten it"
            )
        inputs.input_ids = torch.tensor([ids])
        inputs.attention_mask = torch.ones_like(inputs.input_ids)
        inputs.image_patches, inputs.video_patches = _packed(images), _packed(videos)
        return inputs

    def encode(self, text: str) -> list[int]:
        """Ids of text, in which placeholders of media are refused: positions and features would go
        astray.

        Unpaired surrogates, which are no characters, become U+FFFD. Raises UserError for media's
        tokens, and for texts that cannot fit the context: those are not tokenized first.
        """
        text = valid_unicode(text)
        if len(text) > self.context and self._cannot_fit(text):
            raise UserError(
                f"the prompt has too many tokens and the context holds {self.context}; the longest item is "
                f"a text with {len(text)} characters, shorten it"
            )
        ids, special = self.tokenizer.encode(text), special_tokens(self.config.thinker.tokens)
        typed = [name for name, i in special.items() if name not in CHATML and i in ids]
        if typed:
            raise UserError(
                f"a text holds {typed[0]}, which only media may put there; give the item instead"
            )
        return ids

    def _cannot_fit(self, text: str) -> bool:
        """Whether a text surely makes more tokens than the context holds, told without tokenizing
        it.

        A byte takes at least the share 1 / n of a token, n the length of the longest token that it
        occurs in.
        """
        longest = np.ones(256)
        for token in [
            *self.tokenizer.bytes_of.values(),
            *map(str.encode, self.tokenizer.special_tokens),
        ]:
            for byte in set(token):
                longest[byte] = max(longest[byte], len(token))
        counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return bool((counts / longest).sum() > self.context)

    def _fill(self, item, use_audio_in_video, inputs, images, videos) -> list[int]:
        """Load one item, note its features in `inputs`, and return the ids that stand for it."""
        ids, vision, media = (
            self.config.thinker.tokens,
            self.config.thinker.vision,
            self.config.media,
        )
        name, options = name_of(item.source, item.kind), item.options
        merge = vision.spatial_merge_size**2
        if item.kind == "audio":
            tokens = self._listen(load_audio(item.source, options), inputs)
            return [ids.audio_bos] + [ids.audio] * tokens + [ids.audio_eos]
        if item.kind == "image":
            image = load_image(item.source)
            self._require_room(
                1,
                image_size(image.height, image.width, vision.cell_size, media, name, options),
                name,
            )
            patches, grid = image_patches(image, vision, media, name, options)
            images.append(patches)
            inputs.image_grids.append(grid)
            return [ids.vision_bos] + [ids.image] * (len(patches) // merge) + [ids.vision_eos]
        with_sound = (
            use_audio_in_video if options.use_audio_in_video is None else options.use_audio_in_video
        )
        clip = load_video(
            item.source, media, with_sound, vision.cell_size, options, most_tokens=self.context
        )
        size = tuple(clip.frames.shape[1:3])
        if not clip.sized:
            size = frame_size(len(clip.frames), *size, vision.cell_size, media, name, options)
        self._require_room(len(clip.frames), size, name)
        patches, grid = video_patches(clip.frames, vision, media, name, size)
        videos.append(patches)
        inputs.video_grids.append(grid)
        seconds = clip.seconds[:: vision.temporal_patch_size] - clip.seconds[0]
        inputs.video_seconds.append(seconds)
        cells = grid[1] * grid[2] // merge
        if not with_sound:
            return [ids.vision_bos] + [ids.video] * (grid[0] * cells) + [ids.vision_eos]
        return self._interleave(seconds, cells, self._listen(load_audio(clip.wave), inputs))

    def _require_room(self, n: int, size: tuple[int, int], name: str) -> None:
        """Raise UserError where n frames of a size (height, width) are more tokens than fit, before
        they are made.
        """
        tokens = num_video_tokens(n, size, self.config.thinker.vision)
        if tokens > self.context:
            frames = f" in {n} frames" if n > 1 else ""
            raise UserError(
                f"{name}: {size[1]}x{size[0]} pixels{frames} are {tokens} tokens and the context holds "
                f"{self.context}; shorten it, or set max_pixels"
            )

    def _listen(self, wave, inputs) -> int:
        """Note a wave's mel and return how many tokens it makes."""
        inputs.mels.append(log_mel(wave))
        inputs.peaks.append(float(wave.abs().max()))
        return num_audio_tokens(inputs.mels[-1].shape[-1])

    def _interleave(self, seconds, cells, sound_tokens) -> list[int]:
        """Ids of a video with its sound: both cut every 2 seconds, picture first (paper, sec. 2.2;
        release order).
        """
        thinker, ids = self.config.thinker, self.config.thinker.tokens
        per_chunk = thinker.seconds_per_chunk * thinker.position_id_per_seconds
        pictures = chunk_bounds(video_times(seconds, thinker.position_id_per_seconds), per_chunk)
        sounds = chunk_bounds(torch.arange(sound_tokens), per_chunk)
        body = []
        for seen, heard in zip_longest(pictures, sounds, fillvalue=(0, 0)):
            body += [ids.video] * ((seen[1] - seen[0]) * cells) + [ids.audio] * (
                heard[1] - heard[0]
            )
        return [ids.vision_bos, ids.audio_bos, *body, ids.audio_eos, ids.vision_eos]


def join(rows: list[Inputs], pad: int) -> Inputs:
    """Put single rows into one batch, shorter ones padded on the left with the id `pad`."""
    longest = max(row.input_ids.shape[1] for row in rows)
    lefts = [longest - row.input_ids.shape[1] for row in rows]
    return Inputs(
        torch.cat(
            [
                torch.nn.functional.pad(row.input_ids, (n, 0), value=pad)
                for row, n in zip(rows, lefts)
            ]
        ),
        torch.cat(
            [torch.nn.functional.pad(row.attention_mask, (n, 0)) for row, n in zip(rows, lefts)]
        ),
        mels=[mel for row in rows for mel in row.mels],
        image_patches=_packed([row.image_patches for row in rows]),
        image_grids=[grid for row in rows for grid in row.image_grids],
        video_patches=_packed([row.video_patches for row in rows]),
        video_grids=[grid for row in rows for grid in row.video_grids],
        video_seconds=[seconds for row in rows for seconds in row.video_seconds],
        peaks=[peak for row in rows for peak in row.peaks],
    )


def _packed(patches: list[Tensor | None]) -> Tensor | None:
    """Those that are there, one after another [N, patch_dim]; None where there are none."""
    there = [x for x in patches if x is not None]
    return torch.cat(there) if there else None
