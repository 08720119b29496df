"""Byte-level BPE: text to ids and back. Trains on any corpus, or loads the release's vocabulary."""

import json
import unicodedata
from collections import Counter
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

import regex

from minomni.config import TokenIds
from minomni.errors import UserError, quote_json, short_path, shorten
from minomni.files import write_atomically
from minomni.model_files import MAX_JSON_BYTES, check_file, is_pointer, os_reason, read_json_object

# How the release splits text into words before merging: contractions, letters, single digits,
# punctuation, line breaks, spaces.
WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# No script puts so many combining marks on a letter, and normalizing n of them takes O(n^2) time.
TOO_MANY_MARKS = regex.compile(r"\p{M}{101,}")
# The release has 151,643 ordinary and 22 added tokens.
MAX_TOKENS = 500_000
MAX_ADDED_TOKENS = 10_000


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order that defines the first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


LETTER_OF = _byte_letters()
# For str.translate: each letter to the character whose Latin-1 code is its byte. The other
# characters become, or are, some that Latin-1 lacks.
NO_LETTER = dict.fromkeys(range(256), "\uffff")
LATIN_OF = NO_LETTER | {ord(letter): chr(byte) for byte, letter in LETTER_OF.items()}
BYTE_TOKENS = [bytes([byte]) for byte in LETTER_OF]  # the token of each id below 256


def special_tokens(tokens: TokenIds) -> dict[str, int]:
    """The release's names of all special tokens that can occur in a text, with their ids."""
    return {
        "<|endoftext|>": tokens.endoftext,
        "<|im_start|>": tokens.im_start,
        "<|im_end|>": tokens.im_end,
        "<|AUDIO|>": tokens.audio,
        "<|audio_bos|>": tokens.audio_bos,
        "<|audio_eos|>": tokens.audio_eos,
        "<|vision_bos|>": tokens.vision_bos,
        "<|vision_eos|>": tokens.vision_eos,
        "<|vision_pad|>": tokens.vision_pad,
        "<|IMAGE|>": tokens.image,
        "<|VIDEO|>": tokens.video,
    }


