"""Reads shape comments and compares them with the shapes that a run really has.

``y = x.flatten(2)  # (B, L, H, d) → (B, L, H·d)`` claims the shape of the assigned (or
returned) value, and that a tensor named in the expression has the shape on the left.
Letters stand for numbers, the same within a comment; ``…`` for any leading sizes. A
comment without an arrow, ``# (B, L)``, claims the shape of the value alone.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

KINDS = (ast.Name, ast.Attribute, ast.Load, ast.Store)
GROUP = re.compile(r"(?:(\w+) × )?\(([^()]*)\)")
BARE = re.compile(r"^#\s()\((\w+,|[^(), ]+(?:, [^(),]+)+)\)(?:$|:|;|,)")
Shape = tuple[int, ...]


@dataclass
class Claim:
    """A shape comment: the statement it ends, and the groups of each stage."""

    path: Path
    node: ast.stmt
    text: str
    left: list[list[list[str]]]
    right: list[str]
    runs: int = 0
    problems: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.node.end_lineno}: {self.text}"


def sizes(group: str) -> list[str]:
    """["B", "2*L"] of "B, 2·L"."""
    names = [name.strip() for name in group.split(",") if name.strip()]
    names = [name.replace("·", "*").replace("×", "*") for name in names]
    names = [re.sub(r"(\d)\s*([^\W\d])", r"\1*\2", name) for name in names]
    return [re.sub(r"['′]", "_", name) for name in names]


def read_claims(path: Path) -> list[Claim]:
    """The shape comments of a module, each with the statement that it ends."""
    with path.open("rb") as file:
        comments = {
            token.start[0]: token.string
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT and token.line.strip()[0] != "#"
        }
    kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    claims = []
    for node in nodes:
        text = comments.get(node.end_lineno, "")
        *left, right = re.split("→", text)
        groups = GROUP.findall(right) if left else BARE.findall(right)
        if groups:
            before = [[sizes(g) for _, g in GROUP.findall(part)] for part in left]
            claims.append(Claim(path, node, text, before, sizes(groups[-1][1])))
    return claims


def unify(names: Sequence[str], shape: Shape, known: dict[str, int]) -> bool:
    """Whether ``names`` can stand for ``shape``; binds new letters in ``known``."""
    if names and names[0] in ("…", "..."):
        names, shape = names[1:], shape[len(shape) - len(names) + 1 :]
    if len(names) != len(shape):
        return False
    simple = [(n, s) for n, s in zip(names, shape, strict=True) if n.isidentifier()]
    rest = [(n, s) for n, s in zip(names, shape, strict=True) if not n.isidentifier()]
    if any(known.setdefault(name, size) != size for name, size in simple):
        return False
    return all(holds(expression, size, known) for expression, size in rest)


def holds(expression: str, size: int, known: dict[str, int]) -> bool:
    """Whether an expression of known letters has a value; one unknown is solved for."""
    letters = set(re.findall(r"[^\W\d]\w*", expression))
    unknown = sorted(letters - known.keys())
    if len(unknown) > 1:
        return True
    for value in range(1, 8 * size + 1) if unknown else (0,):
        trial = known | dict.fromkeys(unknown, value)
        if eval(expression, {}, trial) == size:
            known.update(trial)
            return True
    return False


def shapes_of(value: Any) -> list[Shape]:
    """The shapes of a tensor, or of every tensor of a list or tuple."""
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    if isinstance(value, (list, tuple)):
        return [shape for item in value for shape in shapes_of(item)]
    return []


def evaluated(node: ast.AST, frame: FrameType) -> list[Shape]:
    try:
        space = frame.f_globals | frame.f_locals
        return shapes_of(eval(ast.unparse(node), space))
    except Exception:
        return []  # it is not an expression of its own, or not yet defined


def named(node: ast.AST, frame: FrameType) -> list[Shape]:
    """The shapes of the tensors that an expression names: ``x``, ``self.table``."""
    parts = [p for p in ast.walk(node) if isinstance(p, (ast.Name, ast.Attribute))]
    parts = [p for p in parts if all(isinstance(q, KINDS) for q in ast.walk(p))]
    return list(dict.fromkeys(s for part in parts for s in evaluated(part, frame)))


def inputs(claim: Claim, frame: FrameType) -> list[Shape]:
    """Shapes that the left of a claim may mean: of names, else of inner expressions."""
    node = claim.node.value
    found = named(node, frame)
    if any(explain(stage, found) for stage in claim.left):
        return found
    parts = [p for p in ast.walk(node) if isinstance(p, ast.expr) and p is not node]
    return found + [s for part in parts for s in evaluated(part, frame)]


class Tracer:
    """Follows the lines of some modules and checks their claims as they run."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.claims = [claim for path in paths for claim in read_claims(path)]
        self.files: dict[str, dict[int, Claim]] = {str(path): {} for path in paths}
        for claim in self.claims:
            for line in range(claim.node.lineno, claim.node.end_lineno + 1):
                self.files[str(claim.path)][line] = claim
        self.pending: dict[FrameType, tuple[Claim, list[Shape]]] = {}

    def run(self, work: Callable[[], Any]) -> None:
        """Run ``work`` and check every claim that it passes."""
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            work()
        finally:
            sys.settrace(before)

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.step if frame.f_code.co_filename in self.files else None

    def step(self, frame: FrameType, event: str, value: Any) -> Any:
        claim = self.files[frame.f_code.co_filename].get(frame.f_lineno)
        waiting = self.pending.get(frame)
        if waiting and (event == "return" or waiting[0] is not claim):
            del self.pending[frame]
            self.check(*waiting, frame, event, value)
        if event == "line" and claim and frame not in self.pending:
            self.pending[frame] = claim, inputs(claim, frame)
        return self.step

    def check(
        self,
        claim: Claim,
        before: list[Shape],
        frame: FrameType,
        event: str,
        value: Any,
    ) -> None:
        if isinstance(claim.node, ast.Return):
            after = shapes_of(value) if event == "return" else []
        else:
            nodes = getattr(claim.node, "targets", None) or [claim.node.target]
            after = [shape for node in nodes for shape in named(node, frame)]
        if not after:
            return  # an exception passed, or the value is no tensor
        claim.runs += 1
        if not fits(claim, before, after):
            claim.problems.add(f"{claim}\n    named {before}, result {after}")


def explain(stage: list[list[str]], shapes: list[Shape]) -> list[dict[str, int]]:
    """The values of letters with which each group of a stage is one of the shapes."""
    states: list[dict[str, int]] = [{}]
    for names in stage:
        states = [
            known
            for state in states
            for shape in shapes
            if unify(names, shape, known := dict(state))
        ]
    return states


def fits(claim: Claim, before: list[Shape], after: list[Shape]) -> bool:
    """Whether letters exist that make a stage of the left, and the right, true."""
    states = [known for stage in claim.left for known in explain(stage, before)]
    states = states if claim.left and before else [{}]
    return any(all(unify(claim.right, s, state) for s in after) for state in states)
