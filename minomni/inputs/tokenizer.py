"""Byte-level BPE: text to ids and back. Trains on any corpus, or loads the release's vocabulary."""

import json
import unicodedata
from collections import Counter
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex

from minomni.config import TokenIds
from minomni.errors import UserError, shorten
from minomni.files import write_atomically
from minomni.model_files import MOST_JSON, check_file, is_pointer, quote, read_object, reason, where

# How the release cuts text into words before merging: contractions, letters, single digits, signs,
# line ends, spaces.
WORDS = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MARKS = regex.compile(
    r"\p{M}{101,}"
)  # no script stacks so many on a letter, and sorting them takes their square
MOST_TOKENS, MOST_ADDED = 500_000, 10_000  # the release has 151,643 and 22


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, in the order that fixes the first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


LETTER_OF = _byte_letters()
BYTE_OF = {letter: byte for byte, letter in LETTER_OF.items()}
FIRST_IDS = [bytes([byte]) for byte in LETTER_OF]  # the token of each id below 256


def special_tokens(tokens: TokenIds) -> dict[str, int]:
    """The release's spelling of every special token that can stand in a text, with its id."""
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
    """A list of merges is the whole tokenizer: the token of merge number r has id 256 + r."""

    def __init__(self, merges: list[tuple[bytes, bytes]], special_tokens: dict[str, int]):
        self.merges = merges
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special_tokens = special_tokens
        self.bytes_of = dict(enumerate(FIRST_IDS + [a + b for a, b in merges]))
        self.id_of = {token: i for i, token in self.bytes_of.items()}
        taken = sorted(i for i in special_tokens.values() if i in self.bytes_of)
        if taken:
            more = f" and {len(taken) - 3} more" if len(taken) > 3 else ""
            raise UserError(
                f"special token ids {', '.join(map(str, taken[:3]))}{more} are taken by ordinary tokens; "
                f"put them at {len(self.bytes_of)} or above"
            )
        names = sorted(special_tokens, key=len, reverse=True)
        self._special = (
            regex.compile("(" + "|".join(map(regex.escape, names)) + ")") if names else None
        )
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.bytes_of) + len(self.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Special tokens spelled in the text become their ids; the rest is normalised
        (NFC) and merged.

        Unpaired surrogates become U+FFFD. Raises UserError for a
        letter with more than a hundred combining marks.
        """
        text = valid_unicode(text)
        marks = MARKS.search(text)
        if marks:
            raise UserError(
                f"the text has {len(marks[0]):,} combining marks on one letter, expected at most 100"
            )
        parts = self._special.split(text) if self._special else [text]
        ids = []
        for part in parts:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                for word in WORDS.findall(unicodedata.normalize("NFC", part)):
                    ids += self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> list[int]:
        """Ids of one word; remembered, since words repeat."""
        if word not in self._known:
            self._known[word] = [self.id_of[piece] for piece in self._merged(word.encode())]
        return self._known[word]

    def _merged(self, word: bytes) -> list[bytes]:
        """Merge the bytes of a word, always the pair of lowest rank first, the left one of equals.

        A heap of pairs and links to the neighbours keep a "word" of 100,000 letters from taking
        hours. A merge leaves outdated pairs in the heap; they are known by their rank, which is no
        longer that of their place.
        """
        pieces = [bytes([b]) for b in word]
        before, after = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))

        def rank_at(i: int) -> int | None:
            return (
                self.ranks.get((pieces[i], pieces[after[i]]))
                if i >= 0 and after[i] < len(pieces)
                else None
            )

        heap = [(rank, i) for i in range(len(pieces)) if (rank := rank_at(i)) is not None]
        heapify(heap)
        while heap:
            rank, i = heappop(heap)
            if rank_at(i) != rank:
                continue
            swallowed = after[i]
            pieces[i], pieces[swallowed], after[i] = (
                pieces[i] + pieces[swallowed],
                b"",
                after[swallowed],
            )
            if after[i] < len(pieces):
                before[after[i]] = i
            for place in (before[i], i):
                if (rank := rank_at(place)) is not None:
                    heappush(heap, (rank, place))
        return [piece for piece in pieces if piece]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """Ids -> text; bytes that are no UTF-8 become the replacement sign, ids of nothing become
        nothing.
        """
        names = {
            i: ("" if skip_special else name).encode() for name, i in self.special_tokens.items()
        }
        return b"".join(self.bytes_of.get(i, names.get(i, b"")) for i in ids).decode(
            "utf-8", errors="replace"
        )

    @classmethod
    def train(
        cls, texts: list[str], vocab_size: int, special_tokens: dict[str, int]
    ) -> "Tokenizer":
        """Learn merges until there are vocab_size ordinary tokens, or no pair occurs twice.

        Ties go to the smaller pair, so the same texts make the same tokenizer.
        """
        words = Counter(
            word for text in texts for word in WORDS.findall(unicodedata.normalize("NFC", text))
        )
        pieces = {word: [bytes([b]) for b in word.encode()] for word in words}
        merges: list[tuple[bytes, bytes]] = []
        while len(FIRST_IDS) + len(merges) < vocab_size:
            pairs = Counter()
            for word, parts in pieces.items():
                for pair in zip(parts, parts[1:]):
                    pairs[pair] += words[word]
            often = [(-count, pair) for pair, count in pairs.items() if count > 1]
            if not often:
                break
            best = min(often)[1]
            merges.append(best)
            for parts in pieces.values():
                _merge(parts, best)
        return cls(merges, special_tokens)

    def save(self, folder: Path) -> None:
        """Write vocab.json, merges.txt and added_tokens.json.

        The special tokens are in the vocabulary too: transformers would number those that are not
        there by itself, from the vocabulary's end on.
        """
        vocab = {_spell(token): i for i, token in self.bytes_of.items()} | self.special_tokens
        lines = "".join(f"{_spell(a)} {_spell(b)}\n" for a, b in self.merges)
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + lines,
            "added_tokens.json": json.dumps(self.special_tokens, indent=2),
        }
        for name, content in files.items():
            write_atomically(Path(folder) / name, lambda f, c=content: f.write(c.encode()))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json + merges.txt (+ added_tokens.json). Raises UserError
        naming the fault.
        """
        folder = Path(folder)
        merges, vocab, added = _stored(folder)
        try:
            tokenizer = cls([(_bytes(a), _bytes(b)) for a, b in merges], added)
            vocab = {_bytes(token): i for token, i in vocab.items() if token not in added}
        except (KeyError, TypeError, ValueError) as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"{where(folder)}: its tokenizer files hold no byte-level BPE ({shorten(why, 200)})"
            ) from None
        wrong = set(vocab.items()) ^ set(tokenizer.id_of.items()) if vocab else set()
        if wrong:
            raise UserError(
                f"{where(folder)}: vocabulary and merges disagree on {len({t for t, _ in wrong})} tokens, "
                f"first {quote(_spell(min(wrong)[0]))}; use files of one model"
            )
        return tokenizer


