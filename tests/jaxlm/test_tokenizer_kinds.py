"""Every kind of tokenizer behind one door: ids of the libraries, arbitrary Unicode back or a word on why not."""

import base64
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm import tokenizer_named as named
from jaxlm.text import stream_text
from jaxlm.tokenizer import PATTERN, Tokenizer, TokenizerError, open_tokenizer, segments
from jaxlm.tokenizer_metaspace import Metaspace
from jaxlm.tokenizer_named import PUBLISHED, Published, from_file

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The quick brown fox, don't I'LL 1234567\t\r\n" * 30,
    "def f(x):\n    return x + 12\n\n\n" * 30,
    "naïve café 你好世界 😀 ſtraße Ελλάδα <|bos|> if 1 < 2\n" * 30,
]
ATOMS = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\x00",
        "\u0301",
        "e\u0301",
        "é",
        "가",
        "\u2581",
        "\u2581\u2581",
        "😀",
        "𝒳",
        "...",
        "'s",
    ]
    + [
        "\u00a0",
        "\u3000",
        "\ufeff",
        "\u200d",
        "12345",
        "don't",
        "<|bos|>",
        "<|eos|",
        "<0x41>",
        " " * 300,
        "ſ",
        "ǅ",
    ]
)
ANY = st.lists(ATOMS | st.text(max_size=4), max_size=20).map("".join)
# Characters that Python's tables and the library's know alike, for what is computed here.
KNOWN = ANY.map(lambda text: "".join(c for c in text if unicodedata.category(c) != "Cn"))


@pytest.fixture(scope="module")
def by_kind() -> dict[str, Tokenizer]:
    """A tokenizer of each kind; the published patterns with tokens that were learned here."""
    trained = Tokenizer.train(TEXTS, 600)
    ranks = trained.codec.ranks
    published = {
        p.name: Tokenizer(p.pattern, ranks, {"<|endoftext|>": 700, "<|bos|>": 701}) for p in PUBLISHED
    }
    return {"gpt4": trained, "tfm": Tokenizer.train(TEXTS, 600, "tfm"), **published}


