"""The everyday things of the small model's world: their names and their cut-outs.

Each is one picture of the font Noto Color Emoji, called by the word that people use.
A sheet of the cut-outs, 48 pixels a side, ships with the font's licence, so that nobody
needs the font; ``python -m minidiff.data.things`` makes it anew.
"""

import functools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SHEET = Path(__file__).parent.parent / "pretrained" / "things" / "things.png"
SIZE = 48  # pixels along a side of a cut-out
OPAQUE = 0.9  # above this share of 1
COLUMNS = 16  # cut-outs side by side on the sheet
FONT_SIZE = 109  # the only size of the font's pictures
FONT_VERSION = "Noto Color Emoji 2.051"
FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "/Library/Fonts/NotoColorEmoji.ttf",
)
# A character and its name; other names and an irregular plural follow: "/", "+".
TABLE = """
🐱 cat/kitten/kitty, 🐶 dog/puppy, 🐰 rabbit/bunny, 🐷 pig/piglet, 🐭 mouse+mice,
🐹 hamster, 🦊 fox, 🐻 bear, 🐼 panda, 🐨 koala, 🐯 tiger, 🦁 lion, 🐮 cow, 🐸 frog,
🐵 monkey, 🐔 chicken/hen, 🐥 chick, 🐦 bird, 🦆 duck, 🦅 eagle, 🦉 owl, 🦇 bat,
🐺 wolf+wolves, 🐴 horse/pony, 🦄 unicorn, 🐝 bee, 🐛 caterpillar, 🐌 snail,
🐞 ladybug/ladybird, 🐜 ant, 🕷 spider, 🐢 turtle/tortoise, 🐍 snake, 🦖 dinosaur,
🐙 octopus, 🦐 shrimp, 🦞 lobster, 🦀 crab, 🐟 fish+fish, 🐬 dolphin, 🐳 whale,
🦈 shark, 🐊 crocodile/alligator, 🦓 zebra, 🐘 elephant, 🦛 hippo, 🦏 rhino,
🐪 camel, 🦒 giraffe, 🦘 kangaroo, 🐑 sheep+sheep/lamb, 🐐 goat, 🦌 deer+deer,
🦜 parrot, 🦢 swan, 🦩 flamingo, 🐿 squirrel, 🦔 hedgehog, 🐉 dragon,
🪼 jellyfish+jellyfish, 🦋 butterfly, 🐧 penguin, 🐚 shell/seashell, 🌵 cactus,
🎄 christmas tree, 🌲 pine/pine tree/fir, 🌳 tree, 🌴 palm/palm tree, 🍀 clover,
🍁 maple leaf+maple leaves, 🍃 leaf+leaves, 🍄 mushroom, 🌹 rose, 🌷 tulip,
🌻 sunflower, 🌸 flower/blossom, 🍎 apple, 🍐 pear, 🍊 tangerine/mandarin, 🍋 lemon,
🍌 banana, 🍉 watermelon, 🍇 grapes+grapes, 🍓 strawberry, 🍒 cherry, 🍑 peach,
🍍 pineapple, 🥝 kiwi, 🍅 tomato, 🥑 avocado, 🍆 eggplant/aubergine, 🥕 carrot,
🌽 corn+corn/maize, 🥦 broccoli, 🧅 onion, 🍞 bread/toast, 🥐 croissant, 🥨 pretzel,
🥞 pancake, 🧇 waffle, 🧀 cheese, 🍔 burger/hamburger, 🍟 fries+fries, 🍕 pizza,
🌭 hot dog, 🌮 taco, 🥚 egg, 🍿 popcorn, 🍦 ice cream, 🍩 donut/doughnut,
🍪 cookie/biscuit, 🎂 birthday cake, 🍰 cake, 🧁 cupcake/muffin, 🍫 chocolate,
🍬 candy/sweet, 🍭 lollipop, 🍯 honey, 🥛 milk, ☕ coffee/cup/mug, 🫖 teapot,
🍷 wine/wine glass, 🍺 beer, 🥄 spoon, 🍴 fork, 🔪 knife+knives, 🚗 car, 🚕 taxi/cab,
🚌 bus, 🚑 ambulance, 🚒 fire truck/fire engine, 🚚 truck/lorry, 🚜 tractor,
🚲 bicycle/bike, 🏍 motorcycle/motorbike, 🚆 train, ✈ plane/airplane/aeroplane,
🚁 helicopter, 🚀 rocket, ⛵ sailboat/boat, 🚢 ship, ⚓ anchor, 🛸 ufo/flying saucer,
🏠 house/home, 🏰 castle, ⛪ church, ⛺ tent, 🌋 volcano, 🏔 mountain, ☀ sun,
🌙 moon, ⭐ star, ☁ cloud, 🌈 rainbow, ⚡ lightning+lightning, ❄ snowflake,
⛄ snowman+snowmen, 🔥 fire/flame, 💧 drop, 🌊 wave, ☂ umbrella, 🌍 globe/earth,
🪐 planet/saturn, ❤ heart, 👑 crown, 💍 ring, 💎 diamond/gem, 🎸 guitar, 🎻 violin,
🎺 trumpet, 🎷 saxophone, 🎹 piano, 🥁 drum, 🎤 microphone, 🎧 headphones+headphones,
📻 radio, 📺 television/tv, 📱 phone/smartphone/telephone, 💻 laptop, 🖥 computer,
📷 camera, ⏰ clock/alarm clock, ⌚ watch, ⏳ hourglass, 💡 light bulb/bulb/lamp,
🔦 flashlight/torch, 🕯 candle, 🏮 lantern, 📕 book, ✏ pencil, 🖊 pen,
🖌 brush/paintbrush, ✂ scissors+scissors, 📏 ruler, 🔑 key, 🔒 lock/padlock,
🔨 hammer, 🪓 axe, 🪛 screwdriver, ⚙ gear, 🧲 magnet, 🪜 ladder, 🧹 broom,
🪣 bucket, 🪑 chair, 🛋 sofa/couch, 🛏 bed, 🚪 door, 🪞 mirror, 🚽 toilet, 📦 box,
🎁 gift/present, 🎈 balloon, 🎀 ribbon, ✉ envelope/letter, 🔔 bell, 🏆 trophy,
⚽ football/soccer ball, 🏀 basketball, 🎾 racket/tennis racket, 🎯 target, 🪁 kite,
🧸 teddy bear/teddy, 🎲 die+dice, 🤖 robot, 👽 alien, 👻 ghost, 💀 skull, 🎃 pumpkin,
🪄 magic wand/wand, 🗡 sword, 🛡 shield, 💣 bomb, 🔭 telescope, 🔬 microscope,
👓 glasses+glasses, 🕶 sunglasses+sunglasses, 🎩 top hat, 🧢 cap, 👒 hat,
🧣 scarf+scarves, 🧤 gloves+gloves, 🧦 socks+socks, 🎒 backpack/rucksack,
🦷 tooth+teeth, 🦴 bone, 👁 eye, 🪨 rock/stone, 🪶 feather, 🎨 palette,
🛹 skateboard, 🚦 traffic light, 🧊 ice cube/ice, 💰 money bag, 🪙 coin, 🔋 battery
"""
ENTRIES = [entry.split(maxsplit=1) for entry in TABLE.replace("\n", " ").split(",")]
CHARACTERS = tuple(character for character, _ in ENTRIES)


