"""Unicode as the reference tokenizers see it, whatever Python's own tables say.

The reference is compiled: its normal form C follows Unicode 9, its classes of letters
and numbers Unicode 16, its lower case Unicode 17. Python 3.11 carries Unicode 14, and
newer versions carry newer tables. The differences concern a few hundred rare
characters; the tables below make the ids equal for these as well.
"""

import unicodedata

import regex

WHITE_SPACE = "".join(
    regex.findall(r"\p{White_Space}", "".join(map(chr, range(12289))))
)


def _class(ranges: str) -> str:
    """Turn ``"558 58b-58c"`` into the inside of a regular expression's class."""
    ends = [(r.split("-")[0], r.split("-")[-1]) for r in ranges.split()]
    return "".join(f"\\U{int(a, 16):08x}-\\U{int(b, 16):08x}" for a, b in ends)


# Letters and numbers that entered Unicode after version 16.
_NEW_LETTERS = _class(
    "558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 "
    "ab6c-ab6d 107bb-107bf 10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb "
    "11df1 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff 18cd6-18cda 18d09-18d20 "
    "18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 1df1f-1df24 "
    "1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 "
    "1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e 2cea2-2cead 323b0-33479 "
    "3d000-3fc3f"
)
_NEW_NUMBERS = _class("11de0-11de9 1246f 12475-1247f 12550-12686 16ff4-16ff6")
# For use inside the brackets of a regular expression with the flag (?V1).
LETTER = rf"[\p{{L}}--[{_NEW_LETTERS}]]"
NUMBER = rf"[\p{{N}}--[{_NEW_NUMBERS}]]"

# Marks that entered after Unicode 9, and blocks whose letters compose since then.
_YOUNG = regex.compile(
    "(["
    + _class(
        "5c8-5c9 7fd 897-89f 8ca-8d3 9fe c3c d3b-d3c eba 1715 1abf-1af0 1df6-1dfa a82c "
        "10d24-10d27 10d69-10d6d 10eab-10eac 10ecb-10ecf 10ef0-10efb 10efd-10eff "
        "10f46-10f50 10f82-10f85 11070 1133b 1145e 11839-1183a 119e0 11a34 11a47 11a99 "
        "11d42 11d44-11d45 11d97 11f41-11f42 16ff0-16ff1 1d127-1d128 1d250-1d252 "
        "1d25b-1d25c 1d25f 1d280-1d281 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef "
        "1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5 "
        "105c0-105ff 11380-113ff 11900-1195f 16100-1613f 16d40-16d7f"
    )
    + "])"
)

# Capitals that Python 3.11 does not know.
_NEW_CAPITALS = {
    0xA7CB: 0x264,
    0xA7DC: 0x19B,
    **{c: c + 1 for c in (0x1C89, 0xA7CC, 0xA7CE, 0xA7D2, 0xA7D4, 0xA7DA)},
    **{c: c + 0x20 for c in range(0x10D50, 0x10D66)},
    **{c: c + 0x1B for c in range(0x16EA0, 0x16EB9)},
}


def nfc(text: str) -> str:
    """Normal form C of Unicode 9: younger characters neither compose nor move."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _YOUNG.split(text))


def lowercase(text: str) -> str:
    """Lower case character by character: Σ becomes σ, at the end of a word too."""
    return text.replace("Σ", "σ").lower().translate(_NEW_CAPITALS)
