from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.teacher import Teacher


class Student(nn.Module):
    """A parameter in any precision, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def named(student: nn.Module, part: str = "backbone") -> list[tuple[str, Tensor]]:
    return [*student.named_parameters(prefix=part), *student.named_buffers(prefix=part)]


def test_a_new_teacher_is_a_copy_that_shares_nothing_and_never_learns() -> None:
    student = Student()
    student.train()
    teacher = Teacher(student)
    for (name, own), (_, value) in zip(named(teacher.backbone), named(student), strict=True):
        assert torch.equal(own, value), name
        assert own.data_ptr() != value.data_ptr(), name
        assert not own.requires_grad
    assert not teacher.backbone.training
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    output = teacher.backbone.layer(torch.ones(1, 3))
    assert not output.requires_grad


def test_after_k_updates_the_teacher_is_the_closed_form() -> None:
    """t_k = m^k t_0 + sum of (1 - m) m^(k - i) s_i over i = 1..k."""
    torch.manual_seed(0)
    student = Student()
    teacher = Teacher(student)
    start, momentum, weights = student.layer.weight.detach().double(), 0.9, []
    for _ in range(7):
        student.layer.weight.data = torch.randn(2, 3)
        weights.append(student.layer.weight.detach().double())
        teacher.update(named(student), momentum)
    expected = momentum**7 * start
    for i, weight in enumerate(weights, start=1):
        expected = expected + (1 - momentum) * momentum ** (7 - i) * weight
    torch.testing.assert_close(teacher.backbone.layer.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_momentum_zero_copies_the_student_and_one_keeps_the_teacher() -> None:
    student = Student()
    teacher = Teacher(student)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student.layer.weight.data += 1.0
    teacher.update(named(student), 1.0)
    assert torch.equal(teacher.backbone.layer.weight, before["backbone.layer.weight"])
    teacher.update(named(student), 0.0)
    assert torch.equal(teacher.backbone.layer.weight, student.layer.weight)


def test_momentum_close_to_one_moves_the_teacher_of_a_bf16_student() -> None:
    """Kept in bf16, 1e-4 of the way would round to nothing, every time."""
    student = Student(torch.bfloat16)
    teacher = Teacher(student)
    assert teacher.backbone.layer.weight.dtype == torch.float32
    start = teacher.backbone.layer.weight.clone()
    goal = student.layer.weight.detach().float() + 1.0
    student.layer.weight.data = goal.bfloat16()
    goal = student.layer.weight.detach().float()
    for _ in range(100):
        teacher.update(named(student), 0.9999)
    expected = goal + 0.9999**100 * (start - goal)
    torch.testing.assert_close(teacher.backbone.layer.weight, expected, rtol=0, atol=2e-5)
    assert (teacher.backbone.layer.weight - start).abs().min() > 5e-3
    assert teacher.backbone.layer.weight.dtype == torch.float32


def test_buffers_are_copied_not_averaged() -> None:
    student = Student()
    teacher = Teacher(student)
    student.seen += 5
    teacher.update(named(student), 0.999)
    assert teacher.backbone.seen == 5
    assert teacher.backbone.seen.dtype == torch.int64


def test_an_update_leaves_the_student_and_its_gradients_alone() -> None:
    student = Student()
    student.layer(torch.ones(1, 3)).sum().backward()
    weight, gradient = student.layer.weight.detach().clone(), student.layer.weight.grad.clone()
    teacher = Teacher(student)
    teacher.update(named(student), 0.5)
    assert torch.equal(student.layer.weight, weight)
    assert torch.equal(student.layer.weight.grad, gradient)
    assert all(parameter.grad is None for parameter in teacher.backbone.parameters())
    assert not teacher.backbone.layer.weight.requires_grad


def test_a_student_of_another_shape_or_with_other_names_is_an_error() -> None:
    teacher = Teacher(Student())
    with pytest.raises(ValueError, match=r"'backbone.layer.weight' is \(2, 1\), not \(2, 3\)"):
        teacher.update([("backbone.layer.weight", torch.ones(2, 1))], 0.5)  # would broadcast
    with pytest.raises(ValueError, match=r"gave no 'backbone\.layer\.weight'"):
        teacher.update([("unknown", torch.ones(1))], 0.5)


def test_a_student_that_leaves_out_a_parameter_is_an_error() -> None:
    student = Student()
    teacher = Teacher(student)
    with pytest.raises(ValueError, match=r"'backbone\.layer\.bias'"):
        teacher.update([entry for entry in named(student) if entry[0] != "backbone.layer.bias"], 0.5)


def test_the_state_survives_a_round_trip_bit_for_bit() -> None:
    first, second = Teacher(Student()), Teacher(Student())
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


class Head(nn.Sequential):
    """A layer and a batch norm, as projectors have."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_heads_follow_the_student_but_their_batch_norms_see_the_teachers_batch() -> None:
    """T-BY-2 and T-BY-4: nothing but the average moves parameters, at m = 0 it is the student."""
    torch.manual_seed(0)
    student, head = Student(), Head()
    teacher = Teacher(student, {"tasks.byol.projector": head})
    copied = teacher.heads["tasks.byol.projector"]
    rows = torch.randn(64, 3) * 5 + 2
    projected = teacher.project("tasks.byol.projector", rows)
    assert not projected.requires_grad
    assert projected.mean(dim=0).abs().max() < 1e-5  # normalised by these very rows
    assert copied[1].running_mean.any()  # its own statistics moved
    assert not head[1].running_mean.any()  # those of the student did not
    kept = copied[1].running_mean.clone()
    with torch.no_grad():
        head[0].weight += 1.0
    entries = [*named(student), *named(head, "tasks.byol.projector")]
    teacher.update(entries, 1.0)
    assert not torch.equal(copied[0].weight, head[0].weight)
    teacher.update(entries, 0.0)
    assert torch.equal(copied[0].weight, head[0].weight)
    assert torch.equal(copied[1].running_mean, kept)
    assert teacher.parts == ("backbone", "tasks.byol.projector")
    assert {"backbone.layer.weight", "tasks.byol.projector.1.running_mean"} <= teacher.state_dict().keys()


def test_the_state_of_another_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="another network"):
        Teacher(Student()).load_state_dict(Teacher(Student(), {"tasks.byol.projector": Head()}).state_dict())
