"""Messages to one sequence of token ids: ChatML with placeholder tokens for media."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.config import OmniConfig
from minomni.errors import UserError, quote
from minomni.inputs.interleave import interleave
from minomni.inputs.item import Item, parse_item
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

ROLES = ("system", "user", "assistant")
SAME_ROLE = {"developer": "system"}  # OpenAI's newer name
# Keys of a message that other programs write and that could not change a reply here.
IGNORED_MESSAGE_KEYS = frozenset(
    ("annotations", "date", "id", "loss", "metadata", "name", "refusal", "timestamp", "weight")
)
DEFAULT_SYSTEM = "You are a helpful assistant."
PLACEHOLDERS = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # the special tokens that a text may hold
LABELS = {"image": "Picture", "audio": "Audio", "video": "Video"}  # of numbered media


@dataclass
class Inputs:
    """What the Thinker reads. Media lists are in reading order over the whole batch."""

    input_ids: Tensor  # [B, L], left-padded
    attention_mask: Tensor  # [B, L], 0 for padding and 1 for all other tokens
    mels: list[Tensor] = field(default_factory=list)  # each [128, F]
    image_patches: Tensor | None = None  # [N, patch_dim]
    image_grids: list[Grid] = field(default_factory=list)
    video_patches: Tensor | None = None  # [N, patch_dim]
    video_grids: list[Grid] = field(default_factory=list)
    # Of each video [t] float32: when each grid step begins.
    video_seconds: list[Tensor] = field(default_factory=list)
    # Of each audio, the largest absolute sample; 1 is full scale.
    peaks: list[float] = field(default_factory=list)


@dataclass
class MediaFeatures:
    """The features of the media of one conversation, in reading order."""

    mels: list[Tensor] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    image_patches: list[Tensor] = field(default_factory=list)
    image_grids: list[Grid] = field(default_factory=list)
    video_patches: list[Tensor] = field(default_factory=list)
    video_grids: list[Grid] = field(default_factory=list)
    video_seconds: list[Tensor] = field(default_factory=list)


def checked_messages(messages: list[dict]) -> list[dict]:
    """Messages as users write them -> the same with role and content alone.

    Developer messages become system messages. A content is a string or a list of items; the items
    are not checked here. Raises UserError for everything else.
    """
    if not isinstance(messages, (list, tuple)):
        raise UserError(
            f"messages is {quote(messages)}; expected a list of dictionaries, such as "
            f"[{{'role': 'user', 'content': 'hello'}}]"
        )
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(message: dict, number: int) -> dict:
    """One checked message; number counts from 1."""
    if not isinstance(message, dict):
        raise UserError(
            f"message {number} is {quote(message)}; expected a dictionary with role and content"
        )
    message = {key: value for key, value in message.items() if value is not None}
    role = _role(message.get("role"))

    for key, value in message.items():
        is_empty = isinstance(value, (list, dict)) and not value
        if key not in ("role", "content") and key not in IGNORED_MESSAGE_KEYS and not is_empty:
            raise UserError(
                f"a message has the unknown key {quote(key)}; expected role and content"
            )
    content = message.get("content", "")
    if not isinstance(content, (str, list, tuple)):
        raise UserError(
            f"the content of a message is {quote(content)}; expected a string or a list of items"
        )
    return {"role": role, "content": content}


def _role(role: object) -> str:
    """A role of ROLES. Raises UserError for others."""
    if role in ("tool", "function"):
        raise UserError(
            f"the role {role!r} is not known to this model; put the result of the tool into a user "
            f"message"
        )
    if isinstance(role, str):
        role = SAME_ROLE.get(role, role)
    if role not in ROLES:
        raise UserError(f"unknown role {quote(role)}; roles are {', '.join(ROLES)}")
    return role


def chat_parts(
    messages: list[dict],
    add_generation_prompt: bool,
    add_vision_id: bool = False,
    add_audio_id: bool = False,
) -> list[str | Item]:
    """The release's ChatML as a list of strings and media items, in reading order.

    A conversation that does not begin with a system message gets the template's default. Raises
    UserError for wrong messages, unknown roles and unknown items.
    """
    messages = checked_messages(messages)
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]

    parts: list[str | Item] = []
    counts = dict.fromkeys(LABELS, 0)
    for message in messages:
        parts.append(f"<|im_start|>{message['role']}\n")
        for item in _items_of(message["content"]):
            if item.kind == "text":
                parts.append(item.source)
                continue
            counts[item.kind] += 1
            is_numbered = add_audio_id if item.kind == "audio" else add_vision_id
            if is_numbered:
                parts.append(f"{LABELS[item.kind]} {counts[item.kind]}: ")
            parts.append(item)
        parts.append("<|im_end|>\n")
    if add_generation_prompt:
        parts.append("<|im_start|>assistant\n")
    return parts


def _items_of(content: str | list) -> list[Item]:
    """The items of one message; a string is one item."""
    if isinstance(content, str):
        return [Item("text", content)]
    return [parse_item(item) for item in content]


def _joined_texts(parts: list[str | Item]) -> list[str | Item]:
    """The parts with adjacent strings joined: a token may reach across their border."""
    joined: list[str | Item] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def render(
    messages: list[dict],
    add_generation_prompt: bool = True,
    add_vision_id: bool = False,
    add_audio_id: bool = False,
) -> str:
    """Messages -> the release's ChatML text, with one placeholder per image, audio and video."""
    parts = chat_parts(messages, add_generation_prompt, add_vision_id, add_audio_id)
    strings = [part if isinstance(part, str) else PLACEHOLDERS[part.kind] for part in parts]
    return "".join(strings)