@pytest.fixture(scope="module")
def files(by_kind: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind, tokenizer in by_kind.items():
        tokenizer.save(folder / f"{kind}.json")
    return {kind: folder / f"{kind}.json" for kind in by_kind}


@pytest.fixture(scope="module")
def libraries(files: dict[str, Path]) -> dict[str, tokenizers.Tokenizer]:
    """The same files, opened by the library."""
    return {kind: tokenizers.Tokenizer.from_file(str(path)) for kind, path in files.items()}


ALL = ["gpt4", "tfm", "gpt2", "cl100k_base", "o200k_base"]


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=60, deadline=None)
@given(text=ANY)
@example("")
@example("\u0301\u0301x")
@example(" \r\n \x00\x00")
@example("<|bos|> a<|bos|><|endoftext|>b")
def test_ids_are_those_of_the_library_and_bytes_come_back(by_kind, libraries, kind: str, text: str) -> None:
    """Ordinary and special; byte-level tokenizers restore every text, and all count the bytes that they decode."""
    tokenizer, library = by_kind[kind], libraries[kind]
    library.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == library.encode(text).ids
    assert tokenizer.count_bytes(ids) == len(tokenizer.decode_bytes(ids))
    if kind != "tfm":
        assert tokenizer.decode(ids) == text and tokenizer.losses(text) is None and tokenizer.lossless
    library.encode_special_tokens = False
    special = tokenizer.encode(text, special=True)
    assert special == library.encode(text).ids
    if kind == "tfm":
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(special) == library.decode(special, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["gpt4", "tfm"])
def test_transformers_opens_the_file_with_our_ids(by_kind, files, kind: str) -> None:
    """PreTrainedTokenizerFast on texts that no one cleans up, and back."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(files[kind]))
    for text in [*TEXTS, "e\u0301\u0301 \x00  x\r\n", "<|im_start|>user\n  hi<|im_end|>", "가각 \U0001f600"]:
        ids = by_kind[kind].encode(text, special=True)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == by_kind[kind].decode(ids)
    assert len(theirs) == by_kind[kind].vocab_size == 600


@settings(max_examples=150, deadline=None)
@given(text=KNOWN)
@example(" x")
@example("  x")
@example("\u2581")
@example("a\u2581b  c")
@example("가\u0301")
def test_tfm_gives_back_nfd_without_the_space_in_front_and_says_what_changed(by_kind, text: str) -> None:
    """The definition, computed here; `losses` names the first difference exactly where there is one."""
    tokenizer = by_kind["tfm"]
    expected = unicodedata.normalize("NFD", text).replace("\u2581", " ")
    expected = expected[1:] if expected.startswith(" ") else expected
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    lost = tokenizer.losses(text)
    assert (lost is None) == (expected == text)
    if lost is not None:
        at = int(lost.split()[1].rstrip(":").replace(",", ""))
        assert expected[:at] == text[:at] and expected[at : at + 1] != text[at : at + 1]
    assert not tokenizer.lossless and "NFD" in tokenizer.loss_note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aé", "character 1: 'é' (U+00E9) comes back as 'e' (U+0065)"),
        (" a", "character 0: ' ' (U+0020) comes back as 'a' (U+0061)"),
        ("a\u2581", "character 1: '\u2581' (U+2581) comes back as ' ' (U+0020)"),
        (" ", "character 0: ' ' (U+0020) comes back as nothing"),
    ],
)
def test_a_loss_is_named_by_character_and_place(by_kind, text: str, message: str) -> None:
    """What a person has to know to find it."""
    assert by_kind["tfm"].losses(text) == message


def test_half_a_surrogate_pair_is_no_text(by_kind) -> None:
    """JSON can hold one: every kind takes it for U+FFFD, and says so; training goes on."""
    for tokenizer in by_kind.values():
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
        assert (
            tokenizer.losses("a\ud800b") == "character 1: '\\ud800' (U+D800) comes back as '\ufffd' (U+FFFD)"
        )
    for kind in ("gpt4", "tfm"):
        assert Tokenizer.train(["ab\udc00 ab ab"], 300, kind).vocab_size == 300


def test_what_continues_a_text_keeps_its_space(by_kind) -> None:
    """A stream is decoded token by token: no word loses the space before it."""
    tokenizer = by_kind["tfm"]
    ids = tokenizer.encode("The quick brown fox 가 x")
    assert "".join(stream_text(tokenizer, ids)).encode() == tokenizer.decode_bytes(ids)
    assert tokenizer.decode_bytes(ids) == " The quick brown fox \u1100\u1161 x".encode()


@settings(max_examples=60, deadline=None)
@given(text=ANY, size=st.integers(1, 20))
@example("a b  c\nd", 1)
@example("x\ny z", 1)
def test_encoding_in_segments_changes_no_kind(by_kind, text: str, size: int) -> None:
    """Long documents are encoded piece by piece."""
    pieces = list(segments(text, size))
    assert "".join(pieces) == text
    for tokenizer in by_kind.values():
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def many_characters() -> list[str]:
    """1,500 letters, most of them as frequent as hundreds of others, so that the alphabet has to be cut in a tie."""
    letters = [chr(0x4E00 + i) for i in range(1500)]
    return [" ".join(letters[:400]) + " " + " ".join(letters), "ab ab abc"]


def test_training_tfm_twice_gives_the_same_file(by_kind) -> None:
    """Also where characters of one frequency would have to be chosen from."""
    first, again = (json.dumps(Tokenizer.train(many_characters(), 4000, "tfm")._to_json()) for _ in range(2))
    assert first == again
    assert Tokenizer.train(iter(TEXTS), 600, "tfm").fingerprint() == by_kind["tfm"].fingerprint()
    assert Tokenizer.train(TEXTS, 599, "tfm").fingerprint() != by_kind["tfm"].fingerprint()


def test_characters_that_were_not_learned_become_bytes() -> None:
    """Those of a tie at the end of the alphabet, and those never seen; nothing is lost."""
    tokenizer = Tokenizer.train(many_characters(), 4000, "tfm")
    frequent, rare, unseen = chr(0x4E00), chr(0x4E00 + 1400), "\U0001f600"
    assert len(tokenizer.encode(frequent)) == 1
    assert tokenizer.encode(rare)[1:] == list(rare.encode())
    assert tokenizer.decode(tokenizer.encode(rare + unseen)) == rare + unseen


def test_tfm_has_exactly_the_asked_size() -> None:
    """Bytes first, special tokens after what was learned, unused ones last."""
    small = Tokenizer.train(["ab ab"], 300, "tfm")
    assert (small.vocab_size, small.n_unused) == (300, 300 - 256 - 7 - 5)  # a b ▁ ab ▁ab
    assert small.decode([299]) == "<|unused_31|>" and small.decode_bytes([65]) == b"A"
    with pytest.raises(TokenizerError, match="vocab_size=263 is below 264"):
        Tokenizer.train(TEXTS, 263, "tfm")


def test_every_kind_survives_its_file(by_kind, files) -> None:
    """Fingerprint, special ids, byte lengths; the file is written the same again."""
    for kind, tokenizer in by_kind.items():
        loaded = open_tokenizer(str(files[kind]))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )
        assert np.array_equal(loaded.byte_lengths(), tokenizer.byte_lengths())
        assert loaded.n_unused == tokenizer.n_unused and loaded.specials == tokenizer.specials
        assert loaded._to_json() == tokenizer._to_json()


def test_fingerprints_of_earlier_runs_stand() -> None:
    """A run that is resumed compares them: this one was computed before there were several kinds."""
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 256}
    tokenizer = Tokenizer(PATTERN, ranks, {"<|eos|>": 257}, 260)
    assert tokenizer.fingerprint() == "7974618154874e0af9422f211322e21c7fc5c600bd056d3908f03608979265b7"


def theirs_alone(**model) -> tokenizers.Tokenizer:
    """What somebody makes with the library and nothing else: special tokens first, <unk>, no bytes."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", **model))
    library.normalizer = tokenizers.normalizers.NFD()
    stages = [tokenizers.pre_tokenizers.Metaspace(), tokenizers.pre_tokenizers.Punctuation()]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(stages)
    library.decoder = tokenizers.decoders.Metaspace()
    marks = ["<unk>", "<|bos|>", "<|eos|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=marks, show_progress=False)
    library.train_from_iterator(TEXTS, trainer)
    return library


def test_a_tokenizer_made_by_the_library_alone_opens(tmp_path: Path) -> None:
    """Same ids; unknown characters are said to be lost."""
    library = theirs_alone()
    library.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(tmp_path)
    for text in [*TEXTS, "<|bos|>the fox<|eos|>", "Ж <unk>"]:
        assert ours.encode(text, special=True) == library.encode(text).ids
        assert ours.decode(ours.encode(text, special=True)) == library.decode(
            library.encode(text).ids, skip_special_tokens=False
        )
    assert ours.eos_id == 2 and ours.byte_lengths()[:3].tolist() == [0, 0, 0]
    assert "become <unk>" in ours.loss_note
    assert ours.losses("Ж") == "character 0: 'Ж' (U+0416) comes back as '<' (U+003C)"


def _change(path: list, value):
    def change(facts):
        inner = facts
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


STAGES = ["pre_tokenizer", "pretokenizers"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(["normalizer"], {"type": "NFKC"}), "normalizer NFKC is not supported"),
        (_change([*STAGES, 0, "prepend_scheme"], "first"), "prepend_scheme first"),
        (
            _change([*STAGES, 1], {"type": "Whitespace"}),
            "Metaspace, Whitespace; with Metaspace only Punctuation",
        ),
        (_change(["model", "end_of_word_suffix"], "</w>"), "end_of_word_suffix '</w>' is not supported"),
        (_change(["model", "merges"], [["q", "zz"]]), "damaged, not a tokenizer.json"),
        (_change(["model"], {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "model WordLevel"),
        (_change(["version"], "9.0"), "damaged, not a tokenizer.json"),
    ],
)
def test_other_definitions_and_damage_are_refused_in_one_line(
    by_kind, tmp_path: Path, change, message: str
) -> None:
    """Rather than encoded otherwise in silence."""
    facts = json.loads(json.dumps(by_kind["tfm"]._to_json()))
    change(facts)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts))
    with pytest.raises(TokenizerError, match=message) as caught:
        open_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_dropout_of_a_file_is_for_training_only(by_kind) -> None:
    """Ids would be drawn by lot otherwise."""
    facts = json.loads(json.dumps(by_kind["tfm"]._to_json()))
    facts["model"]["dropout"] = 0.9
    assert Tokenizer.of(Metaspace(facts)).encode(TEXTS[0]) == by_kind["tfm"].encode(TEXTS[0])


