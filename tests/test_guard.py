from __future__ import annotations

import itertools
import json
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from pretrain.errors import CheckpointError
from pretrain.guard import (
    PIECE_STREAM,
    PIECE_WORDS,
    WORD_STREAM,
    Collapse,
    CollapseConfig,
    GuardConfig,
    LossSpikeConfig,
    LossSpikes,
    NonfiniteRun,
    StragglerConfig,
    StragglerNews,
    Stragglers,
    checksum,
    deviants,
)
from pretrain.losses import embedding_std
from pretrain.randomness import bits

SMALL = LossSpikeConfig(window=8, min_steps=4, threshold=10.0)


def noisy(num: int, level: float = 5.0, noise: float = 0.1, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, noise) for _ in range(num)]


def flagged(spikes: LossSpikes, losses: list[float]) -> list[int]:
    return [place for place, loss in enumerate(losses) if spikes.saw(loss) is not None]


def test_the_defaults_are_those_that_are_documented() -> None:
    config = GuardConfig()
    assert (config.max_nonfinite_steps, config.max_rollbacks, config.max_idle_attempts) == (10, 2, 3)
    assert (config.loss_spike.window, config.loss_spike.min_steps, config.loss_spike.threshold) == (
        64,
        32,
        12.0,
    )
    assert (config.loss_spike.action, config.collapse.action) == ("log", "log")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss_spike": {"window": 10, "min_steps": 11}}, "never fit in a window of 10"),
        ({"loss_spike": {"action": "panic"}}, "rollback"),
        ({"collapse": {"action": "rollback"}}, "stop"),
        ({"straggler": {"below": 1.0}}, "less than 1"),
        ({"max_rollbacks": -1}, "greater than or equal to 0"),
        ({"spike": 1}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        GuardConfig.model_validate(settings)


# --- loss spikes


def test_the_score_is_the_distance_from_the_median_in_scaled_mads() -> None:
    """Row 20. Median 3, MAD 1: (100 - 3) / 1.4826."""
    spikes = LossSpikes(LossSpikeConfig(window=5, min_steps=5, threshold=10.0))
    assert flagged(spikes, [1.0, 2.0, 3.0, 4.0, 5.0]) == []
    assert spikes.saw(100.0) == pytest.approx(97 / 1.4826)


def test_a_loss_a_hundred_times_as_large_is_a_spike_and_its_neighbours_are_not() -> None:
    """Row 20: the loss of one step is scaled by 100."""
    losses = noisy(300)
    losses[200] *= 100
    assert flagged(LossSpikes(LossSpikeConfig()), losses) == [200]


@pytest.mark.parametrize("seed", range(5))
def test_the_noise_of_a_falling_loss_is_no_spike(seed: int) -> None:
    draw = random.Random(seed)
    losses = [8 * 0.999**step * draw.lognormvariate(0, 0.05) for step in range(3000)]
    assert flagged(LossSpikes(LossSpikeConfig()), losses) == []


def test_a_loss_that_falls_steeply_is_no_spike() -> None:
    assert flagged(LossSpikes(LossSpikeConfig()), [*noisy(64), *noisy(64, level=0.1)]) == []


@pytest.mark.parametrize("level", [7.0, -7.0, 0.0])
def test_the_last_bits_of_a_flat_loss_are_no_spikes(level: float) -> None:
    losses = [level + 1e-7 * (step % 2) for step in range(200)]
    losses[150] += 1e-6
    assert flagged(LossSpikes(LossSpikeConfig()), losses) == []
    losses[150] += 2.0
    assert flagged(LossSpikes(LossSpikeConfig()), losses) == [150]


def test_a_spike_does_not_make_the_next_one_less_of_one() -> None:
    spikes = LossSpikes(SMALL)
    flagged(spikes, [1.0, 1.1, 0.9, 1.0, 1.1])
    assert spikes.saw(50.0) == spikes.saw(50.0)


def test_nothing_is_judged_before_enough_was_seen() -> None:
    spikes = LossSpikes(SMALL)
    assert flagged(spikes, [1.0, 1.0, 1.0, 100.0, 1.0]) == []
    assert spikes.saw(1000.0) is not None


def test_a_new_level_is_flagged_for_one_window_and_then_is_normal() -> None:
    losses = [*noisy(100), *noisy(300, level=50.0)]
    found = flagged(LossSpikes(SMALL), losses)
    assert found == list(range(100, 108))
    # and from the new level on, a spike is one again
    losses[300] = 500.0
    assert flagged(LossSpikes(SMALL), losses) == [*range(100, 108), 300]


def test_a_level_that_most_losses_have_does_not_stay_flagged() -> None:
    """Two of three losses are on a new level: they are never `window` in a row."""
    losses = [*noisy(100), *(50.0 if step % 3 else 5.0 for step in range(300))]
    found = flagged(LossSpikes(SMALL), losses)
    assert found
    assert max(found) < 130


def test_rare_spikes_never_become_normal() -> None:
    """Three in a row every 50 steps, which together are far more than a window."""
    places = [first + further for first in range(100, 2000, 50) for further in range(3)]
    losses = noisy(2000)
    for place in places:
        losses[place] = 50.0
    assert flagged(LossSpikes(SMALL), losses) == places


def test_what_is_not_finite_is_left_to_others() -> None:
    spikes = LossSpikes(SMALL)
    flagged(spikes, noisy(20))
    before = spikes.state()
    assert [spikes.saw(float(text)) for text in ("nan", "inf", "-inf")] == [None] * 3
    assert spikes.state() == before


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(0, 60))
def test_a_resumed_run_flags_what_an_uninterrupted_one_does(losses: list[float], cut: int) -> None:
    whole = LossSpikes(SMALL)
    scores = [whole.saw(loss) for loss in losses]
    first, second = LossSpikes(SMALL), LossSpikes(SMALL)
    resumed = [first.saw(loss) for loss in losses[:cut]]
    second.load(json.loads(json.dumps(first.state())))
    resumed += [second.saw(loss) for loss in losses[cut:]]
    assert resumed == scores
    assert second.state() == whole.state()


