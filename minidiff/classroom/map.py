"""The map of the pipeline: the same in every chapter and on the book's first page.

It is HTML whose boxes are links, true to the data's way: latents leave the flow's
steps, not the transformer. In the book a link to a notebook leads to its page.
"""

import html
from dataclasses import dataclass
from typing import NamedTuple


class Station(NamedTuple):
    """A chapter on the map."""

    number: int
    name: str

    @property
    def stem(self) -> str:
        """Of its notebook's file."""
        return f"{self.number:02}_{KEYS[self.number - 1]}"


KEYS = (
    "tokenizer text_encoders vae attention dit flow_matching training sampling "
    "distillation lora control efficiency"
).split()
NAMES = (
    "tokenizers,text encoders,VAE,attention,transformer,flow matching,training,"
    "sampling,distillation,LoRA,control,memory and speed"
).split(",")
STATIONS = {k: Station(i + 1, NAMES[i]) for i, k in enumerate(KEYS)}

STYLE = """
.minidiff-map, .minidiff-map :is(span, div) { display: flex; flex-wrap: wrap;
  align-items: center; justify-content: center; gap: 0.35rem 0.5rem; }
.minidiff-map { font-size: 0.9em; line-height: 1.25; margin: 1rem 0; max-width: 46rem; }
.minidiff-map a, .minidiff-map .frame { border: 1px solid #7a808b; border-radius: 8px;
  padding: 0.35rem 0.6rem; text-align: center; }
.minidiff-map a { color: inherit; text-decoration: none; background: #1d5c9c22; }
.minidiff-map a:is(:hover, :focus-visible) { background: #1d5c9c55; }
.minidiff-map a[aria-current] { font-weight: 700; background: #e0762b44;
  border: 2px solid #c25e18; }
.minidiff-map .frame { border-style: dashed; }
.minidiff-map i { opacity: 0.85; }
.minidiff-map .next { flex-wrap: nowrap; }
.minidiff-map .rest { width: 100%; }
"""


@dataclass(frozen=True)
class Map:
    """The map with chapter ``here`` marked; ``folder`` leads to the notebooks."""

    here: str | None = None
    folder: str = ""

    def __repr__(self) -> str:
        station = STATIONS.get(self.here or "")
        where = f"chapter {station.number}, {station.name}" if station else "the start"
        return f"Figure (map): the way from prompt to picture; you are at {where}"

    def link(self, key: str) -> str:
        """The box of a chapter."""
        station = STATIONS[key]
        current = ' aria-current="true"' if key == self.here else ""
        place = f"{self.folder}{station.stem}.ipynb"
        return f'<a href="{place}"{current}>{station.number} {station.name}</a>'

    def _repr_html_(self) -> str:
        tokens, text, vae, attention, dit, flow, training, sampling, *beyond = (
            self.link(key) for key in KEYS
        )
        steps = f"<i>asks, step by step,</i> {dit} <i>with</i> {attention}"
        loop = f'<span class="frame"><i>noise</i>{then(flow)}{steps}</span>'
        way = "<i>prompt</i>" + "".join(map(then, (tokens, "<i>ids</i>", text)))
        way += "".join(map(then, ("<i>context</i>", loop, "<i>latents</i>", vae)))
        way += then("<i>picture</i>")
        rest = f"{sampling} <i>calls all of it</i> · {training} <i>made the weights</i>"
        more = f"<i>Part II:</i> {' · '.join(beyond)}"
        label = html.escape(repr(self), quote=True)
        rows = "".join(f'<div class="rest">{row}</div>' for row in (rest, more))
        inside = f"<style>{STYLE}</style>{way}{rows}"
        return f'<nav class="minidiff-map" aria-label="{label}">{inside}</nav>'


def then(station: str) -> str:
    """A station with the arrow that leads to it, on one line."""
    return f'<span class="next">→ {station}</span>'


def show_pipeline(here: str | None = None) -> Map:
    """The map of the pipeline, from prompt to picture; chapter ``here`` in colour."""
    if here is not None and here not in STATIONS:
        raise ValueError(f"unknown chapter {here!r}: expected one of {list(STATIONS)}")
    return Map(here)
