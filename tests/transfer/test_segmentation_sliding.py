"""Windows cover an image, and what they say is put together without a trace of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pretrain.transfer.segmentation.sliding import predict, slide, window_starts


def pointwise(seed: int = 0, num_classes: int = 5) -> nn.Module:
    """A network that looks at one pixel at a time."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.GELU(), nn.Conv2d(16, num_classes, 1)).eval()


def pixels(height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("length", "window", "stride"), list(itertools.product((1, 7, 8, 9, 16, 23, 40), (8, 9), (3, 8)))
)
def test_windows_cover_a_side_and_end_with_it(length: int, window: int, stride: int) -> None:
    starts = window_starts(length, window, stride)
    seen = [place for start in starts for place in range(start, start + window)]
    assert set(range(length)) <= set(seen)
    assert max(seen) == max(length, window) - 1
    assert starts == sorted(set(starts))
    assert all(later - earlier <= stride for earlier, later in itertools.pairwise(starts))


def test_windows_of_cityscapes_lie_as_published() -> None:
    assert window_starts(2048, 768, 512) == [0, 512, 1024, 1280]
    assert window_starts(1024, 768, 512) == [0, 256]


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 24), (50, 37), (11, 60), (9, 8)])
def test_a_pointwise_network_says_the_same_in_windows_as_on_the_whole_image(size: tuple[int, int]) -> None:
    network, image = pointwise(), pixels(*size)
    whole = network(image[None])[0]
    torch.testing.assert_close(slide(network, image, 24, 16), whole, rtol=1e-6, atol=1e-6)
    windows, one_piece = (predict(network, image, size, window, 16, flip=False) for window in (24, None))
    assert torch.equal(windows, one_piece)


def test_where_windows_overlap_the_mean_of_what_they_say_counts() -> None:
    """Three windows at 0, 2 and 4 along a side of 8: the n-th says n."""
    calls = itertools.count()

    def network(window: Tensor) -> Tensor:
        return torch.full((1, 1, *window.shape[2:]), float(next(calls)))

    found = slide(network, pixels(4, 8), 4, 2)[0]
    expected = torch.tensor([0, 0, 0.5, 0.5, 1.5, 1.5, 2, 2])
    assert torch.equal(found, expected.expand(4, 8))


def test_an_image_smaller_than_a_window_is_padded_with_the_mean_colour() -> None:
    seen: list[Tensor] = []

    def network(window: Tensor) -> Tensor:
        seen.append(window)
        return window[:, :2]

    image = pixels(5, 7)
    assert torch.equal(slide(network, image, 8, 4), image[:2])
    (window,) = seen
    assert window.shape == (1, 3, 8, 8)
    assert torch.equal(window[0, :, :5, :7], image)
    assert not window[0, :, 5:].any()
    assert not window[0, :, :, 7:].any()


@torch.no_grad()
def test_mirrored_images_are_turned_back_before_the_mean() -> None:
    network, image = pointwise(), pixels(6, 10)
    plain = predict(network, image, (6, 10), None, 4, flip=False)
    assert torch.equal(predict(network, image, (6, 10), None, 4, flip=True), plain)

    def leans(window: Tensor) -> Tensor:
        """Is certain of class 1 in the left half, mildly for class 0 in the right."""
        logits = torch.zeros(1, 2, *window.shape[2:])
        logits[:, 1, :, : window.shape[3] // 2] = 8.0
        logits[:, 0, :, window.shape[3] // 2 :] = 1.0
        return logits

    assert predict(leans, image, (6, 10), None, 4, flip=False).sum() == 6 * 5
    assert predict(leans, image, (6, 10), None, 4, flip=True).sum() == 6 * 10


def test_answers_have_the_size_that_is_asked_for() -> None:
    found = predict(lambda image: image[:, :2], pixels(12, 9), (24, 18), None, 4, flip=False)
    assert found.shape == (24, 18)