class Tokenizer:
    """Byte-level BPE, defined by its list of merges: merge number r makes the token 256 + r."""

    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: dict[str, int]):
        """Raises UserError for special tokens that have the ids of ordinary tokens."""
        self.merges = merges
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special_tokens = special_tokens
        self.bytes_of = dict(enumerate(BYTE_TOKENS + [left + right for left, right in merges]))
        self.id_of = {token: i for i, token in self.bytes_of.items()}
        self._require_free(special_tokens)
        self._special = _pattern_of(special_tokens)
        self._word_ids: dict[str, list[int]] = {}  # cache of _encode_word

    def _require_free(self, special_tokens: dict[str, int]) -> None:
        """Raise UserError for special tokens that have the ids of ordinary tokens."""
        taken = sorted(i for i in special_tokens.values() if i in self.bytes_of)
        if taken:
            first = ", ".join(str(i) for i in taken[:3])
            more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
            raise UserError(
                f"special token ids {first}{more} are taken by ordinary tokens; put them at "
                f"{len(self.bytes_of)} or above"
            )

    def __len__(self) -> int:
        return len(self.bytes_of) + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Text -> ids.

        Special tokens that are spelled out in the text become their ids; the rest is normalized
        (NFC) and merged. Unpaired surrogates become U+FFFD. Raises UserError for a letter with more
        than a hundred combining marks.
        """
        text = valid_unicode(text)
        marks = TOO_MANY_MARKS.search(text)
        if marks:
            raise UserError(
                f"the text has {len(marks[0]):,} combining marks on one letter, expected at most "
                f"100"
            )
        parts = self._special.split(text) if self._special else [text]
        ids = []
        for part in parts:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                continue
            for word in _words_of(part):
                ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Ids of one word; cached, since words repeat."""
        if word not in self._word_ids:
            pieces = self._apply_merges(word.encode())
            self._word_ids[word] = [self.id_of[piece] for piece in pieces]
        return self._word_ids[word]

    def _apply_merges(self, word: bytes) -> list[bytes]:
        """Merge the bytes of a word: always the pair of lowest rank, the leftmost one first.

        A heap of pairs and a linked list of pieces keep the cost at O(n log n), so a "word" of
        100,000 letters takes no hours. A merge leaves outdated entries in the heap; they are
        recognized by their rank, which differs from the current rank at their index.
        """
        # Piece i is followed by piece following[i] and preceded by piece preceding[i]. A piece
        # that was merged into its left neighbor is empty.
        pieces = [bytes([byte]) for byte in word]
        end = len(pieces)
        preceding = list(range(-1, end - 1))
        following = list(range(1, end + 1))

        def rank_at(left: int) -> int | None:
            """The rank of the pair that begins with piece `left`; None if it is not a merge."""
            if left < 0 or following[left] >= end:
                return None
            return self.ranks.get((pieces[left], pieces[following[left]]))

        heap: list[tuple[int, int]] = []

        def push(left: int) -> None:
            rank = rank_at(left)
            if rank is not None:
                heappush(heap, (rank, left))

        for left in range(end):
            push(left)
        while heap:
            rank, left = heappop(heap)
            if rank_at(left) != rank:
                continue  # outdated

            # Merge the right piece into the left one and unlink it.
            right = following[left]
            pieces[left] += pieces[right]
            pieces[right] = b""
            following[left] = following[right]
            if following[left] < end:
                preceding[following[left]] = left

            # Both pairs with the new piece may be merges.
            push(preceding[left])
            push(left)
        return [piece for piece in pieces if piece]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids -> text. Invalid UTF-8 becomes the replacement character; unknown ids are skipped."""
        special = {}
        if not skip_special:
            special = {i: name.encode() for name, i in self.special_tokens.items()}
        content = b"".join(self.bytes_of.get(i, special.get(i, b"")) for i in ids)
        return content.decode("utf-8", errors="replace")

    @classmethod
    def train(
        cls, texts: list[str], vocab_size: int, special_tokens: dict[str, int]
    ) -> "Tokenizer":
        """Learn merges until there are vocab_size ordinary tokens, or no pair occurs twice.

        Ties go to the smaller pair, so the same texts always give the same tokenizer.
        """
        words: Counter[str] = Counter()
        for text in texts:
            words.update(_words_of(text))
        pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}

        merges: list[tuple[bytes, bytes]] = []
        while len(BYTE_TOKENS) + len(merges) < vocab_size:
            # Count all pairs of adjacent pieces.
            pairs: Counter[tuple[bytes, bytes]] = Counter()
            for word, parts in pieces.items():
                for pair in pairwise(parts):
                    pairs[pair] += words[word]

            # Merge the most frequent pair in all words.
            candidates = [(-count, pair) for pair, count in pairs.items() if count > 1]
            if not candidates:
                break
            best = min(candidates)[1]
            merges.append(best)
            for parts in pieces.values():
                _merge(parts, best)
        return cls(merges, special_tokens)

    def save(self, folder: Path) -> None:
        """Write vocab.json, merges.txt and added_tokens.json.

        The vocabulary includes the special tokens, since transformers gives those that it does not
        find there new ids at the end of the vocabulary.
        """
        vocab = {_spell(token): i for i, token in self.bytes_of.items()} | self.special_tokens
        lines = [f"{_spell(left)} {_spell(right)}\n" for left, right in self.merges]
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + "".join(lines),
            "added_tokens.json": json.dumps(self.special_tokens, indent=2),
        }
        for name, text in files.items():
            _write(Path(folder) / name, text)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json + merges.txt (+ added_tokens.json).

        Raises UserError that names what is wrong.
        """
        folder = Path(folder)
        merges, vocab, added = _read_files(folder)
        try:
            pairs, ids = _pairs_of_bytes(merges)
            tokenizer = cls(pairs, added)
            for name in added:
                vocab.pop(name, None)
            agrees = not vocab or vocab == ids
            different = set()
            if not agrees:
                by_bytes = {_bytes(token): i for token, i in vocab.items()}
                different = {token for token, _ in by_bytes.items() ^ tokenizer.id_of.items()}
        except (KeyError, TypeError, ValueError) as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{short_path(folder)}: its tokenizer files hold no byte-level BPE "
                f"({shorten(why, 200)})"
            ) from None

        # Where there is a vocabulary, it has to agree with the merges.
        if not agrees:
            raise UserError(
                f"{short_path(folder)}: vocabulary and merges disagree on {len(different)} tokens, "
                f"first {quote_json(_spell(min(different)))}; use files of one model"
            )
        return tokenizer


def _words_of(text: str) -> list[str]:
    """The words of a text, normalized (NFC)."""
    return WORDS.findall(unicodedata.normalize("NFC", text))


def _pattern_of(special_tokens: dict[str, int]) -> "regex.Pattern[str] | None":
    """Matches any of the special tokens, the longest one first; None where there are none."""
    if not special_tokens:
        return None
    names = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(regex.escape(name) for name in names) + ")")


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Join every occurrence of a pair in one word, in place, from the left."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        i += 1


def _spell(token: bytes) -> str:
    return "".join(LETTER_OF[byte] for byte in token)


def _bytes(spelling: str) -> bytes:
    """The inverse of _spell(). Raises ValueError for a letter that spells no byte."""
    try:
        return spelling.translate(LATIN_OF).encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError(f"{spelling!r} spells no bytes") from None


