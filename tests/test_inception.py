import pytest
import torch
from safetensors.torch import save_file

from minidiff.judging.inception import InceptionV3, load_inception


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights under which no layer fades or grows."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            deviation = (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.data.normal_(0, deviation, generator=generator)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def test_the_size_is_the_published_one():
    """torchvision's 27,161,264 less the two classifiers, 3,326,696 and 2,049,000."""
    with torch.device("meta"):
        model = InceptionV3()
    assert sum(p.numel() for p in model.parameters()) == 21_785_568


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@torch.no_grad()
def test_features_that_pytorch_fid_gave(tmp_path):
    """Four of either picture's, from pytorch-fid 0.3.0 with these random weights."""
    state = filled(InceptionV3()).state_dict() | {"fc.weight": torch.zeros(1008, 2048)}
    save_file(state, tmp_path / "weights.safetensors")
    found = load_inception(tmp_path / "weights.safetensors")(pictures() * 2 - 1)
    given = [[0.0226176, 0.0002306, 0.4021653, 3.1585009]]
    given += [[0.0306424, 0.0007365, 0.4107002, 3.1647642]]
    torch.testing.assert_close(
        found[:, ::512], torch.tensor(given), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_features_equal_pytorch_fid(tmp_path, monkeypatch):
    """With its own patched blocks and our random weights, read from a file."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    ours = filled(InceptionV3())
    state = ours.state_dict() | {"fc.weight": torch.zeros(1008, 2048)}
    save_file(state, tmp_path / "weights.safetensors")
    state |= {"fc.bias": torch.zeros(1008)}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: state)
    images = pictures()
    expected = theirs.InceptionV3().eval()(images)[0].flatten(1)
    found = load_inception(tmp_path / "weights.safetensors")(images * 2 - 1)
    assert found.shape == (2, 2048) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_last_pool_takes_maxima():
    """Where the block before, and torchvision's own, take means."""
    block, x = filled(InceptionV3()).Mixed_7c, torch.randn(1, 2048, 8, 8)
    pooled = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(pooled))


@pytest.mark.slow
def test_another_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights.safetensors is missing"):
        load_inception(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        load_inception(tmp_path / "weights.pth")
    state = InceptionV3().state_dict()
    lacking = {k: v for k, v in state.items() if "Mixed_7c" not in k}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"lacking.safetensors .* Mixed_7c"):
        load_inception(tmp_path / "lacking.safetensors")
    state["Conv2d_1a_3x3.conv.weight"] = torch.zeros(32, 1, 3, 3)
    save_file(state, tmp_path / "gray.safetensors")
    with pytest.raises(ValueError, match=r"gray.safetensors .* Conv2d_1a_3x3"):
        load_inception(tmp_path / "gray.safetensors")