def test_a_resumed_run_may_have_another_window() -> None:
    long, short = LossSpikes(LossSpikeConfig(window=20, min_steps=4)), LossSpikes(SMALL)
    flagged(long, [*noisy(40), *[90.0] * 12])
    short.load(long.state())
    assert short.state() == [8.0, *noisy(40)[-8:], *[90.0] * 7]
    assert short.saw(90.0) is not None  # the eighth
    assert short.saw(90.0) is None


@pytest.mark.parametrize("state", [[], [2.0, 1.0], [-1.0, 1.0], [1.0, float("nan")]])
def test_a_malformed_state_is_refused(state: list[float]) -> None:
    with pytest.raises(CheckpointError, match="loss spikes is malformed"):
        LossSpikes(SMALL).load(state)
    for other in (Collapse(CollapseConfig()), NonfiniteRun(GuardConfig())):
        with pytest.raises(CheckpointError, match="malformed"):
            other.load([*state, float("inf")])


# --- collapse

PATIENT = CollapseConfig(min_feature_std=0.02, patience_steps=3)


def test_a_collapse_is_told_once_and_again_after_it_has_ended() -> None:
    """Row 22."""
    collapse = Collapse(PATIENT)
    stds = [0.05, 0.01, 0.01, 0.02, 0.01, 0.01, 0.0, 0.0, 0.0, 0.05, 0.01, 0.01, 0.01]
    told = [step for step, std in enumerate(stds) if collapse.saw(std)]
    assert told == [6, 12]
    assert collapse.has_collapsed
    assert not collapse.saw(0.05)
    assert not collapse.has_collapsed