def _pairs_of_bytes(merges: list) -> tuple[list[tuple[bytes, bytes]], dict[str, int]]:
    """Merges -> pairs of bytes, and the id of each token as it is spelled.

    A merge is a line "left right" or a pair of strings. Raises UserError for others, and ValueError
    for a letter that spells no byte.
    """
    tokens = list(BYTE_TOKENS)
    ids = {_spell(token): i for i, token in enumerate(tokens)}
    pairs = []
    for number, merge in enumerate(merges, 1):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            spelling = left + right
            left_id, right_id = ids.get(left), ids.get(right)
        except (TypeError, ValueError):
            raise _no_merge(number, merge) from None
        # Nearly always both are tokens that earlier merges made.
        if left_id is None or right_id is None:
            if not isinstance(spelling, str) or " " in spelling:
                raise _no_merge(number, merge)
            pair = (_bytes(left), _bytes(right))
        else:
            pair = (tokens[left_id], tokens[right_id])
        pairs.append(pair)
        ids[spelling] = len(tokens)
        tokens.append(pair[0] + pair[1])
    return pairs, ids


def _no_merge(number: int, merge: object) -> UserError:
    """The error about a merge that is not two strings."""
    return UserError(f"merge {number} is {quote_json(merge)}, expected two tokens")


# ------------------------------------------------------------------------------------- files

Files = tuple[list, dict[str, int], dict[str, int]]  # merges, vocabulary, added tokens


def _read_files(folder: Path) -> Files:
    """Merges, vocabulary (empty where there is none) and added tokens, as the files spell them.

    Raises UserError for files that do not belong to a tokenizer.
    """
    single_file = folder / "tokenizer.json"
    merges_file = folder / "merges.txt"
    if single_file.exists() and not (merges_file.exists() and is_pointer(single_file)):
        return _read_single_file(single_file)
    if not merges_file.exists():
        raise UserError(
            f"{short_path(folder)}: no tokenizer here; expected vocab.json with merges.txt, or "
            f"tokenizer.json"
        )
    vocab_file = folder / "vocab.json"
    added_file = folder / "added_tokens.json"
    merges = _read_merges(merges_file)
    vocab = _read_json(vocab_file)
    added = _read_json(added_file)
    return merges, _checked_vocab(vocab, vocab_file), _checked_added(added, added_file)


def _read_merges(file: Path) -> list[str]:
    """The merges in a merges.txt, as lines "left right"."""
    check_file(file, MAX_JSON_BYTES)
    try:
        lines = file.read_text(encoding="utf-8").split("\n", MAX_TOKENS + 1)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{short_path(file)}: cannot be read ({os_reason(error)}); copy it again"
        ) from None
    merges = [line for line in lines if line and not line.startswith("#version")]
    return _checked_merges(merges, file)


def _read_single_file(file: Path) -> Files:
    """The content of a tokenizer.json."""
    data = _read_json(file)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict) or "merges" not in model:
        raise UserError(
            f"{short_path(file)}: holds no byte-level BPE: model with vocab and merges; use the "
            f"release's file"
        )
    entries = data.get("added_tokens", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(
            f"{short_path(file)}: 'added_tokens' is {quote_json(entries)}, expected a list of "
            "objects"
        )
    added = {}
    for entry in entries:
        name = entry.get("content")
        if not isinstance(name, str):
            raise UserError(
                f"{short_path(file)}: an added token is {quote_json(entry)}, expected an object "
                "with content and id"
            )
        added[name] = entry.get("id")

    merges = _checked_merges(model["merges"], file)
    return merges, _checked_vocab(vocab, file), _checked_added(added, file)


def _write(path: Path, text: str) -> None:
    content = text.encode()
    write_atomically(path, lambda file: file.write(content))


def _read_json(path: Path) -> dict:
    """The object in a file; an empty one where there is no file."""
    return read_json_object(path) if path.exists() else {}


def _checked_merges(merges: list, file: Path) -> list:
    """The merges themselves. Raises UserError for anything but a list, and for too many."""
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise UserError(
            f"{short_path(file)}: its merges are {quote_json(merges)}, expected a list of at most "
            f"{MAX_TOKENS:,}"
        )
    return merges


def _checked_vocab(vocab: dict, file: Path) -> dict[str, int]:
    """A vocabulary with valid ids. Raises UserError that names the first invalid one."""
    if len(vocab) > MAX_TOKENS:
        raise UserError(
            f"{short_path(file)}: has {len(vocab):,} tokens, expected at most {MAX_TOKENS:,}"
        )
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < 2**31:  # True is no id
            raise UserError(
                f"{short_path(file)}: the id of {quote_json(token)} is {quote_json(i)}, expected a "
                "whole number from 0"
            )
    return vocab


def _checked_added(added: dict, file: Path) -> dict[str, int]:
    """Added tokens with valid names and ids. Raises UserError for others, and for too many."""
    if len(added) > MAX_ADDED_TOKENS or "" in added:
        raise UserError(
            f"{short_path(file)}: has {len(added):,} added tokens, expected at most "
            f"{MAX_ADDED_TOKENS:,}, none of them empty"
        )
    return _checked_vocab(added, file)


def valid_unicode(text: str) -> str:
    """The text with surrogate pairs joined and unpaired surrogates replaced by U+FFFD.

    Truncated strings and file names contain unpaired ones.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
