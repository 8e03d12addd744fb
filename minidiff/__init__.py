"""minidiff: Stable Diffusion 3.5 from scratch, as a book and as a package."""

TYPE_CHECKING = False  # as typing's, which Ctrl-C would interrupt while it is imported
if TYPE_CHECKING:
    from minidiff.control import load_control
    from minidiff.engine.loading import load
    from minidiff.sampling import Pipeline

__all__ = ["Pipeline", "load", "load_control"]


def __getattr__(name: str) -> object:
    """Import the pipeline when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'minidiff' has no attribute {name!r}")
    from minidiff import control
    from minidiff.engine import loading

    return getattr(control if name == "load_control" else loading, name)