def test_a_constant_encoder_has_collapsed_and_a_random_one_has_not() -> None:
    """Row 22."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 48, generator=generator)
    encoder = nn.Linear(48, 32)
    with torch.no_grad():
        encoder.weight.normal_(generator=generator)
    healthy, constant = Collapse(PATIENT), Collapse(PATIENT)
    healthy_told = [healthy.saw(float(embedding_std(encoder(images)))) for _ in range(4)]
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.bias.fill_(1.0)
    constant_told = [constant.saw(float(embedding_std(encoder(images)))) for _ in range(4)]
    assert healthy_told == [False] * 4
    assert constant_told == [False, False, True, False]


def test_a_step_without_a_number_neither_lengthens_nor_ends_a_collapse() -> None:
    collapse = Collapse(PATIENT)
    assert [collapse.saw(std) for std in (0.0, 0.0, float("nan"), 0.0)] == [False, False, False, True]


def test_a_collapse_that_was_told_is_not_told_again_after_a_resume() -> None:
    before, after = Collapse(PATIENT), Collapse(PATIENT)
    assert [before.saw(0.0) for _ in range(3)] == [False, False, True]
    after.load(json.loads(json.dumps(before.state())))
    assert after.has_collapsed
    assert not after.saw(0.0)


# --- steps that are not finite

STRICT = GuardConfig(max_nonfinite_steps=3, max_rollbacks=2)


def test_one_step_that_is_not_finite_is_let_pass() -> None:
    """Row 18."""
    run = NonfiniteRun(STRICT)
    assert [run.saw(step, step in (3, 4, 6, 9), 0) for step in range(12)] == ["go on"] * 12
    assert run.num_steps == 0
    assert run.first_step is None


def test_so_many_in_a_row_roll_back_and_after_so_many_rollbacks_the_run_stops() -> None:
    """Row 19. The caller makes a new one, or loads the state of the checkpoint, when it has gone back."""
    verdicts = []
    for num_rollbacks in range(3):
        run = NonfiniteRun(STRICT)
        verdicts.append([run.saw(step, step >= 7, num_rollbacks) for step in range(5, 10)])
        assert run.first_step == 7
    assert verdicts == [
        ["go on"] * 4 + ["rollback"],
        ["go on"] * 4 + ["rollback"],
        ["go on"] * 4 + ["stop"],
    ]


def test_without_rollbacks_the_run_stops_at_once() -> None:
    """Row 19."""
    run = NonfiniteRun(GuardConfig(max_nonfinite_steps=1, max_rollbacks=0))
    assert run.saw(0, True, 0) == "stop"


def test_the_count_goes_on_after_a_resume() -> None:
    before, after = NonfiniteRun(STRICT), NonfiniteRun(STRICT)
    assert [before.saw(step, True, 0) for step in (0, 1)] == ["go on", "go on"]
    after.load(json.loads(json.dumps(before.state())))
    assert after.first_step == 0
    assert after.saw(2, True, 0) == "rollback"
    after.load(NonfiniteRun(STRICT).state())
    assert after.first_step is None


# --- stragglers

SHORT = StragglerConfig(below=0.6, window=4)


def told(stragglers: Stragglers, steps: list[list[float]]) -> list[tuple[int, StragglerNews]]:
    seen = [(place, stragglers.saw(seconds)) for place, seconds in enumerate(steps)]
    return [(place, news) for place, news in seen if news != StragglerNews()]


def test_a_rank_that_takes_twice_as_long_is_named_once_and_when_it_recovers() -> None:
    """Row 16: rank 1 takes twice as long for 12 steps.

    The median over 4 steps is below the limit from the third slow one on (half way between 1 and 2 seconds,
    the score is 0.67), and must be for 4 steps; so also for the recovery.
    """
    stragglers = Stragglers(3, SHORT)
    steps = [[1.0, 1.0, 1.0]] * 6 + [[1.0, 2.0, 1.0]] * 12 + [[1.0, 1.0, 1.0]] * 12
    assert told(stragglers, steps) == [
        (6 + 2 + 3, StragglerNews(slow=(1,))),
        (18 + 1 + 3, StragglerNews(recovered=(1,))),
    ]
    assert stragglers.slow() == []


def test_a_recovery_takes_as_long_to_be_told_when_it_begins_at_once() -> None:
    """Row 16: slow for just long enough to be named at step 11, and above the limit from step 12 on."""
    steps = [[1.0, 1.0, 1.0]] * 6 + [[1.0, 2.0, 1.0]] * 5 + [[1.0, 1.0, 1.0]] * 12
    assert told(Stragglers(3, SHORT), steps) == [
        (11, StragglerNews(slow=(1,))),
        (12 + 3, StragglerNews(recovered=(1,))),
    ]


def test_the_score_of_a_rank_that_takes_twice_as_long_is_a_half() -> None:
    """Row 16."""
    stragglers = Stragglers(2, SHORT)
    for _ in range(8):
        stragglers.saw([1.0, 2.0])
    assert stragglers.scores() == [2.0, 0.5]
    assert stragglers.slow() == [1]


def test_one_long_step_does_not_make_a_straggler() -> None:
    """A mean over the window would be 100 times that of the others."""
    stragglers = Stragglers(2, SHORT)
    steps = [[1.0, 1.0 if step % 4 else 400.0] for step in range(40)]
    assert told(stragglers, steps) == []
    assert stragglers.scores() == [1.0, 1.0]


def test_ranks_that_are_slow_together_are_no_stragglers() -> None:
    stragglers = Stragglers(3, SHORT)
    assert told(stragglers, [[float(1 + step)] * 3 for step in range(30)]) == []


def test_a_rank_alone_is_never_a_straggler() -> None:
    stragglers = Stragglers(1, SHORT)
    assert told(stragglers, [[10.0**step] for step in range(20)]) == []
    assert (stragglers.scores(), stragglers.slow()) == ([1.0], [])


def test_before_the_first_step_all_ranks_are_equal() -> None:
    assert Stragglers(3, SHORT).scores() == [1.0] * 3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda ranks: st.lists(
            st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]), min_size=ranks, max_size=ranks),
            min_size=1,
            max_size=9,
        )
    )
)
def test_scores_agree_with_medians_taken_one_by_one(steps: list[list[float]]) -> None:
    stragglers = Stragglers(len(steps[0]), SHORT)
    for seconds in steps:
        stragglers.saw(seconds)
    own = [statistics.median(of_rank) for of_rank in zip(*steps[-SHORT.window :], strict=True)]
    expected = [statistics.median(own[:rank] + own[rank + 1 :]) / own[rank] for rank in range(len(own))]
    assert stragglers.scores() == pytest.approx(expected)


# --- checksums


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "matrix": torch.randn(3, 2, generator=generator),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "double": torch.randn(2, generator=generator).double(),
        "count": torch.tensor(12),
        "flags": torch.tensor([True, False, True]),
        "none": torch.empty(0),
        "long": torch.randn(PIECE_WORDS + 3, generator=generator),
    }


def test_the_checksum_is_a_weighted_sum_worked_in_python() -> None:
    """The words, the wrap-around and the dropped bit agree with unbounded integers."""
    word_factors, piece_factors = bits(0, 0, 0, WORD_STREAM, 5) | 1, bits(0, 0, 0, PIECE_STREAM, 2) | 1
    words = [[-5, 2**31 - 1, 0, 7, -(2**31)], [3]]
    sums = [sum(w * f for w, f in zip(of, word_factors.tolist(), strict=False)) for of in words]
    total = sum(s * f for s, f in zip(sums, piece_factors.tolist(), strict=True))
    tensors = [(name, torch.tensor(of, dtype=torch.int32)) for name, of in zip("ab", words, strict=True)]
    assert checksum(tensors) == total % 2**64 // 2


def test_equal_tensors_have_equal_checksums_in_whatever_order_and_layout() -> None:
    tensors = some_tensors()
    expected = checksum(tensors.items())
    assert 0 <= expected < 1 << 63
    assert checksum(reversed(some_tensors().items())) == expected
    tensors["matrix"] = tensors["matrix"].t().contiguous().t()
    assert not tensors["matrix"].is_contiguous()
    assert checksum(tensors.items()) == expected
    assert checksum([]) == 0


def test_each_single_flipped_bit_changes_the_checksum() -> None:
    """Row 50: every bit of every kind of element, and some of a tensor of more than one piece."""
    tensors = some_tensors()
    long = tensors.pop("long")
    seen = [checksum(tensors.items())]
    for tensor in tensors.values():
        raw = tensor.reshape(-1).view(torch.uint8)
        for place, bit in itertools.product(range(len(raw)), range(8)):
            raw[place] ^= 1 << bit
            seen.append(checksum(tensors.items()))
            raw[place] ^= 1 << bit
    raw = long.view(torch.uint8)
    seen_long = [checksum([("long", long)])]
    for place, bit in itertools.product((0, 3, 4 * PIECE_WORDS - 1, 4 * PIECE_WORDS, len(raw) - 1), (0, 7)):
        raw[place] ^= 1 << bit
        seen_long.append(checksum([("long", long)]))
        raw[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * (3 * 2 * 4 + 3 * 2 + 2 * 8 + 8 + 3)
    assert len(set(seen)) == len(seen)
    assert len(set(seen_long)) == len(seen_long)


def test_elements_that_change_places_change_the_checksum() -> None:
    """Row 50; also a number and its negative, which differ in the highest bit alone."""
    values = torch.tensor([1.0, -1.0, 2.0, 0.5, 1.5, -0.0, 0.0, 3.0])
    seen = {checksum([("a", values)])}
    for i, j in itertools.combinations(range(len(values)), 2):
        swapped = values.clone()
        swapped[[i, j]] = swapped[[j, i]]
        seen.add(checksum([("a", swapped)]))
    assert len(seen) == 1 + 8 * 7 // 2


def test_signs_that_change_together_change_the_checksum() -> None:
    """Row 50: highest bits have the fewest bits of the factors to tell them apart."""
    values = {name: torch.ones(4) for name in "abc"}
    words = [(name, place) for name in values for place in range(4)]
    seen = {checksum(values.items())}
    chosen = [*itertools.combinations(words, 2), *itertools.islice(itertools.combinations(words, 4), 300)]
    for places in chosen:
        changed = {name: value.clone() for name, value in values.items()}
        for name, place in places:
            changed[name][place] *= -1
        seen.add(checksum(changed.items()))
    assert len(seen) == 1 + len(chosen)


def test_tensors_and_pieces_that_change_places_change_the_checksum() -> None:
    """Row 50."""
    one, other = torch.randn(3, generator=torch.Generator().manual_seed(0)), torch.ones(3)
    assert checksum([("a", one), ("b", other)]) != checksum([("a", other), ("b", one)])
    long = torch.zeros(2 * PIECE_WORDS)
    first = long.index_fill(0, torch.tensor([5]), 1.0)
    second = long.index_fill(0, torch.tensor([PIECE_WORDS + 5]), 1.0)
    assert checksum([("a", first)]) != checksum([("a", second)])


def test_the_rank_whose_weights_have_drifted_is_named() -> None:
    """Row 50: the last bit of one weight of rank 1."""
    ranks = [nn.Linear(8, 4) for _ in range(3)]
    for rank in ranks[1:]:
        rank.load_state_dict(ranks[0].state_dict())
    assert deviants([checksum(rank.state_dict().items()) for rank in ranks]) == []
    ranks[1].weight.data.view(torch.int32)[2, 3] ^= 1
    assert deviants([checksum(rank.state_dict().items()) for rank in ranks]) == [1]


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([5], []),
        ([5, 5], []),
        ([5, 6], [0, 1]),
        ([5, 6, 5], [1]),
        ([5, 5, 6, 6], [0, 1, 2, 3]),
        ([5, 6, 7, 5], [0, 1, 2, 3]),
        ([6, 5, 5, 7, 5], [0, 3]),
    ],
)
def test_ranks_deviate_from_more_than_half_or_all_do(sums: list[int], expected: list[int]) -> None:
    """Row 50: of two ranks that differ, nobody can tell which is right."""
    assert deviants(sums) == expected
