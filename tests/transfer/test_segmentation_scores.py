"""mIoU and accuracies against scikit-learn, against numbers worked by hand, and their edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score

from pretrain.transfer.segmentation.scores import IGNORED, confusion, majority, scores

NAMES = tuple(f"class {number}" for number in range(7))


def answers(seed: int, num_classes: int = 7, right_ratio: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and labels (5, 40, 30), some right, some labels ignored, classes unequally often."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_classes, 3.0))
    labels = rng.choice(num_classes, p=shares, size=(5, 40, 30)).astype(np.uint8)
    guesses = rng.integers(0, num_classes, labels.shape)
    predicted = np.where(rng.random(labels.shape) < right_ratio, labels, guesses)
    labels[rng.random(labels.shape) < 0.1] = IGNORED
    return torch.from_numpy(predicted), torch.from_numpy(labels)


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed: int) -> None:
    predicted, labels = answers(seed)
    matrix = confusion(predicted, labels, 7)
    found = scores(matrix, NAMES)

    there = (labels != IGNORED).numpy()
    truth, said = labels.numpy()[there], predicted.numpy()[there]
    classes = list(range(7))
    np.testing.assert_array_equal(matrix.numpy(), confusion_matrix(truth, said, labels=classes))
    ious = jaccard_score(truth, said, labels=classes, average=None)
    recalls = recall_score(truth, said, labels=classes, average=None)
    assert [row["iou"] for row in found["classes"]] == pytest.approx(ious, abs=1e-12)
    assert [row["accuracy"] for row in found["classes"]] == pytest.approx(recalls, abs=1e-12)
    assert found["miou"] == pytest.approx(
        jaccard_score(truth, said, labels=classes, average="macro"), abs=1e-12
    )
    assert found["macc"] == pytest.approx(recalls.mean(), abs=1e-12)
    assert found["pixel_accuracy"] == pytest.approx((truth == said).mean(), abs=1e-12)


def test_scores_worked_by_hand() -> None:
    """Class 0: 3 of 4 right and 1 false alarm, 3 / 5; class 1: 2 of 3 right and 1 false alarm, 2 / 4."""
    labels = torch.tensor([[0, 0, 0, 0, 1, 1, 1, IGNORED]])
    predicted = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1]])
    matrix = confusion(predicted, labels, 2)
    assert matrix.tolist() == [[3, 1], [1, 2]]
    found = scores(matrix, ("a", "b"))
    assert found["miou"] == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert found["macc"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert found["pixel_accuracy"] == pytest.approx(5 / 7)


def test_what_is_right_everywhere_scores_exactly_one() -> None:
    _, labels = answers(3)
    predicted = torch.where(labels == IGNORED, 0, labels).long()
    found = scores(confusion(predicted, labels, 7), NAMES)
    assert (found["miou"], found["macc"], found["pixel_accuracy"]) == (1.0, 1.0, 1.0)


def test_the_matrix_is_of_the_whole_set_and_not_a_mean_over_images() -> None:
    """Ten pixels of class 0, nine of them right; then one of class 0 missed beside nine of class 1 found."""
    labels = torch.tensor([[0] * 10, [0] + [1] * 9])
    predicted = torch.tensor([[0] * 9 + [1], [1] * 10])
    whole = confusion(predicted, labels, 2)
    parts = [confusion(*pair, 2) for pair in zip(predicted, labels, strict=True)]
    assert torch.equal(parts[0] + parts[1], whole)
    found = scores(whole, ("a", "b"))
    assert found["miou"] == pytest.approx((9 / 11 + 9 / 11) / 2)
    over_images = [scores(part, ("a", "b"))["miou"] for part in parts]
    assert over_images == pytest.approx([(9 / 10 + 0) / 2, (0 + 9 / 10) / 2])


def test_counts_stay_exact_where_float32_would_not() -> None:
    matrix = torch.tensor([[2**24 + 1, 1], [0, 2**24]])
    found = scores(matrix, ("a", "b"))
    assert found["num_pixels"] == 2**25 + 2
    assert found["classes"][0]["iou"] == (2**24 + 1) / (2**24 + 2)


def test_a_class_that_is_nowhere_is_in_no_mean_and_one_only_predicted_counts_as_missed() -> None:
    matrix = torch.tensor([[8, 2, 0], [0, 0, 0], [0, 0, 0]])
    found = scores(matrix, ("there", "false alarm", "nowhere"))
    assert [row["iou"] for row in found["classes"]] == [0.8, 0.0, None]
    assert [row["accuracy"] for row in found["classes"]] == [0.8, None, None]
    assert (found["miou"], found["macc"]) == (0.4, 0.8)


def test_the_majority_baseline_is_that_of_saying_one_class_everywhere() -> None:
    _, train_labels = answers(4)
    _, labels = answers(5)
    counts = [torch.bincount(each[each != IGNORED].long(), minlength=7) for each in (train_labels, labels)]
    most = int(counts[0].argmax())
    torch.testing.assert_close(
        majority(counts[0], counts[1]), confusion(torch.full(labels.shape, most), labels, 7)
    )


def test_predictions_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="for labels"):
        confusion(torch.zeros(4, 5), torch.zeros(5, 4), 2)
