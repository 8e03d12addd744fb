"""Strings for the tokenizers' parity tests: every plane, script and oddity."""

import random

SPECIAL = [
    *("<|startoftext|>", "<|endoftext|>", "</s>", "<pad>", "<unk>", "<extra_id_0>"),
    *("<extra_id_99>", "<extra_id_100>", "!", "<|STARTOFTEXT|>", "<|EndOfText|>"),
    *("</w>", "<|endoftext|", "|>", "<|", "＜pad＞", "▁", "▁▁", "<s>", "##"),
]
SPACES = [
    *" \t\n\r\v\f\x85\xa0\u1680\u2000\u2003\u200b\u2028\u202f\u3000\ufeff\x1c\x1f"
]
MARKS = [
    *"\u0301\u0308\u0327\u0334\u0345\u093c\u094d\u3099\u20e3\ufe0f\u200d\U0001d165"
]
JOINED = [
    "👩‍🚀",
    "👨‍👩‍👧‍👦",
    "🏳️‍🌈",
    "👍🏽",
    "🇫🇷",
    "1️⃣",
    "❤️‍🔥",
    "©️",
    "e\u0301",
    "ﬁ\u0301",
]
RANGES = [
    *(
        (0x20, 0x7E),
        (0x20, 0x7E),
        (0, 0x1F),
        (0x7F, 0x9F),
        (0xA0, 0x24F),
        (0x250, 0x36F),
    ),
    *((0x370, 0x52F), (0x590, 0x6FF), (0x700, 0x8FF), (0x900, 0xDFF), (0xE00, 0x10FF)),
    *((0x1100, 0x11FF), (0x1AB0, 0x1AFF), (0x1D00, 0x1FFF), (0x2000, 0x2BFF)),
    *((0x2C00, 0x2FFF), (0x3000, 0x30FF), (0x3100, 0x9FFF), (0xA640, 0xABFF)),
    *((0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xF900, 0xFFFF), (0x10000, 0x1FFFF)),
    *((0x10D00, 0x10FFF), (0x11000, 0x11FFF), (0x16D40, 0x16FFF), (0x1D100, 0x1D1FF)),
    *((0x1E000, 0x1E7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2FFFF), (0x30000, 0x3FFFF)),
    *((0x40000, 0xDFFFF), (0xE0000, 0xEFFFF), (0xF0000, 0x10FFFF)),
]
WORDS = (
    "a red dress on blue background photo of t-shirt it's they're I'd WE'LL don't 'S "
    "naïve Straße ΣΊΣΥΦΟΣ İstanbul Ǆ ﬀ ① ½ ١٢٣ 12345 3.14 (word:1.2) \\( [x] {y} $5 #1 "
    "שלום عَرَبِيّ हिन्दी ไทย 日本語 中文 한국어 русский ｆｕｌｌ ㍿ ℌ x² a_b "
    "don''t !!! ... ?!"
).split()


def characters(count: int, rng: random.Random) -> str:
    """Return characters of one range, or of several, with spaces and marks between."""
    pool = rng.sample(RANGES, rng.choice((1, 1, 2, 4)))
    text = ""
    for _ in range(count):
        low, high = rng.choice(pool)
        code = rng.randint(low, high)
        text += chr(code) if not 0xD800 <= code < 0xE000 else rng.choice(MARKS)
        if rng.random() < 0.2:
            text += rng.choice(MARKS + SPACES + [" "] * 12)
    return text


def words(count: int, rng: random.Random) -> str:
    """Return words, special tokens, emoji and spaces in any order."""
    pool = WORDS * 3 + SPECIAL + JOINED + SPACES
    glue = rng.choice((" ", " ", "", "  ", "\t\n"))
    return glue.join(rng.choice(pool) for _ in range(count))


def strings(count: int, seed: int) -> list[str]:
    """Return ``count`` strings; the same seed gives the same strings."""
    rng = random.Random(seed)
    fixed = ["", " ", "   ", "\n", *SPECIAL, *SPACES, *MARKS, *JOINED, *WORDS]
    made = [
        rng.choice((characters, words))(rng.choice((1, 2, 3, 5, 8, 20)), rng)
        for _ in range(count - len(fixed))
    ]
    return fixed + made