def plural(noun: str) -> str:
    """The regular plural of an English noun."""
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    hissing = noun.endswith(("s", "x", "z", "ch", "sh")) or noun in ES
    return noun + ("es" if hissing else "s")


ES = ("tomato", "volcano")


def forms(entry: str) -> tuple[tuple[str, str], ...]:
    """The names of a table's entry, each with its plural."""
    pairs = (name.partition("+") for name in entry.split("/"))
    return tuple((noun, given or plural(noun)) for noun, _, given in pairs)


# Each thing's names, the most usual one first, as pairs of singular and plural.
NAMES = tuple(forms(entry.strip()) for _, entry in ENTRIES)
THINGS = tuple(names[0][0] for names in NAMES)


# The font


def find_font() -> Path:
    """The font's file: what MINIDIFF_FONT names, or at the usual places.

    Raises FileNotFoundError where there is none.
    """
    own = os.environ.get("MINIDIFF_FONT")
    places = [Path(p).expanduser() for p in ([own] if own else FONT_PLACES)]
    if found := next((place for place in places if place.is_file()), None):
        return found
    where = f"MINIDIFF_FONT is {own!r}" if own else "it is at none of the usual places"
    raise FileNotFoundError(f"no font Noto Color Emoji: {where}; expected its .ttf")


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The font's picture of ``character``, cropped to what is opaque; None if empty."""
    picture = Image.new("RGBA", (160, 160))
    pen = ImageDraw.Draw(picture)
    pen.text((4, 4), character, font=font, embedded_color=True)
    box = picture.getbbox()
    return picture.crop(box) if box else None


