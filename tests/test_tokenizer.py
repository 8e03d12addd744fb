"""Chapter 1: the same ids as transformers', on real and on trained vocabularies."""

import json
import re
import shutil
import struct
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from exercises import Desk
from tokenizer_strings import strings

from minidiff import tokenizer as chapter
from minidiff.classroom import exercises
from minidiff.classroom.journey import PROMPT
from minidiff.files import sentencepiece, tokenizer_files
from minidiff.files.weights import TINY
from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer, Tokenizer, maximize

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

OURS = {
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "tokenizer_3": T5Tokenizer,
}
CAPTIONS = [
    "a red dress on a blue background",
    "a photo of a t-shirt on a white background",
    "an orange bag left of a green ankle boot on a black background",
    "a yellow sneaker above a pink sandal on a gray background",
    "a picture of purple trousers against a red background",
] * 3


@pytest.fixture(scope="module")
def folders(shared: Path) -> Path:
    return shared / "sd35" / "tokenizers"


@pytest.fixture(scope="module")
def references(folders: Path) -> dict:
    return {
        name: transformers.AutoTokenizer.from_pretrained(folders / name)
        for name in OURS
    }


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return strings(20_000, seed=0)


def ours(folders: Path, name: str) -> Tokenizer:
    return OURS[name].from_pretrained(folders / name)


def differences(
    tokenizer: Tokenizer, reference: Any, texts: list[str]
) -> Iterator[tuple[str, list[int], list[int]]]:
    """The texts whose ids are not the reference's, with both, one after another."""
    for start in range(0, len(texts), 200):
        part = texts[start : start + 200]
        for text, theirs in zip(part, reference(part)["input_ids"], strict=True):
            if (found := tokenizer.encode(text)) != theirs:
                yield text, found, theirs


# Parity on the published vocabularies


