"""Byte-level BPE: the release's vocabulary, our own, and every text back again."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from minomni.config import QWEN7B, TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.errors import UserError
from minomni.inputs.tokenizer import LETTER_OF, WORDS, Tokenizer, special_tokens

VECTORS = Path(__file__).parents[3] / "shared" / "data" / "tokenizer"
TEXTS = [
    "the red circle",
    "  two  spaces\n\n",
    "naïve café",
    "2026 + 1",
    "我们 你好",
    "🦙 l'été",
    "don't",
    "\t",
    "",
]


@pytest.fixture
def small() -> Tokenizer:
    """Seven merges by hand; ids are 256 + rank."""
    pairs = [
        (b"t", b"h"),
        (b"th", b"e"),
        (b" ", b"r"),
        (b"e", b"d"),
        (b" r", b"ed"),
        (b" ", b"the"),
        (b"1", b"2"),
    ]
    return Tokenizer(pairs, {"<|im_end|>": 300, "<|im_start|>": 301})


def test_by_hand(small):
    assert small.encode("the red") == [257, 260]
    assert small.encode("the the") == [257, 261]
    assert small.encode("12") == [
        16,
        17,
    ]  # digits never merge, whatever the merges say; ! is id 0, so 1 is 16
    assert small.encode("the<|im_end|> red") == [257, 300, 260]
    assert small.decode([257, 300, 260]) == "the<|im_end|> red"
    assert small.decode([257, 300, 260], skip_special=True) == "the red"


def test_release_vocabulary_and_public_vectors(tmp_path):
    if not VECTORS.exists():
        pytest.skip("the real vocabulary is not beside this checkout")
    for name in ("merges.txt", "vocab.json"):
        (tmp_path / name).write_bytes((VECTORS / f"qwen2_{name}").read_bytes())
    tokenizer = Tokenizer.load(tmp_path)
    assert len(tokenizer) == 151_643
    texts = (
        (VECTORS / "qwen2_vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    answers = (VECTORS / "qwen2_vectors.out").read_text().split("\n")
    right = sum(
        tokenizer.encode(text) == [int(i) for i in answer.split()]
        for text, answer in zip(texts, answers, strict=True)
    )
    assert right == 47
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)


def test_any_text_comes_back():
    hypothesis = pytest.importorskip("hypothesis", reason="random texts need hypothesis")
    from unicodedata import normalize

    tokenizer = world_tokenizer(TINY.thinker.tokens)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(hypothesis.strategies.text())
    def check(text):
        if not any(name in normalize("NFC", text) for name in tokenizer.special_tokens):
            assert tokenizer.decode(tokenizer.encode(text)) == normalize("NFC", text)

    check()


def test_text_is_normalized(small):
    assert small.encode("e\u0301") == small.encode("\u00e9")  # e and an accent are one letter


def naive(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Merge by the definition: look at all pairs, join the first one of the lowest rank, look
    again.
    """
    pieces = [bytes([b]) for b in word]
    while ranks := [
        (merges.index(pair), i) for i, pair in enumerate(pairwise(pieces)) if pair in merges
    ]:
        i = min(ranks)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def test_heap_merges_as_the_definition_says():
    random = Random(0)
    for _ in range(30):
        letters = "".join(random.choices("aab", k=400))
        tokenizer = Tokenizer.train([letters], 256 + random.randint(1, 40), {})
        for length in (1, 2, 3, 17, 60):
            word = "".join(random.choices("abc", k=length)).encode()
            assert tokenizer._apply_merges(word) == naive(word, tokenizer.merges)


def test_a_very_long_word_takes_no_hours():
    """Work is counted in ranks that are looked up: some for each letter, and not some for each pair
    of letters.
    """

    class Counted(dict):
        looked_up = 0

        def get(self, *arguments):
            self.looked_up += 1
            return super().get(*arguments)

    tokenizer = Tokenizer.train(["a" * 5_000], 268, {})
    tokenizer.ranks = Counted(tokenizer.ranks)
    assert len(tokenizer.encode("a" * 100_000)) < 1_000
    assert (
        100_000 <= tokenizer.ranks.looked_up < 1_000_000
    )  # where every merge looks at all pairs: billions