def cut_out(picture: Image.Image) -> Image.Image:
    """``picture`` within 48 × 48 pixels, in the middle, its sides' ratio kept.

    Raises ValueError for a picture without transparency, or with nothing opaque.
    """
    name = getattr(picture, "filename", "") or "the picture"
    alpha = picture.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255 or alpha.getextrema()[1] == 0:
        raise ValueError(f"{name} is no cut-out: expected a transparent ground")
    cropped = picture.convert("RGBA").crop(alpha.getbbox())
    scale = SIZE / max(cropped.size)
    width, height = (max(1, round(side * scale)) for side in cropped.size)
    small = cropped.convert("RGBa").resize((width, height), Image.Resampling.BOX)
    square = Image.new("RGBA", (SIZE, SIZE))
    place = (SIZE - width) // 2, (SIZE - height) // 2
    square.paste(small.convert("RGBA"), place)
    if np.asarray(square)[..., 3].max() <= OPAQUE * 255:
        what = f"{name} is no cut-out: nothing is opaque"
        raise ValueError(f"{what} at {SIZE} × {SIZE} pixels")
    return square


def make_sheet(path: Path | None = None) -> Image.Image:
    """All things' cut-outs in rows of sixteen, drawn from the font.

    Raises FileNotFoundError without a font, and ValueError for one without pictures of
    this size or of some character, which it names.
    """
    path = path or find_font()
    try:
        font = ImageFont.truetype(path, FONT_SIZE)
    except OSError as error:
        raise ValueError(
            f"{path} has no pictures of {FONT_SIZE} pixels ({error}); expected "
            f"{FONT_VERSION}"
        ) from None
    drawn = zip(THINGS, (draw(font, c) for c in CHARACTERS), strict=True)
    pictures = {name: picture for name, picture in drawn if picture}
    missing = [n for n in THINGS if n not in pictures or not coloured(pictures[n])]
    if missing:
        raise ValueError(
            f"{path} has no coloured picture of {', '.join(missing[:8])}; expected "
            f"{FONT_VERSION}"
        )
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIZE, rows * SIZE))
    for i, picture in enumerate(pictures.values()):
        sheet.paste(cut_out(picture), (i % COLUMNS * SIZE, i // COLUMNS * SIZE))
    return sheet


def coloured(picture: Image.Image) -> bool:
    """Whether its opaque pixels have several colours, or one that is not gray."""
    pixels = np.array(picture).reshape(-1, 4)
    inks = np.unique(pixels[pixels[:, 3] == 255, :3].astype(int), axis=0)
    return len(inks) > 1 or bool((np.ptp(inks, axis=1) > 20).any())


# The sheet


@functools.cache
def cut_outs(path: Path = SHEET) -> Tensor:
    """Every thing's cut-out, float32 (N, 4, 48, 48) in [0, 1]: red, green, blue, alpha.

    The colours are multiplied by alpha. Raises ValueError for another sheet.
    """
    sheet = Image.open(path)
    rows = -(-len(THINGS) // COLUMNS)
    if sheet.size != (COLUMNS * SIZE, rows * SIZE):
        raise ValueError(f"{path} is not the sheet of {len(THINGS)} things")
    # (4, R·48, 16·48) → (4, R, 48, 16, 48) → (R, 16, 4, 48, 48) → (N, 4, 48, 48)
    tiles = multiplied(sheet).unflatten(2, (COLUMNS, SIZE)).unflatten(1, (rows, SIZE))
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)[: len(THINGS)].contiguous()


def multiplied(picture: Image.Image) -> Tensor:
    """Red, green, blue and alpha (4, H, W) in [0, 1], the colours times alpha."""
    pixels = torch.from_numpy(np.array(picture.convert("RGBA"))).float() / 255
    pixels = pixels.permute(2, 0, 1)  # (H, W, 4) → (4, H, W)
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])


if __name__ == "__main__":
    make_sheet().save(SHEET, optimize=True)