class Processor:
    """Turns conversations into Inputs for one size of the model."""

    def __init__(self, config: OmniConfig, tokenizer: Tokenizer):
        """Raises UserError if tokenizer and config disagree on a special token."""
        for name, expected in special_tokens(config.thinker.tokens).items():
            found = tokenizer.special_tokens.get(name)
            if found != expected:
                raise UserError(
                    f"{name} is {found} in the tokenizer and {expected} in the configuration; use "
                    f"files of one model"
                )
        self.config = config
        self.tokenizer = tokenizer

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

        use_audio_in_video: every video includes its audio track, in prompt, features and positions
        alike. A video item's own key of this name takes precedence for that video. Raises UserError
        for unreadable media, unknown roles, items or keys, and prompts longer than the context.
        """
        if not isinstance(conversations, (list, tuple)) or not conversations:
            raise UserError(
                f"the conversations are {quote(conversations)}; expected a list of at least one, "
                f"each a list of messages"
            )
        rows = []
        for messages in conversations:
            row = self.encode_conversation(messages, use_audio_in_video, add_generation_prompt)
            rows.append(row)
        return collate(rows, pad=self.config.thinker.tokens.endoftext)

    def encode_conversation(
        self, messages: list[dict], use_audio_in_video: bool, add_generation_prompt: bool
    ) -> Inputs:
        """One conversation -> a batch of one row. Options and errors as in __call__()."""
        media = MediaFeatures()
        ids: list[int] = []
        pieces: list[tuple[int, str]] = []  # number of tokens and name of each piece of the prompt

        # Texts become tokens, and items become placeholder tokens; their features go into `media`.
        at_least = ""
        for part in _joined_texts(chat_parts(messages, add_generation_prompt)):
            if isinstance(part, Item) and len(ids) > self.context:
                at_least = "at least "  # further media are not loaded, to refuse it early
                break
            if isinstance(part, str):
                name = "a text"
                part_ids = self.encode(part)
            else:
                name = name_of(part.source, part.kind)
                part_ids = self.encode_item(part, use_audio_in_video, media)
            pieces.append((len(part_ids), name))
            ids += part_ids

        if len(ids) > self.context:
            longest, name = max(pieces, key=lambda piece: piece[0])
            raise UserError(
                f"the prompt has {at_least}{len(ids)} tokens and the context holds {self.context}; "
                f"the longest item is {name} with {longest} tokens, shorten it"
            )
        input_ids = torch.tensor([ids])
        return Inputs(
            input_ids,
            torch.ones_like(input_ids),
            mels=media.mels,
            image_patches=_concatenate(media.image_patches),
            image_grids=media.image_grids,
            video_patches=_concatenate(media.video_patches),
            video_grids=media.video_grids,
            video_seconds=media.video_seconds,
            peaks=media.peaks,
        )

    def encode(self, text: str) -> list[int]:
        """Text -> token ids.

        Unpaired surrogates, which are not characters, become U+FFFD. Raises UserError for tokens of
        media in the text, since positions and features would no longer match them, and for text
        that cannot fit into the context: it is refused before it is tokenized.
        """
        text = valid_unicode(text)
        if len(text) > self.context and self._cannot_fit(text):
            raise UserError(
                f"the prompt has too many tokens and the context holds {self.context}; the longest "
                f"item is a text with {len(text)} characters, shorten it"
            )
        ids = self.tokenizer.encode(text)
        for name, token in special_tokens(self.config.thinker.tokens).items():
            if name not in CHATML and token in ids:
                raise UserError(
                    f"a text holds {name}, which only media may put there; give the item instead"
                )
        return ids

    def _cannot_fit(self, text: str) -> bool:
        """Whether a text surely has more tokens than the context holds, without tokenizing it.

        One byte takes at least 1 / n of a token, where n is the length of the longest token that
        contains the byte.
        """
        tokens = list(self.tokenizer.bytes_of.values())
        tokens += [name.encode() for name in self.tokenizer.special_tokens]
        longest = np.ones(256)
        for token in tokens:
            for byte in set(token):
                longest[byte] = max(longest[byte], len(token))

        text_bytes = np.frombuffer(text.encode(), np.uint8)
        counts = np.bincount(text_bytes, minlength=256)
        fewest_tokens = (counts / longest).sum()
        return bool(fewest_tokens > self.context)

    def encode_item(self, item: Item, use_audio_in_video: bool, media: MediaFeatures) -> list[int]:
        """Load one item, append its features to `media`, and return its token ids.

        Raises UserError for unreadable media, and for images and videos that cannot fit into the
        context.
        """
        if item.kind == "audio":
            return self.encode_audio(item, media)
        if item.kind == "image":
            return self.encode_image(item, media)
        return self.encode_video(item, use_audio_in_video, media)

    def encode_audio(self, item: Item, media: MediaFeatures) -> list[int]:
        """encode_item() of an audio."""
        tokens = self.config.thinker.tokens
        n = self._add_audio(load_audio(item.source, item.options), media)
        return [tokens.audio_bos] + [tokens.audio] * n + [tokens.audio_eos]

    def encode_image(self, item: Item, media: MediaFeatures) -> list[int]:
        """encode_item() of an image."""
        tokens = self.config.thinker.tokens
        vision = self.config.thinker.vision
        limits = self.config.media
        name = name_of(item.source, item.kind)

        image = load_image(item.source)
        size = image_size(image.height, image.width, vision.cell_size, limits, name, item.options)
        self.check_token_limit(1, size, name)
        patches, grid = image_patches(image, vision, limits, name, item.options)
        media.image_patches.append(patches)
        media.image_grids.append(grid)

        n = len(patches) // vision.spatial_merge_size**2
        return [tokens.vision_bos] + [tokens.image] * n + [tokens.vision_eos]

    def encode_video(self, item: Item, use_audio_in_video: bool, media: MediaFeatures) -> list[int]:
        """encode_item() of a video, with or without its audio track."""
        tokens = self.config.thinker.tokens
        vision = self.config.thinker.vision
        limits = self.config.media
        name = name_of(item.source, item.kind)
        options = item.options
        with_audio = use_audio_in_video
        if options.use_audio_in_video is not None:
            with_audio = options.use_audio_in_video

        # Decode the video. Its frames may have their final size already.
        clip = load_video(
            item.source, limits, with_audio, vision.cell_size, options, most_tokens=self.context
        )
        num_frames, height, width = clip.frames.shape[:3]
        size = (height, width)
        if not clip.sized:
            size = frame_size(num_frames, height, width, vision.cell_size, limits, name, options)
        self.check_token_limit(num_frames, size, name)

        # Cut it into patches. The time of a grid step is that of its first frame.
        patches, grid = video_patches(clip.frames, vision, limits, name, size)
        seconds = clip.seconds[:: vision.temporal_patch_size] - clip.seconds[0]
        media.video_patches.append(patches)
        media.video_grids.append(grid)
        media.video_seconds.append(seconds)

        cells = grid[1] * grid[2] // vision.spatial_merge_size**2
        if not with_audio:
            return [tokens.vision_bos] + [tokens.video] * (grid[0] * cells) + [tokens.vision_eos]
        audio_tokens = self._add_audio(load_audio(clip.wave), media)
        return self._interleave(seconds, cells, audio_tokens)

    def _interleave(self, seconds: Tensor, cells: int, audio_tokens: int) -> list[int]:
        """Ids of a video with its audio track, in the order of interleave()."""
        tokens = self.config.thinker.tokens
        ids = [tokens.vision_bos, tokens.audio_bos]
        for kind, begin, end in interleave(seconds, audio_tokens, self.config.thinker):
            if kind == "video":
                ids += [tokens.video] * ((end - begin) * cells)
            else:
                ids += [tokens.audio] * (end - begin)
        return ids + [tokens.audio_eos, tokens.vision_eos]

    def _add_audio(self, wave: Tensor, media: MediaFeatures) -> int:
        """Append the mel of a waveform to `media` and return its number of tokens."""
        mel = log_mel(wave)
        media.mels.append(mel)
        media.peaks.append(float(wave.abs().max()))
        return num_audio_tokens(mel.shape[-1])

    def check_token_limit(self, n: int, size: tuple[int, int], name: str) -> None:
        """Raise UserError if n frames of a size (height, width) have more tokens than fit.

        To be called before the frames are resized.
        """
        tokens = num_video_tokens(n, size, self.config.thinker.vision)
        if tokens > self.context:
            frames = f" in {n} frames" if n > 1 else ""
            raise UserError(
                f"{name}: {size[1]}x{size[0]} pixels{frames} are {tokens} tokens and the context "
                f"holds {self.context}; shorten it, or set max_pixels"
            )


def collate(rows: list[Inputs], pad: int) -> Inputs:
    """Collate single rows into one batch. Shorter rows are left-padded with the id `pad`."""
    longest = max(row.input_ids.shape[1] for row in rows)
    input_ids = []
    attention_masks = []
    for row in rows:
        padding = (longest - row.input_ids.shape[1], 0)
        input_ids.append(F.pad(row.input_ids, padding, value=pad))
        attention_masks.append(F.pad(row.attention_mask, padding))

    batch = Inputs(
        torch.cat(input_ids),
        torch.cat(attention_masks),
        image_patches=_concatenate([row.image_patches for row in rows]),
        video_patches=_concatenate([row.video_patches for row in rows]),
    )
    for row in rows:
        batch.mels += row.mels
        batch.image_grids += row.image_grids
        batch.video_grids += row.video_grids
        batch.video_seconds += row.video_seconds
        batch.peaks += row.peaks
    return batch


def _concatenate(patches: Sequence[Tensor | None]) -> Tensor | None:
    """Patches [n, patch_dim] of each entry that has some -> [N, patch_dim]; None if none has."""
    present = [x for x in patches if x is not None]
    return torch.cat(present) if present else None