def test_equals_the_official_tokenizer():
    """The library that the official tokenizer is made of, with its settings, on every kind of
    letter and space.
    """
    tokenizers = pytest.importorskip("tokenizers", reason="the official library is not installed")
    merges = Tokenizer.train(["the cat's hat 12 12  \n\n 我们 café"] * 2, 300, {}).merges
    ours = Tokenizer(merges, {"<|im_end|>": 256 + len(merges)})
    vocab = {"".join(LETTER_OF[b] for b in token): i for i, token in ours.bytes_of.items()}
    merges = [tuple("".join(LETTER_OF[b] for b in part) for part in pair) for pair in ours.merges]
    official = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    official.normalizer = tokenizers.normalizers.NFC()
    official.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS.pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    official.add_special_tokens(["<|im_end|>"])
    random = Random(0)
    pool = [
        "e\u0301",
        "'ll",
        "<|im_end|>",
        *"thecats'SREVEhat12  \n\r\t.,!?-_我们é½²🦙ſअिⅧ\u2028\xa0\x85\x1c\u0300\u200b",
    ]
    for _ in range(500):
        text = "".join(random.choices(pool, k=random.randint(0, 30)))
        assert ours.encode(text) == official.encode(text, add_special_tokens=False).ids, repr(text)


def test_no_token_is_learned_twice():
    """An id is a merge, so a token that came about as a + bc and as ab + c would have two."""
    random = Random(0)
    for _ in range(100):
        text = " ".join("".join(random.choices("ab", k=random.randint(2, 12))) for _ in range(20))
        tokenizer = Tokenizer.train([text], 300, {})
        assert len(tokenizer.id_of) == len(tokenizer.bytes_of)


def test_training_repeats_and_stops():
    texts = ["low lower lowest", "new newer newest"] * 3
    first, second = (Tokenizer.train(texts, 300, {}) for _ in range(2))
    assert first.merges == second.merges
    assert len(first.encode("lowest")) < 4
    assert len(Tokenizer.train(texts, 260, {}).merges) == 4
    assert Tokenizer.train(["ab ab"], 400, {}).merges == [
        (b"a", b"b")
    ]  # the rest occurs once: nothing to learn


def test_world_words_are_single_tokens():
    tokenizer = world_tokenizer(TINY.thinker.tokens)
    assert len(tokenizer.encode("the red circle is above the blue square")) == 8
    assert max(tokenizer.bytes_of) < min(tokenizer.special_tokens.values())


@pytest.mark.parametrize("layout", ["vocab and merges", "tokenizer.json"])
def test_saved_and_loaded(small, tmp_path, layout):
    small.save(tmp_path)
    if layout == "tokenizer.json":
        vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        added = [{"content": name, "id": i} for name, i in small.special_tokens.items()]
        for file in tmp_path.iterdir():
            file.unlink()
        whole = {"model": {"vocab": vocab, "merges": merges}, "added_tokens": added}
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    again = Tokenizer.load(tmp_path)
    assert again.merges == small.merges
    assert again.special_tokens == small.special_tokens
    assert all(again.encode(text) == small.encode(text) for text in TEXTS)


def test_merges_are_lines_or_pairs(small, tmp_path):
    """tokenizer.json has either; both give the tokenizer of merges.txt."""
    small.save(tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    for merges in (lines, [line.split(" ") for line in lines]):
        folder = tmp_path / "single"
        folder.mkdir(exist_ok=True)
        added = [{"content": name, "id": i} for name, i in small.special_tokens.items()]
        content = {"model": {"vocab": vocab, "merges": merges}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        loaded = Tokenizer.load(folder)
        assert loaded.merges == small.merges
        assert loaded.id_of == small.id_of
        assert loaded.encode("the red circle") == small.encode("the red circle")


def test_files_that_disagree_are_refused(small, tmp_path):
    small.save(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocab["th"] = 999
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match="disagree on 1 tokens, first 'th'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="vocab.json: not valid JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {}},
        {"model": {"vocab": {"▁a": 0}, "merges": ["▁ a"]}},
        [],
        {"model": {"vocab": {"a": 0}, "merges": ["a b c"]}},
    ],
)
def test_tokenizers_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="no byte-level BPE|holds a list, not an object"):
        Tokenizer.load(tmp_path)


