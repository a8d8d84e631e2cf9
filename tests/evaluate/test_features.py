"""Features come out once per image, in order, whatever the batches and the number of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import DataError, UserError
from pretrain.evaluate.encoder import CentreCrop, Encoder
from pretrain.evaluate.features import Features, extract

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def tiny_encoder() -> Encoder:
    return Encoder("tiny", nn.Identity(), "pixels", CentreCrop(2, 2), ZERO, ONE, 12, {})


def image(number: int) -> Tensor:
    return torch.full((3, 2, 2), number, dtype=torch.uint8)


def stream(count: int) -> list[tuple[int, int]]:
    return [(number, number * 10) for number in range(count)]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 4), (11, 4), (3, 100)])
def test_each_image_is_encoded_once_and_in_order(count: int, batch_size: int) -> None:
    found = extract(tiny_encoder(), stream(count), image, batch_size, num_images=count)
    assert (found.features[:, 0] * 255).round().int().tolist() == list(range(count))
    assert found.labels.tolist() == [number * 10 for number in range(count)]
    assert found.features.dtype == torch.float32


def test_no_images_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        extract(tiny_encoder(), [], image, num_images=0)


def test_a_failure_to_prepare_an_image_is_not_swallowed() -> None:
    def prepare(number: int) -> Tensor:
        if number == 5:
            raise DataError("image 5 is damaged")
        return image(number)

    with pytest.raises(DataError, match="image 5"):
        extract(tiny_encoder(), stream(8), prepare, batch_size=2, num_images=8)


def test_what_is_kept_of_a_feature_is_stored_as_it_is() -> None:
    found = extract(tiny_encoder(), stream(5), image, 2, num_images=5, keep=lambda values: values.half())
    assert found.features.dtype == torch.float16
    exact = extract(tiny_encoder(), stream(5), image, 2, num_images=5)
    assert torch.equal(found.features, exact.features.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_that_are_not_finite_are_refused(dtype: torch.dtype) -> None:
    features = torch.ones(70_000, 2, dtype=dtype)
    Features(features, torch.zeros(70_000, dtype=torch.int64))
    features[69_999, 1] = float("nan")  # beyond what is looked at in one go
    with pytest.raises(UserError, match="NaN or Inf"):
        Features(features, torch.zeros(70_000, dtype=torch.int64))
