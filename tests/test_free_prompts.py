"""Files of free prompts: what is read, and what cannot be."""

import json

import pytest

from minidiff.data.language import Group, Meaning
from minidiff.judging.free_prompts import read_free_prompts


def test_free_prompts_are_read(tmp_path):
    file = tmp_path / "prompts.jsonl"
    two = {"thing": "cat", "color": "red", "place": None}
    lines = [
        {"prompt": "two red cats", "things": [two, two], "ground": None},
        {"prompt": "x", "things": [{"thing": "cat"}, {"thing": "dress"}]},
        {
            "prompt": "y",
            "things": [{"thing": "dog"}, {"thing": "cat", "place": "left"}],
            "ground": "blue",
        },
        {"prompt": "z\u2028", "things": [{"thing": "dog", "place": "above"}]},
    ]
    texts = [json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts) + "\n\n", "utf-8")
    assert [meaning for _, meaning in read_free_prompts(file)] == [
        Meaning((Group("cat", 2, "red"),)),
        Meaning((Group("cat"), Group("dress"))),
        Meaning((Group("dog"), Group("cat")), "right", "blue"),
        Meaning((Group("dog"),), "above"),
    ]


@pytest.mark.parametrize("place", ["thing", "entry"])
def test_keys_that_nothing_reads_are_told(tmp_path, place):
    entry = {"prompt": "a blue cat", "things": [{"thing": "cat"}]}
    (entry if place == "entry" else entry["things"][0])["colour"] = "red"
    (tmp_path / "prompts.jsonl").write_text(json.dumps(entry))
    with pytest.warns(UserWarning, match="'colour' is not read; known are"):
        read_free_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("[]", "line 1: "),
        ('{"prompt": "a"}', "line 1: 'things'"),
        ('{"prompt": "a", "things": []}', "0 kinds of things"),
        ('{"prompt": "a", "things": [{"thing": "wug"}]}', "thing is 'wug'"),
        ('{"prompt": "a", "things": [{"thing": 3}]}', "thing is 3"),
        ('{"prompt": "a", "things": [{"thing": null}]}', "line 1: thing is None"),
        ('{"prompt": "a", "things": [{"thing": ""}]}', "line 1: thing is ''"),
        ('{"prompt": null, "things": [{"thing": "cat"}]}', "line 1: prompt is None"),
        ('{"prompt": ["a"], "things": [{"thing": "cat"}]}', "prompt is ['a']"),
        (
            '{"prompt": "\\ud800", "things": [{"thing": "cat"}]}',
            "line 1: prompt is not a text in UTF-8",
        ),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "color": false}]}',
            "color is False",
        ),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "color": "mauve"}]}',
            "color is 'mauve'",
        ),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "place": "inside"}]}',
            "place is 'inside'",
        ),
        ('{"prompt": "a", "things": [{"thing": "cat"}], "ground": "x"}', "ground is"),
        (
            '{"prompt": "a", "things": [{"thing": "cat", "place": "left"}, '
            '{"thing": "dog", "place": "left"}]}',
            "places are 'left' and 'left'",
        ),
        ("", "holds no prompt"),
    ],
)
def test_free_prompts_that_cannot_be_are_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match="prompts.jsonl") as error:
        read_free_prompts(file)
    assert message in str(error.value) and "\n" not in str(error.value)