def test_strings_are_many_and_varied(texts):
    assert len(set(texts)) > 15_000
    planes = {ord(char) >> 16 for text in texts for char in text}
    assert planes == set(range(17))
    categories = {unicodedata.category(char) for text in texts for char in text}
    assert categories >= {"Mn", "Cc", "Cf", "Lo", "Zs", "So", "Cn", "Nd"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_ids_equal_the_reference(folders, references, texts, name):
    assert not [*islice(differences(ours(folders, name), references[name], texts), 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_decoded_text_equals_the_reference(folders, references, texts, name):
    tokenizer, reference = ours(folders, name), references[name]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(tokenizer.vocab_size, (300, 9), generator=generator).tolist()
    for ids in reference(texts[:2000])["input_ids"] + noise:
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def pipeline_ids(reference, texts: list[str], length: int) -> torch.Tensor:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return reference(texts, max_length=length, **options).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_padding_and_truncation_equal_the_reference(folders, references, texts, name):
    tokenizer, reference = ours(folders, name), references[name]
    texts = texts[:400] + ["long " * 600, "", "wow! cat"]
    for length in (256, 77, 3, 2):
        ids = tokenizer(texts, max_length=length)
        assert ids.dtype == torch.int64 and ids.shape == (len(texts), length)
        assert torch.equal(ids, pipeline_ids(reference, texts, length))
    default = tokenizer(texts)
    assert torch.equal(
        default, pipeline_ids(reference, texts, reference.model_max_length)
    )


@pytest.mark.slow
def test_facts_of_the_three_tokenizers(folders):
    clip_l, clip_g, t5 = (ours(folders, name) for name in OURS)
    assert clip_l(["wow! cat"])[0, :6].tolist() == [
        49406,
        2781,
        256,
        2368,
        49407,
        49407,
    ]
    assert clip_g(["wow! cat"])[0, :6].tolist() == [49406, 2781, 0, 2368, 49407, 0]
    assert (clip_l.bos_token_id, clip_l.eos_token_id) == (49406, 49407)
    assert (clip_l.pad_token_id, clip_g.pad_token_id, t5.pad_token_id) == (49407, 0, 0)
    assert (t5.bos_token_id, t5.eos_token_id, t5.unk_token_id) == (None, 1, 2)
    assert (clip_l.vocab_size, t5.vocab_size) == (49408, 32100)
    assert (clip_g.model_max_length, t5.model_max_length) == (77, 512)
    assert t5.sentinel_id(0) == 32099 and t5([""], 3).tolist() == [[1, 0, 0]]


# Each parity test catches its mutants


def keep_capitals(text: str) -> str:
    return chapter.regex.sub(r"\s+", " ", tokenizer_files.nfc(text))


def without_nfc(text: str) -> str:
    return tokenizer_files.lowercase(chapter.regex.sub(r"\s+", " ", text))


def pythons_tables(text: str) -> str:
    text = unicodedata.normalize("NFC", text)
    return chapter.regex.sub(r"\s+", " ", text).lower()


def without_end_of_word(word: str) -> tuple[str, ...]:
    return tuple(chapter.BYTE_TO_CHARACTER[byte] for byte in word.encode())


JOINED_DIGITS = chapter.regex.compile(chapter.WORD.pattern.replace("]]|[^", "]]+|[^"))
CLIP_MUTANTS = {
    "capitals kept": ("clean", keep_capitals),
    "accents not composed": ("clean", without_nfc),
    "Python's own tables": ("clean", pythons_tables),
    "no end of word": ("word_symbols", without_end_of_word),
    "digits joined": ("WORD", JOINED_DIGITS),
    "markers not split again": ("split_words", lambda text: chapter.WORD.findall(text)),
    "no merges": ("merge", lambda symbols, ranks: list(symbols)),
}


@pytest.mark.parametrize("mutant", CLIP_MUTANTS)
def test_ids_catch_mutants_of_clip(folders, references, texts, mutant, monkeypatch):
    monkeypatch.setattr(chapter, *CLIP_MUTANTS[mutant])
    tokenizer = ours(folders, "tokenizer")
    assert any(differences(tokenizer, references["tokenizer"], texts[:3000]))


def greedy(text: str, trie: dict, unknown: float) -> list[str]:
    pieces, start = [], 0
    while start < len(text):
        *_, (end, _) = chapter.arcs(text, start, trie, unknown)
        pieces.append(text[start:end])
        start = end
    return pieces


T5_MUTANTS = {
    "no character map": (T5Tokenizer, "normalize", lambda self, text: text),
    "letters instead of graphemes": (
        sentencepiece.CharacterMap,
        "__call__",
        lambda self, text: "".join(self._lookup(c) or c for c in text),
    ),
    "longest piece first": (chapter, "best_path", greedy),
    "unknown letters apart": (
        T5Tokenizer,
        "_word_ids",
        lambda self, word: [
            self.vocab.get(piece, 2)
            for piece in chapter.best_path(word, self._trie, self._unknown)
        ],
    ),
    "no mark before a word": (
        chapter,
        "spaced_words",
        lambda text: chapter.regex.findall("▁?[^▁]+", text),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", T5_MUTANTS)
def test_ids_catch_mutants_of_t5(folders, references, texts, mutant, monkeypatch):
    monkeypatch.setattr(*T5_MUTANTS[mutant])
    tokenizer = ours(folders, "tokenizer_3")
    assert any(differences(tokenizer, references["tokenizer_3"], texts[:3000]))


@pytest.mark.slow
def test_ids_catch_merges_in_the_wrong_order(folders, references, texts):
    tokenizer = ours(folders, "tokenizer")
    tokenizer.ranks = {pair: -rank for pair, rank in tokenizer.ranks.items()}
    assert any(differences(tokenizer, references["tokenizer"], texts[:3000]))


def test_ids_catch_a_forgotten_exclamation_mark(folders, references, texts):
    mutant = ours(folders, "tokenizer")
    assert any(differences(mutant, references["tokenizer_2"], texts[:2000]))


@pytest.mark.slow
def test_decoding_catches_its_mutants(folders, references, texts, monkeypatch):
    def decoded_alike(name: str) -> bool:
        tokenizer, reference = ours(folders, name), references[name]
        rows = reference(texts[:2000])["input_ids"]
        return all(
            tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
            for ids in rows
        )

    monkeypatch.setattr(chapter, "END_OF_WORD", "")
    assert not decoded_alike("tokenizer")
    monkeypatch.setattr(chapter.files, "tidy", lambda text: text)
    assert not decoded_alike("tokenizer_3")


@pytest.mark.parametrize("mutant", ["pad_token_id", "eos_token_id"])
def test_padding_catches_mutants(folders, references, texts, mutant):
    tokenizer = ours(folders, "tokenizer_2")
    setattr(tokenizer, mutant, 7)
    ids = tokenizer(texts[:50], max_length=77)
    assert not torch.equal(ids, pipeline_ids(references["tokenizer_2"], texts[:50], 77))


# Files


def copy(folder: Path, target: Path, *names: str) -> Path:
    target.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(folder / name, target)
    return target


SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.slow
def test_t5_reads_the_same_from_either_file(folders, texts, tmp_path):
    folder = folders / "tokenizer_3"
    proto = T5Tokenizer.from_pretrained(
        copy(folder, tmp_path / "proto", "spiece.model", *SETTINGS)
    )
    text = T5Tokenizer.from_pretrained(
        copy(folder, tmp_path / "text", "tokenizer.json", *SETTINGS)
    )
    assert proto.scores == text.scores and proto.charsmap == text.charsmap
    assert proto.settings == text.settings
    assert all(proto.encode(t) == text.encode(t) for t in texts[:3000])


def without_decoder(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_reads_what_older_versions_wrote(folders, texts, tmp_path, name):
    """Without added_tokens_decoder, special_tokens_map.json says what is special."""
    names = {"tokenizer_3": ("spiece.model",)}.get(name, ("vocab.json", "merges.txt"))
    folder = without_decoder(copy(folders / name, tmp_path / "old", *names, *SETTINGS))
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = OURS[name].from_pretrained(folder)
    assert not [*islice(differences(tokenizer, reference, texts[:2000]), 3)]
    assert tokenizer.pad_token_id == reference.pad_token_id


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_reads_what_transformers_writes(references, texts, tmp_path, name):
    references[name].save_pretrained(tmp_path)
    tokenizer = OURS[name].from_pretrained(tmp_path)
    assert not [*islice(differences(tokenizer, references[name], texts[:2000]), 3)]
    assert tokenizer.pad_token_id == references[name].pad_token_id


def trained() -> dict[str, Tokenizer]:
    return {
        "tokenizer": CLIPTokenizer.train(CAPTIONS, 1024, model_max_length=32),
        "tokenizer_2": CLIPTokenizer.train(CAPTIONS, 1024, 32, pad_token="!"),
        "tokenizer_3": T5Tokenizer.train(CAPTIONS, 512, 32, model_max_length=32),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("published", [False, True])
def test_transformers_reads_what_is_saved(folders, texts, tmp_path, name, published):
    tokenizer = ours(folders, name) if published else trained()[name]
    tokenizer.save_pretrained(tmp_path)
    kind = "T5TokenizerFast" if name == "tokenizer_3" else "CLIPTokenizer"
    for reader in (transformers.AutoTokenizer, getattr(transformers, kind)):
        reference = reader.from_pretrained(tmp_path)
        assert not [*islice(differences(tokenizer, reference, texts[:2000]), 3)]
        length = reference.model_max_length
        ids = pipeline_ids(reference, texts[:300], length)
        assert torch.equal(tokenizer(texts[:300]), ids)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.vocab == tokenizer.vocab and again.settings == tokenizer.settings


# Training


def test_fast_training_learns_the_same_merges():
    words = {}
    for caption in CAPTIONS + ["banana bandana anagram naan aaaaaaa"] * 2:
        for word in chapter.split_words(caption):
            symbols = chapter.word_symbols(word)
            words[symbols] = words.get(symbols, 0) + 1
    for limit in (0, 1, 30, 10_000):
        naive = chapter.learn_merges_naively(words, limit)
        assert chapter.learn_merges(words, limit) == naive
    assert len(naive) > 100


def test_heap_merges_as_the_naive_loop():
    ranks = {p: i for i, p in enumerate(CLIPTokenizer.train(CAPTIONS, 1024).ranks)}
    for text in strings(800, seed=1):
        for word in chapter.split_words(chapter.clean(text)):
            symbols = chapter.word_symbols(word)
            *_, last = chapter.merge_naively(symbols, ranks)
            assert chapter.merge(symbols, ranks) == list(last)
    repeated = {("a", "a"): 0, ("aa", "aa"): 1, ("aa", "a"): 2, ("aaaa", "a"): 3}
    for length in range(1, 20):
        *_, last = chapter.merge_naively("a" * length, repeated)
        assert chapter.merge("a" * length, repeated) == list(last)


def test_trained_vocabularies_suit_captions():
    clip, clip_g, t5 = trained().values()
    pieces = clip.tokens(clip.encode("a red dress on a blue background"))
    assert pieces[1:-1] == [
        w + "</w>" for w in "a red dress on a blue background".split()
    ]
    assert clip.vocab_size <= 1024 and clip.eos_token_id == clip.vocab_size - 1
    assert clip.bos_token_id == clip.vocab_size - 2
    assert clip_g.pad_token_id == 0 and clip_g.vocab["!"] == 0
    assert (
        clip_g.encode("red!")[2] == 0 and clip.encode("red!")[2] == clip.vocab["!</w>"]
    )
    assert t5.tokens(t5.encode("red dress")) == ["▁red", "▁dress", "</s>"]
    assert t5.vocab_size <= 512 and t5.sentinel_id(0) == t5.vocab_size - 1
    assert t5.sentinel_id(31) == t5.vocab_size - 32
    assert t5.encode("<extra_id_3> dress")[0] == t5.sentinel_id(3)


def test_any_text_survives_the_trained_byte_vocabulary():
    clip = trained()["tokenizer"]
    for text in strings(600, seed=2):
        wanted = "".join(chapter.split_words(chapter.clean(text)))
        if not any(marker in wanted for marker in ("<|", "</w>")):
            assert "".join(clip.decode(clip.encode(text)).split()) == "".join(
                wanted.split()
            )


def test_any_printable_ascii_survives_the_trained_pieces():
    t5 = trained()["tokenizer_3"]
    for text in ("Hello, World? (1 + 2) = {3}", "a [b] c\\d ~ ^ | `"):
        assert (
            t5.unk_token_id not in t5.encode(text)
            and t5.decode(t5.encode(text)) == text
        )


def test_training_is_the_same_each_time():
    for one, two in zip(trained().values(), trained().values(), strict=True):
        assert one.vocab == two.vocab


def test_best_path_is_the_best_of_all():
    scores = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -3.2, "aba": -5.1, "bab": -4.4}
    trie = chapter.build_trie(scores)

    def all_paths(text: str) -> list[list[str]]:
        if not text:
            return [[]]
        heads = (p for p in scores if text.startswith(p))
        return [
            [head, *tail] for head in heads for tail in all_paths(text[len(head) :])
        ]

    for text in ("ab", "abab", "babba", "aabbab"):
        best = max(all_paths(text), key=lambda path: sum(map(scores.get, path)))
        found = chapter.best_path(text, trie, -100.0)
        assert sum(map(scores.get, found)) == sum(map(scores.get, best))


def test_expected_counts_equal_enumeration():
    scores = {"a": -1.0, "b": -1.5, "ab": -2.0, "ba": -2.2}
    counts = chapter.expected_counts({"aba": 2}, scores)
    paths = [["a", "b", "a"], ["ab", "a"], ["a", "ba"]]
    weights = torch.tensor([sum(scores[p] for p in path) for path in paths]).softmax(0)
    for piece in scores:
        wanted = sum(
            2 * w * path.count(piece) for w, path in zip(weights, paths, strict=True)
        )
        assert counts[piece] == pytest.approx(float(wanted), rel=1e-5)


# Speed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_time_grows_with_the_length_of_a_word_not_its_square(folders, name):
    tokenizer = ours(folders, name)

    def seconds(length):
        """The processor's time for one word of that length, the least of five."""
        letters, times = torch.randint(97, 123, (length,), dtype=torch.uint8), []
        for shift in range(5):
            text = bytes(letters.roll(shift).tolist()).decode()
            start = time.thread_time()
            tokenizer.encode(text)
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(16_000) < 20 * seconds(2_000)  # the square: 64 times


# Bad input


@pytest.mark.parametrize("kind", [CLIPTokenizer, T5Tokenizer])
def test_an_empty_folder_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kind.from_pretrained(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    clip, _, t5 = trained().values()
    clip.save_pretrained(tmp_path / "clip")
    t5.save_pretrained(tmp_path / "t5")
    merges = tmp_path / "clip" / "merges.txt"
    for line, message in (("a b c", "two symbols"), ("zq qz", "not in the vocabulary")):
        text = merges.read_text()
        merges.write_text(text + line + "\n")
        with pytest.raises(ValueError, match=message):
            CLIPTokenizer.from_pretrained(tmp_path / "clip")
        merges.write_text(text)
    merges.unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        CLIPTokenizer.from_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "vocab.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="vocab.json is not valid JSON"):
        CLIPTokenizer.from_pretrained(tmp_path / "clip")
    shutil.copy(tmp_path / "t5" / "tokenizer.json", tmp_path / "clip")
    with pytest.raises(ValueError, match="expected a BPE vocabulary"):
        CLIPTokenizer.from_pretrained(tmp_path / "clip")
    (tmp_path / "t5" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="expected a Unigram model"):
        T5Tokenizer.from_pretrained(tmp_path / "t5")


DAMAGED = [
    b"",
    b"\x0a\xff",
    b"not a model at all",
    bytes(100),
    b"\x08\x01",
    b"\x0a\x00",
    b"\xff" * 1_000_000,  # one integer of seven million bits
]


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: str(data[:20]))
def test_a_damaged_spiece_model_is_named(tmp_path, data):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ValueError, match="spiece.model"):
        T5Tokenizer.from_pretrained(tmp_path)


LEAD_AWAY = [0] * 97 + [97 | 256 | 1000 << 10]  # "a": a value, far behind the end


@pytest.mark.parametrize(
    "data", [7, b"", bytes(4), struct.pack("<99I", 4 * 98, *LEAD_AWAY)]
)
def test_a_damaged_map_of_characters_is_named(data):
    with pytest.raises(ValueError, match="precompiled_charsmap is"):
        sentencepiece.CharacterMap(data)("a")


def test_a_cut_spiece_model_is_named(folders, tmp_path):
    data = (folders / "tokenizer_3" / "spiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="spiece.model"):
        T5Tokenizer.from_pretrained(tmp_path)


def test_bad_calls_say_what_was_expected():
    clip, _, t5 = trained().values()
    for call, error, message in (
        (lambda: clip("a red dress"), TypeError, "list of strings"),
        (lambda: clip([3]), TypeError, "found int"),
        (lambda: t5.encode("\ud800"), ValueError, "surrogates"),
        (lambda: clip(["a"], max_length=1), ValueError, "max_length 1"),
        (lambda: clip.decode([99_999]), ValueError, "99999"),
        (lambda: CLIPTokenizer.train(CAPTIONS, 100), ValueError, "vocab_size is 100"),
        (lambda: T5Tokenizer.train(CAPTIONS, 100), ValueError, "vocab_size is 100"),
        (lambda: CLIPTokenizer.train([], 600, pad_token="no"), ValueError, "'no'"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_saving_over_another_tokenizer_leaves_nothing_of_it(tmp_path):
    first, other = trained()["tokenizer"], CLIPTokenizer.train(CAPTIONS[:1], 560)
    first.save_pretrained(tmp_path)
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    other.save_pretrained(tmp_path)
    assert CLIPTokenizer.from_pretrained(tmp_path).vocab == other.vocab
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert not [*differences(other, reference, CAPTIONS)]


def test_no_sentinels_stay_none(tmp_path):
    t5 = T5Tokenizer.train(CAPTIONS, 512, extra_ids=0)
    t5.save_pretrained(tmp_path)
    again = T5Tokenizer.from_pretrained(tmp_path)
    assert again.vocab == t5.vocab and again.settings == t5.settings


def test_single_letters_stay_and_pairs_of_neighbours_do_not():
    """ "ab" is part of the alphabet's text, but no letter."""
    counts = Counter({"a": 0.1, "ab": 0.1, "b": 3.0})
    assert maximize(counts, "ab").keys() == {"a", "b"}


def test_texts_in_which_nothing_repeats():
    t5 = T5Tokenizer.train(["ab"], 300)
    assert t5.decode(t5.encode("ab")) == "ab"


# The chapter's tables and exercises


@pytest.fixture(scope="module")
def page() -> str:
    return Path(chapter.__file__).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_rows_in_the_chapter_are_the_published_ones(folders, page):
    rows = re.findall(
        r"^# \| (CLIP-L|CLIP-G|T5) \| ([\d ]+) \| (\d+) … \|$", page, re.M
    )
    assert [name for name, _, _ in rows] == ["CLIP-L", "CLIP-G", "T5"]
    for (_, ids, then), name in zip(rows, OURS, strict=True):
        expected = ours(folders, name)([PROMPT], 77)[0].tolist()
        found = [int(number) for number in ids.split()]
        assert found + [int(then)] * (77 - len(found)) == expected


def test_the_merges_in_the_chapter_are_the_published_ones(folders, page):
    """All that the prompt's words need, and none besides."""
    ranks = ours(folders, "tokenizer").ranks
    text = page.split("# published = ")[1].split("}")[0].replace("#", "") + "}"
    shown = eval(text)
    assert shown == {pair: ranks[pair] for pair in shown}
    used = set()
    for word in PROMPT.split():
        for before, after in pairwise(
            chapter.merge_naively(chapter.word_symbols(word), ranks)
        ):
            used |= {p for p in pairwise(before) if "".join(p) in set(after)}
    assert used == shown.keys()


def test_what_the_chapter_says_of_the_published_t5(folders):
    t5 = ours(folders, "tokenizer_3")
    unknown = t5.unk_token_id
    assert unknown not in t5.encode("é") and unknown in t5.encode("👗")
    assert t5.encode("红裙子 红 裙子").count(unknown) == 3


@pytest.fixture(scope="module")
def desk() -> Desk:
    scores = dict.fromkeys("▁undres", -4.0)
    scores |= {"▁un": -3.0, "▁und": -4.0, "re": -3.0, "ress": -4.0, "dress": -3.0}
    trie = chapter.build_trie(scores)

    def all_paths(word: str) -> list[list[str]]:
        heads = [word[:e] for e, _ in chapter.arcs(word, 0, trie, -99.0) if word]
        tails = [[h, *tail] for h in heads for tail in all_paths(word[len(h) :])]
        return tails if word else [[]]

    clip_l = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    known = {"trie": trie, "all_paths": all_paths, "clip_l": clip_l}
    known |= {"check": exercises.check, "seal": exercises.seal}
    return Desk("01_tokenizer", chapter, known)


def test_the_checks_accept_the_solutions(desk):
    for number in ("1_1", "1_2", "1_3"):
        assert desk.hand_in(number, desk.solution(number)) == "passed"
    other = "\nlisted = greedy\ngreedy = lambda *given: (*listed(*given),)"
    assert desk.hand_in("1_3", desk.solution("1_3") + other) == "passed"


WRONG = {
    "emoji as one letter": ("1_1", "two_lengths = lambda: (5, 11)"),
    "no ends": ("1_1", "two_lengths = lambda: (6, 12)"),
    "an end-of-word symbol of its own": ("1_1", "two_lengths = lambda: (8, 17)"),
    "all cuts": ("1_2", "count_paths = lambda word: 2 ** (len(word) - 1)"),
    "the best path alone": ("1_2", "count_paths = lambda word: 1"),
    "arcs, not paths": (
        "1_2",
        "count_paths = lambda w: sum(len([*arcs(w, i, trie, -99.0)]) "
        "for i in range(len(w)))",
    ),
    "a guess for long words": (
        "1_2",
        "count_paths = lambda w: len(all_paths(w)) if len(w) < 30 else 10**18",
    ),
    "Viterbi": ("1_3", "greedy = best_path"),
    "the shortest piece": (
        "1_3",
        """def greedy(word, trie):
    pieces = []
    while word:
        end = min(end for end, _ in arcs(word, 0, trie, -99.0))
        pieces, word = [*pieces, word[:end]], word[end:]
    return pieces""",
    ),
    "the last arc": (
        "1_3",
        """def greedy(word, trie):
    pieces = []
    while word:
        *_, (end, _) = arcs(word, 0, trie, -99.0)
        pieces, word = [*pieces, word[:end]], word[end:]
    return pieces""",
    ),
    "the longest piece anywhere": (
        "1_3",
        """def greedy(word, trie):
    spans = [(e - i, -i) for i in range(len(word))
        for e, _ in arcs(word, i, trie, -99.0)]
    if not spans:
        return []
    n, i = max(spans)
    return greedy(word[:-i], trie) + [word[-i:n - i]] + greedy(word[n - i:], trie)""",
    ),
    "no trap": ("1_3", 'trap = lambda: ("xy", {"z": -1.0})'),
    "an unknown letter for a trap": (
        "1_3",
        'trap = lambda: ("abc", {"ab": -1.0, "a": -1.0, "bc": -1.0})',
    ),
    "a trap that greedy escapes": (
        "1_3",
        'trap = lambda: ("ab", {"a": -5.0, "b": -5.0, "ab": -3.0})',
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_checks_refuse_wrong_answers(desk, wrong):
    desk.refuse(*WRONG[wrong])