def test_published_definitions_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pattern, special tokens and SHA-256 of each, as the library states them."""
    from tiktoken_ext import openai_public as public

    asked: list[str] = []

    def load(url: str, expected_hash: str) -> dict[bytes, int]:
        asked.append(expected_hash)
        return {}

    monkeypatch.setattr(public, "load_tiktoken_bpe", load)
    for published in PUBLISHED:
        theirs = public.ENCODING_CONSTRUCTORS[published.also or published.name]()
        patterns = (published.pattern, theirs["pat_str"])
        ours, same = (Tokenizer(p, {bytes([b]): b for b in range(256)}, {}).codec.pattern for p in patterns)
        assert (ours, published.specials) == (same, theirs["special_tokens"])
        assert asked[-1] == published.sha256
    assert [max(p.specials.values()) + 1 for p in PUBLISHED] == [50257, 100277, 200019]


@pytest.fixture
def synthetic(by_kind, tmp_path: Path) -> tuple[Path, Published]:
    """A .tiktoken file of tokens that were learned here, and its description."""
    ranks = by_kind["gpt4"].codec.ranks
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(content)
    pattern = PUBLISHED[2].pattern
    return path, Published("mine", hashlib.sha256(content).hexdigest(), pattern, {"<|endoftext|>": 650})


def test_a_local_tiktoken_file_gives_tiktokens_ids(synthetic: tuple[Path, Published]) -> None:
    """Against tiktoken's own reader; whatever its name is. Ids that nobody claims are unused tokens."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    path, mine = synthetic
    ranks = load_tiktoken_bpe(str(path), mine.sha256)
    theirs = tiktoken.Encoding("x", pat_str=mine.pattern, mergeable_ranks=ranks, special_tokens=mine.specials)
    ours = Tokenizer.of(from_file(path.rename(path.with_name("renamed.tiktoken")), (mine,)))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert (ours.eos_id, ours.vocab_size, theirs.n_vocab) == (650, 651, 651)
    assert ours.decode([649]).startswith("<|unused_")


