"""The small world: its things, scenes and language."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from minidiff.data import language, reader, things
from minidiff.data.language import Group, Meaning, captions, shown
from minidiff.data.reader import read
from minidiff.data.scenes import (
    COLORS,
    GARMENTS,
    KINDS,
    LARGE,
    MIDDLE,
    PLACES,
    SMALL,
    World,
    held_out_colors,
    held_out_places,
    item_groups,
    shipped_things,
)
from minidiff.data.told import ToldScenes, own_things
from minidiff.files import tokenizer_files as words
from minidiff.files.sentencepiece import CharacterMap, case_folding

NAMED = (
    "cat dog rabbit pig penguin fish butterfly apple banana strawberry pizza car bus"
)
NAMED += " house tree sun moon star heart crown guitar book key umbrella rocket ghost"


@pytest.fixture(scope="module")
def world() -> World:
    return World("train")


# Things


def test_things_have_usual_names_and_one_meaning_each():
    assert len(things.THINGS) == len(set(things.CHARACTERS)) == 256
    assert set(NAMED.split()) <= set(things.THINGS)
    nouns = [word for names in language.NAMES for pair in names for word in set(pair)]
    assert len(nouns) == len(set(nouns))
    assert not set(nouns) & (set(COLORS) | set(language.OTHER_COLORS.values()))
    assert things.forms("mouse+mice/cherry/box") == (
        ("mouse", "mice"),
        ("cherry", "cherries"),
        ("box", "boxes"),
    )


@pytest.mark.slow
def test_sheet_is_what_the_font_draws():
    try:
        sheet = things.make_sheet()
    except FileNotFoundError:
        pytest.skip("no font here")
    shipped = Image.open(things.SHEET)
    assert sheet.size == shipped.size
    assert sheet.tobytes() == shipped.convert("RGBA").tobytes()
    assert (things.SHEET.parent / "OFL.txt").read_text().count("OPEN FONT LICENSE")


def test_cut_outs_fill_their_squares():
    pixels = things.cut_outs()
    assert pixels.shape == (256, 4, 48, 48)
    alpha = pixels[:, 3] > 0.5
    sides = torch.stack([alpha.any(i).sum(1) for i in (1, 2)]).amax(0)
    assert sides.min() >= 44  # the longer side of each reaches the borders
    assert (pixels[:, :3] <= pixels[:, 3:] + 1e-6).all()  # multiplied by alpha


@pytest.mark.slow
def test_fonts_that_do_not_fit_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDIFF_FONT", str(tmp_path / "none.ttf"))
    with pytest.raises(FileNotFoundError, match="MINIDIFF_FONT is .*none.ttf"):
        things.find_font()
    (tmp_path / "none.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="no pictures of 109 pixels"):
        things.make_sheet()
    import matplotlib

    plain = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setenv("MINIDIFF_FONT", plain)
    with pytest.raises(ValueError, match="no coloured picture of cat, dog"):
        things.make_sheet()


def test_cut_out_needs_transparency():
    with pytest.raises(ValueError, match="expected a transparent ground"):
        things.cut_out(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="is no cut-out"):
        things.cut_out(Image.new("RGBA", (8, 8)))
    picture = Image.new("RGBA", (40, 20))
    picture.paste("red", (10, 5, 30, 15))
    assert things.cut_out(picture).getchannel("A").getbbox() == (0, 12, 48, 36)


def test_sheet_of_other_things_is_refused(tmp_path):
    Image.new("RGBA", (96, 96)).save(tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="is not the sheet of 256 things"):
        things.cut_outs(tmp_path / "sheet.png")


# Scenes


def test_scene_depends_on_its_number_alone(world):
    alone = world.batch(torch.tensor([70]))
    among = world.batch(torch.tensor([3, 70, 11]))
    for name in ("images", "sides", "centres", "masks"):
        ours, theirs = getattr(alone, name)[0], getattr(among, name)[1]
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    assert world.attributes(torch.tensor([70])).kinds.tolist() == [
        among.attributes.kinds[1].tolist()
    ]
    other = World("train", seed=1).batch(torch.tensor([70]))
    assert not torch.equal(other.images, alone.images)


def test_training_never_shows_what_is_held_out(world):
    a = world.attributes(torch.arange(40_000))
    kinds, present = a.kinds.clamp(min=0), a.kinds >= 0
    assert not (present & (a.colors == held_out_colors()[kinds])).any()
    held = held_out_places()[kinds]  # (B, 2)
    two = a.counts[:, 1] > 0
    first = a.place == held[:, 0]
    second = two & (held[:, 1] >= 0) & (a.place == (held[:, 1] ^ 1))
    assert not (first | second).any()
    corner = (a.place > 3) & (a.place != MIDDLE)
    names = [PLACES[i].split() for i in a.place[corner].tolist()]
    sides = {"top": "above", "bottom": "below"}
    for name, number in zip(names, held[corner, 0].tolist(), strict=True):
        assert number < 0 or PLACES[number] not in [sides.get(n, n) for n in name]


@pytest.mark.slow
def test_a_twelfth_is_held_out():
    assert len(held_out_colors()) == len(KINDS)  # one of twelve colours each
    share = (held_out_places() >= 0).sum() / (4 * len(KINDS))
    assert 1 / 13 < share < 1 / 11
    for held in ("colors", "places"):
        a = World("test", held_out=held).attributes(torch.arange(500))
        if held == "colors":
            assert (a.colors[:, 0] == held_out_colors()[a.kinds[:, 0]]).all()
        else:
            assert (a.place == held_out_places()[a.kinds[:, 0]]).all()


def test_contrast_is_kept(world):
    batch = world.batch(torch.arange(600))
    a = batch.attributes
    known = shipped_things().contrast[a.kinds.clamp(min=0), a.colors]
    fits = known.gather(2, a.ground[:, None, None].expand(-1, 2, 1))[..., 0]
    assert (fits | (a.kinds < 0)).all()
    own = shipped_things().contrast[GARMENTS:, -1]
    assert own.any(1).all()  # each thing has a ground
    grounds = torch.tensor(list(COLORS.values())) / 127.5 - 1
    grounds = grounds[a.ground][..., None, None]
    differs = ((batch.images - grounds).abs().amax(1) > 0.3)[:, None]
    inside = batch.masks > 0.9
    share = (differs & inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
    shown = item_groups(a) >= 0
    assert share[shown].mean() > 0.9
    assert share[shown].quantile(0.01) > 0.3


def test_two_scenes_in_five_show_garments(world):
    kinds = world.attributes(torch.arange(20_000)).kinds
    assert (((kinds >= 0) & (kinds < GARMENTS)).any(1).float().mean()) > 0.4


@pytest.mark.slow
def test_items_lie_apart_within_the_picture_where_the_place_says(world):
    batch = world.batch(torch.arange(3000))
    a, present = batch.attributes, item_groups(batch.attributes) >= 0
    low = batch.centres - batch.sides[..., None] / 2
    high = batch.centres + batch.sides[..., None] / 2
    assert low[present].min() >= 0 and high[present].max() <= 64
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = present[:, i] & present[:, j]
        apart = (batch.centres[:, i] - batch.centres[:, j]).abs().amax(1)
        need = (batch.sides[:, i] + batch.sides[:, j]) / 2
        assert (apart - need)[both].min() > 0
    one = present.sum(1) == 1
    x, y = (batch.centres[:, 0] - 32).unbind(1)
    for name, where in (("left", x < -8), ("below", y > 8), ("top left", x < -8)):
        assert where[one & (a.place == PLACES.index(name))].all()


def test_items_lie_on_nine_places(world):
    batch = world.batch(torch.arange(1000))
    present = item_groups(batch.attributes) >= 0
    alone = present.sum(1) == 1
    large = batch.sides[:, 0] == LARGE
    unsaid = batch.attributes.sizes[:, 0] > 0
    assert torch.equal(large, alone & (batch.attributes.place == MIDDLE) & unsaid)
    assert torch.isin(batch.centres, torch.tensor([16.0, 32.0, 48.0])).all()
    assert (batch.centres[large] == 32).all()
    for i, j in ((0, 1), (0, 2), (1, 2)):  # none covers another
        apart = (batch.centres[:, i] - batch.centres[:, j]).abs().amax(-1)
        assert (apart[present[:, i] & present[:, j]] >= SMALL).all()


def test_tints_keep_light_and_shade(world):
    from minidiff.data.scenes import ramps

    dark, light = ramps().unbind(1)
    assert ((light - dark).amax(1) > 0.3).all()
    assert ((0 <= ramps()) & (ramps() <= 1)).all()


# Language


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_captions_parse_back_to_their_meanings(held_out):
    """20,000 captions; every word is known, and each has another caption."""
    numbers = torch.arange(10_000)
    attributes = World("train").attributes(numbers)
    texts, meanings = captions(attributes, 1, numbers, held_out)
    again = [language.say(m, language.Dice([0.5] * 48)) for m in meanings]
    for text, other, meaning in zip(texts, again, meanings, strict=True):
        assert read(text).canonical() == meaning.canonical(), text
        assert read(other).canonical() == meaning.canonical(), other
        assert not reader.unseen(text)


def test_captions_say_what_scenes_show(world):
    numbers = torch.arange(2000)
    attributes = world.attributes(numbers)
    _, meanings = captions(attributes, 2, numbers)
    for said, true in zip(meanings, shown(attributes), strict=True):
        assert said.ground in ("", true.ground)
        pairs = list(zip(said.groups, true.groups, strict=True))
        assert all(a.kind == b.kind and a.color in ("", b.color) for a, b in pairs)
        assert all(
            a.number == b.number or (a.number == 0 < 1 < b.number) for a, b in pairs
        )
        known = {"", true.place}
        known |= {"beside"} if true.place in ("left", "right") else set()
        known |= {"corner"} if " " in true.place else set()
        assert said.place in known


def test_held_out_phrasings_are_whole_constructions():
    """About a twelfth of the constructions; each word of theirs is trained."""
    tables = [language.NOUN_PHRASES, language.GROUNDS, language.ALONE]
    tables += language.RELATIONS.values()
    trained = {form for table in tables for form in table["trained"]}
    held = {form for table in tables for form in table["held"]}
    assert not trained & held
    assert 0.06 < len(held) / len(trained | held | set(language.PREFIXES)) < 0.14
    numbers = torch.arange(3000)
    texts, _ = captions(World("train").attributes(numbers), 1, numbers)
    seen = {word for text in texts for word in reader.split(text)}
    forms = [reader.split(re.sub(r"{\w+}", " ", form)) for form in held]
    assert {word for form in forms for word in form} <= seen


@pytest.mark.parametrize(
    ("text", "groups", "place", "ground"),
    [
        ("a cat", [Group("cat")], "", ""),
        ("two red dresses", [Group("dress", 2, "red")], "", ""),
        (
            "yellow bag and a blue shoe, grey background",
            [Group("bag", 1, "yellow"), Group("sneaker", 1, "blue")],
            "",
            "gray",
        ),
        ("A GUITAR ON PINK!", [Group("guitar")], "", "pink"),
        ("dogs", [Group("dog", 0)], "", ""),
        ("a pair of trousers", [Group("trousers")], "", ""),
        ("a pair of cats", [Group("cat", 2)], "", ""),
        ("cat left, dog right", [Group("cat"), Group("dog")], "left", ""),
        (
            "a Teddy Bear under a hot dog",
            [Group("teddy bear"), Group("hot dog")],
            "below",
            "",
        ),
        ("a tee in the upper left", [Group("t-shirt")], "top left", ""),
        ("left of a cat is a dog", [Group("dog"), Group("cat")], "left", ""),
        (
            "a violet backdrop with a big bus",
            [Group("bus", 1, "", "big")],
            "",
            "purple",
        ),
    ],
)
def test_sentences_that_a_person_writes(text, groups, place, ground):
    assert read(text) == Meaning(tuple(groups), place, ground)


def test_unknown_words_are_named():
    assert reader.unseen("A lighthouse in a STORM, red") == ["lighthouse", "storm"]
    assert reader.unseen("a red Cat & two t-shirts!") == []
    with pytest.raises(ValueError, match="names nothing"):
        read("hello")
    assert len(reader.vocabulary()) < 1000


def test_words_that_a_model_has_not_seen_are_named(tmp_path):
    assert words.seen(tmp_path) == frozenset() and not words.unknown_words(
        ["a b"], set()
    )
    words.write_words(tmp_path, ["A red T-shirt", "grün"])
    known = words.seen(tmp_path)
    assert known == {"a", "red", "t", "shirt", "grün"}
    assert not words.unknown_words(["A RED t shirt!"], known)
    texts = ["a lighthouse in a storm", "storm, red"]
    line = "the small model has not seen: lighthouse, in, storm"
    assert words.unknown_words(texts, known) == line
    assert words.unknown_words([" ".join("bcdefghij")], known).endswith("h, i, …")


# Told scenes


@pytest.mark.slow
def test_told_scenes_number_their_captions():
    train, test = (ToldScenes(s, told=30, held=8) for s in ("train", "test"))
    texts = train.all_captions()
    assert len(texts) == 30 + 30 + 8 and test.all_captions() == texts
    batch = train.batch(torch.tensor([4, 9]))
    assert [texts[i] for i in batch.caption_ids.tolist()] == batch.captions
    held = test.batch(torch.tensor([3]))
    assert held.captions == [texts[63]] and held.captions != [texts[3]]
    first, other = train.caption_pairs(torch.tensor([9]))[0].tolist()
    assert read(texts[first]).canonical() == read(texts[other]).canonical()
    again = ToldScenes("train", told=30, held=8).batch(torch.tensor([9]))
    assert again.meanings.tolist() == batch.meanings[1:].tolist()


@pytest.fixture
def own_cut_outs(tmp_path) -> Path:
    """Two shapes on transparent grounds, with captions."""
    for name, caption, ink in (("a", "A wug", "red"), ("b", "blicket", "yellow")):
        picture = Image.new("RGBA", (60, 40))
        picture.paste(ink, (10, 5, 50, 35))
        picture.paste("black", (20, 10, 30, 20))
        picture.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption + "\n")
    return tmp_path


def test_own_cut_outs_are_composed_like_things(own_cut_outs):
    own = own_things(str(own_cut_outs))
    assert own.names == ("wug", "blicket") and len(own) == 2
    scenes = ToldScenes("train", told=200, held=8, things=own)
    texts = scenes.all_captions()
    said = {word for text in texts for word in reader.split(text)}
    assert {"wug", "wugs", "blicket", "dress"} <= said and "cat" not in said
    batch = scenes.batch(torch.arange(200))
    kinds = batch.attributes.kinds
    assert kinds.max() == GARMENTS + 1
    alone = (batch.attributes.counts.sum(1) == 1) & (batch.attributes.colors[:, 0] < 0)
    for name, channels in (("wug", [1, 0, 0]), ("blicket", [1, 1, 0])):
        shown = alone & (kinds[:, 0] == scenes.kinds.index(name))
        inside = batch.masks[shown][:, :1] > 0.99
        pixels = (batch.images[shown] + 1) / 2 * inside
        brightest = pixels.amax((0, 2, 3))
        torch.testing.assert_close(
            brightest, torch.tensor(channels).float(), atol=0.02, rtol=0
        )


def test_only_an_article_is_taken_off_a_name(own_cut_outs):
    (own_cut_outs / "a.txt").write_text("A-frame")
    assert own_things(str(own_cut_outs)).names == ("a-frame", "blicket")


@pytest.mark.parametrize(
    ("caption", "mode", "ink", "message"),
    [
        ("a dax", "RGB", "red", "c.png is no cut-out: expected a transparent ground"),
        ("a dax", "RGBA", "#ff000014", "c.png is no cut-out: nothing is opaque at 48"),
        ("", "RGBA", "red", "the caption of c.png is ''; expected one thing"),
        ("the\n", "RGBA", "red", "the caption of c.png is 'the"),
        ("Two cats", "RGBA", "red", "the caption of c.png is 'Two cats"),
        ("the  wug", "RGBA", "red", "a.png and c.png are both called 'wug'"),
    ],
)
def test_cut_outs_that_cannot_be(own_cut_outs, caption, mode, ink, message):
    picture = Image.new("RGBA", (60, 40))
    picture.paste(ink, (10, 5, 50, 35))
    picture.convert(mode).save(own_cut_outs / "c.png")
    (own_cut_outs / "c.txt").write_text(caption)
    with pytest.raises(ValueError, match=message):
        own_things(str(own_cut_outs))


@pytest.mark.slow
def test_captions_fit_the_encoders():
    """Two things with colours, sizes, places and a ground: 32 tokens hold them."""
    from minidiff.tokenizer import CLIPTokenizer, T5Tokenizer

    numbers = torch.arange(6000)
    attributes = World("train").attributes(numbers)
    texts, _ = captions(attributes, 3, numbers)
    small = [text.lower() for text in texts]
    clip = CLIPTokenizer.train(small, 1536, 32)
    t5 = T5Tokenizer.train(small, 1536, 32, 32)
    t5 = T5Tokenizer(t5.scores, case_folding(), t5.settings)
    later, _ = captions(attributes, 4, numbers)
    longest = "a tiny violet christmas tree at the top and one little turquoise fire "
    longest += "engine at the bottom in front of an orange backdrop"
    for tokenizer in (clip, t5):
        lengths = [len(tokenizer.encode(text)) for text in (*later, longest.upper())]
        assert max(lengths) <= 32


def test_case_folding_makes_capitals_small():
    fold = CharacterMap(case_folding())
    assert fold("A Zebra, 2 É @[`{") == "a zebra, 2 É @[`{"