def _stored(folder: Path) -> tuple[list, dict[str, int], dict[str, int]]:
    """Merges, vocabulary (empty where there is none) and added tokens, as the files of a folder
    spell them.

    Raises UserError for files that are none of a tokenizer.
    """
    whole, lines = folder / "tokenizer.json", folder / "merges.txt"
    if whole.exists() and not (lines.exists() and is_pointer(whole)):
        return _stored_whole(whole)
    if lines.exists():
        check_file(lines, MOST_JSON)
        try:
            rows = lines.read_text(encoding="utf-8").split("\n", MOST_TOKENS + 1)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{where(lines)}: cannot be read ({reason(error)}); copy it again"
            ) from None
        merges = _pairs([row for row in rows if row and not row.startswith("#version")], lines)
        vocab, added = (_read_json(folder / name) for name in ("vocab.json", "added_tokens.json"))
        return (
            merges,
            _table(vocab, folder / "vocab.json"),
            _names(added, folder / "added_tokens.json"),
        )
    raise UserError(
        f"{where(folder)}: no tokenizer here; expected vocab.json with merges.txt, or tokenizer.json"
    )


def _stored_whole(file: Path) -> tuple[list, dict[str, int], dict[str, int]]:
    """What a tokenizer.json says."""
    data = _read_json(file)
    model, extra = data.get("model"), data.get("added_tokens", [])
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or "merges" not in model
    ):
        raise UserError(
            f"{where(file)}: holds no byte-level BPE: model with vocab and merges; use the release's file"
        )
    if not isinstance(extra, list) or not all(isinstance(token, dict) for token in extra):
        raise UserError(
            f"{where(file)}: 'added_tokens' is {quote(extra)}, expected a list of objects"
        )
    added = {}
    for token in extra:
        name = token.get("content")
        if not isinstance(name, str):
            raise UserError(
                f"{where(file)}: an added token is {quote(token)}, expected an object with content and id"
            )
        added[name] = token.get("id")
    return _pairs(model["merges"], file), _table(model["vocab"], file), _names(added, file)


def _pairs(merges: list, file: Path) -> list:
    """Merges as pairs of texts; each is one already, or a line with a blank between its two. Raises
    UserError.
    """
    if not isinstance(merges, list) or len(merges) > MOST_TOKENS:
        raise UserError(
            f"{where(file)}: its merges are {quote(merges)}, expected a list of at most {MOST_TOKENS:,}"
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for number, pair in enumerate(pairs):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(part, str) for part in pair)
        ):
            raise UserError(
                f"{where(file)}: holds no byte-level BPE: merge {number + 1} is {quote(merges[number])}, "
                f"expected two tokens"
            )
    return pairs


def _table(vocab: dict, file: Path) -> dict[str, int]:
    """A vocabulary whose ids are ids. Raises UserError naming the first that is none."""
    if len(vocab) > MOST_TOKENS:
        raise UserError(
            f"{where(file)}: has {len(vocab):,} tokens, expected at most {MOST_TOKENS:,}"
        )
    for token, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 2**31:
            raise UserError(
                f"{where(file)}: the id of {quote(token)} is {quote(i)}, expected a whole number from 0"
            )
    return vocab


def _names(added: dict, file: Path) -> dict[str, int]:
    """Added tokens, which have names. Raises UserError for too many and for one without."""
    if len(added) > MOST_ADDED or "" in added:
        raise UserError(
            f"{where(file)}: has {len(added):,} added tokens, expected at most {MOST_ADDED:,}, none of "
            f"them empty"
        )
    return _table(added, file)


def valid_unicode(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for unpaired surrogates, which cut texts and
    file names have.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> None:
    """Join every occurrence of a pair in one word, in place, from the left."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        i += 1


def _spell(token: bytes) -> str:
    return "".join(LETTER_OF[b] for b in token)


def _bytes(spelling: str) -> bytes:
    return bytes(BYTE_OF[letter] for letter in spelling)


def _read_json(path: Path) -> dict:
    """The object in a file; an empty one where there is no file."""
    return read_object(path) if path.exists() else {}
