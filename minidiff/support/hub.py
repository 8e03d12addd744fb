"""Model folders from the hub, through huggingface_hub; imported only when needed."""

from pathlib import Path

REPOSITORIES = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "sd3.5-large-turbo": "stabilityai/stable-diffusion-3.5-large-turbo",
}
COMPONENTS = ("scheduler", "text_encoder*", "tokenizer*", "transformer", "vae")
KINDS = ("*.json", "*.txt", "*.model", "*.safetensors")
# fp16 copies of the text encoders, and the single files' folder of them
LEFT_OUT = ["*.fp16*", "text_encoders/*"]


def download(name: str) -> Path:
    """The local folder of a hub repository or alias, downloaded where it is not yet.

    Only the files of the diffusers layout are fetched. Raises OSError saying what is
    needed where the hub cannot be reached or refuses.
    """
    from huggingface_hub import errors, snapshot_download

    repository = REPOSITORIES.get(name, name)
    wanted = [f"{part}/{kind}" for part in COMPONENTS for kind in KINDS]
    try:
        folder = snapshot_download(
            repository,
            allow_patterns=["model_index.json", *wanted],
            ignore_patterns=LEFT_OUT,
        )
    except errors.GatedRepoError:
        raise PermissionError(f"{repository} is gated: {needs(repository)}") from None
    except errors.RepositoryNotFoundError:
        what = f"{repository} is not on the hub, or not for you"
        raise FileNotFoundError(f"{what}: {needs(repository)}") from None
    except (OSError, errors.HfHubHTTPError) as error:
        reason = type(error).__name__
        what = f"{repository} cannot be fetched ({reason}) and is not on this machine"
        raise ConnectionError(f"{what}: {needs(repository)}") from None
    return Path(folder)


def needs(repository: str) -> str:
    """What it takes to download a gated repository, in one line."""
    return (
        f"it needs a network, the licence accepted at https://huggingface.co/{repository}"
        " and a token of that account (`hf auth login`, or HF_TOKEN in the environment)"
    )