WHOLE = {
    "model": {"vocab": {"!": 0}, "merges": []},
    "added_tokens": [{"content": "<|im_end|>", "id": 400}],
}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", WHOLE | {"model": {"vocab": True, "merges": []}}, "no byte-level BPE"),
        (
            "tokenizer.json",
            WHOLE | {"model": {"vocab": {"!": {}}, "merges": []}},
            "the id of '!' is {}, expected a whole",
        ),
        (
            "tokenizer.json",
            WHOLE | {"model": {"vocab": {"!": True}, "merges": []}},
            "the id of '!' is True",
        ),
        (
            "tokenizer.json",
            WHOLE | {"model": {"vocab": {}, "merges": {"a": "b"}}},
            "its merges are",
        ),
        ("tokenizer.json", WHOLE | {"model": {"vocab": {}, "merges": [["a", 7]]}}, "merge 1 is"),
        (
            "tokenizer.json",
            WHOLE | {"model": {"vocab": {}, "merges": ["a b", ["a b", "c"]]}},
            "merge 2 is",
        ),
        (
            "tokenizer.json",
            WHOLE | {"model": {"vocab": {}, "merges": ["a " * 10**6]}},
            "merge 1 is",
        ),
        (
            "tokenizer.json",
            WHOLE | {"added_tokens": "none"},
            "'added_tokens' is 'none', expected a list",
        ),
        (
            "tokenizer.json",
            WHOLE | {"added_tokens": [{"content": ["x"], "id": 5}]},
            "an added token is",
        ),
        (
            "tokenizer.json",
            WHOLE | {"added_tokens": [{"content": "x", "id": [5]}]},
            r"the id of 'x' is \[5\]",
        ),
        (
            "tokenizer.json",
            WHOLE | {"added_tokens": [{"content": "", "id": 500}]},
            "none of them empty",
        ),
        (
            "tokenizer.json",
            WHOLE | {"added_tokens": [{"content": str(i), "id": i} for i in range(200)]},
            "special token ids 0, 1, 2 and 197 more are taken",
        ),
        ("vocab.json", ["!"], "holds a list, not an object"),
        (
            "vocab.json",
            {str(i): i for i in range(600_000)},
            "has 600,000 tokens, expected at most 500,000",
        ),
        ("vocab.json", {"!": None}, "the id of '!' is None"),
        ("added_tokens.json", {"<|im_end|>": [482]}, r"the id of '<\|im_end\|>' is \[482\]"),
        ("added_tokens.json", {"<|im_end|>": -4}, "is -4, expected a whole number from 0"),
        ("added_tokens.json", {str(i): 1000 + i for i in range(20_000)}, "has 20,000 added tokens"),
    ],
)
def test_ids_that_are_none(small, tmp_path, file, content, message):
    small.save(tmp_path)
    (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 500


def test_files_that_are_none(small, tmp_path):
    """A pointer that git-LFS left, a file of the wrong kind or size."""
    small.save(tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:a2\nsize 7031645\n"
    (tmp_path / "tokenizer.json").write_bytes(pointer)
    assert Tokenizer.load(tmp_path).encode("the red") == small.encode(
        "the red"
    )  # merges.txt says as much
    merges = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="tokenizer.json: is a git-LFS pointer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_bytes(merges + b"\xff")
    with pytest.raises(UserError, match="merges.txt: cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n" * 600_000)
    with pytest.raises(
        UserError, match="merges are a list of .* entries, expected a list of at most 500,000"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_bytes(bytes(40_000_000))
    with pytest.raises(UserError, match="merges.txt: has 40,000,000 bytes"):
        Tokenizer.load(tmp_path)


def test_half_a_letter(small):
    """Texts cut in the middle of an emoji, and names of files that are no UTF-8."""
    assert small.encode("the\ud83d") == small.encode("the\N{REPLACEMENT CHARACTER}")
    assert small.encode("the\ud83e\udd99") == small.encode(
        "the🦙"
    )  # two halves that belong together
    assert small.decode(small.encode("\udcff!")) == "\N{REPLACEMENT CHARACTER}!"
    assert small.encode("e" + "\u0301\u0316" * 50)
    with pytest.raises(UserError, match="has 102 combining marks on one letter"):
        small.encode("e" + "\u0301\u0316" * 51)


def test_special_ids_are_the_release_s():
    names = special_tokens(QWEN7B.thinker.tokens)
    assert names["<|endoftext|>"] == 151_643
    assert names["<|im_end|>"] == 151_645
    assert names["<|VIDEO|>"] == 151_656
    with pytest.raises(UserError, match="taken by ordinary tokens"):
        Tokenizer([], {"<|im_end|>": 7})
