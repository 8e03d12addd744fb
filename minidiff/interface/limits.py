"""How many pictures one call or one command may ask for. Nothing large is imported."""

MOST_PICTURES = 100_000


def check_pictures(prompts: int, each: int) -> None:
    """Raise ValueError for more pictures than may be asked for at once."""
    if prompts * each > MOST_PICTURES:
        asked = f"{prompts:,} × {each:,} pictures are asked for"
        raise ValueError(f"{asked}; expected at most {MOST_PICTURES:,} at once")