def test_a_tiktoken_file_that_is_none_is_refused_in_one_line(
    synthetic: tuple[Path, Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged under its own name, unknown under another; by way of the one door."""
    path, mine = synthetic
    with pytest.raises(
        TokenizerError, match="holds none of gpt2, cl100k_base, o200k_base, by its SHA-256"
    ) as caught:
        open_tokenizer(str(path))
    assert "\n" not in str(caught.value)
    for name in ("o200k_base", "r50k_base"):
        wrong = path.with_name(f"{name}.tiktoken")
        wrong.write_bytes(path.read_bytes())
        with pytest.raises(
            TokenizerError, match=f"damaged: its SHA-256 is {mine.sha256}, that of the published"
        ):
            open_tokenizer(wrong)
    monkeypatch.setattr(named, "PUBLISHED", (mine,))
    path.write_bytes(path.read_bytes()[:-1] + b"7")
    with pytest.raises(TokenizerError, match="SHA-256"):
        open_tokenizer(path)


def test_bad_requests_of_training_are_refused_in_one_line() -> None:
    """An unknown kind, a special token twice."""
    with pytest.raises(TokenizerError, match=r"unknown kind of tokenizer 'gpt' \(did you mean 'gpt4'\?\)"):
        Tokenizer.train(TEXTS, 300, "gpt")
    with pytest.raises(TokenizerError, match="special token '<a>' is empty or stands twice"):
        Tokenizer.train(TEXTS, 300, "tfm", ("<a>", "<a>"))
