"""Two ranks with half the batch each against one with all of it: losses, gradients, statistics, metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fork_server
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from example_views import SETTINGS, SITE, example_views, ready, rows_of, suited, with_plan
from torch import Tensor, nn

from pretrain import cluster
from pretrain.losses import info_nce, nt_xent, sinkhorn
from pretrain.models.heads import synchronize_batch_norm
from pretrain.peers import ALONE, Peers
from pretrain.tasks import TASKS
from pretrain.tasks.contract import EncodedViews

WORLD = 2
NUM_IMAGES = 6
Results = dict[str, dict[str, Tensor]]
# a task, and behind a blank what is special about its settings
CASES: dict[str, dict[str, object]] = {
    **{name: SETTINGS.get(name, {}) for name in TASKS},
    "colorization by class": {"target": "ab_cls", "rebalance": True},
}


def whole_batch() -> EncodedViews:
    """Four grey rows of twelve: three of them on the first rank."""
    gray = torch.zeros(2 * NUM_IMAGES, dtype=torch.bool)
    gray[[0, 1, 5, 7]] = True
    return with_plan(example_views(NUM_IMAGES), gray=gray)


def rows_of_rank(rank: int) -> Tensor:
    """View-major rows of a rank's images."""
    return torch.arange(2 * NUM_IMAGES).reshape(2, WORLD, -1)[:, rank].flatten()


def measured(
    views: EncodedViews, act: Callable[[EncodedViews], dict[str, Tensor]], module: nn.Module
) -> dict[str, Tensor]:
    """The numbers `act` gives and the gradients of its loss."""
    tokens = views.tokens.clone().requires_grad_()
    numbers = act(replace(views, tokens=tokens))
    numbers["loss"].backward()
    if hasattr(module, "finish_step"):
        module.finish_step()
    numbers = {name: value.detach() for name, value in numbers.items()}
    assert tokens.grad is not None
    numbers["tokens"] = tokens.grad
    numbers |= {f"gradient of {name}": value.grad for name, value in module.named_parameters()}
    return numbers | {f"buffer {name}": value for name, value in module.named_buffers()}


def measure_all(views: EncodedViews, peers: Peers) -> Results:
    results: Results = {}
    half = views.num_images

    def nt_xent_alone(views: EncodedViews) -> dict[str, Tensor]:
        loss, accuracy = nt_xent(views.tokens[:, 0], 0.2, peers)
        return {"loss": loss, "accuracy": accuracy}

    def info_nce_alone(views: EncodedViews) -> dict[str, Tensor]:
        rows = nn.functional.normalize(views.tokens[:, 0], dim=1)
        loss, accuracy = info_nce(rows[:half], rows[half:], 0.2, peers)
        return {"loss": loss, "accuracy": accuracy}

    def sinkhorn_alone(views: EncodedViews) -> dict[str, Tensor]:
        assignments = sinkhorn(views.tokens[:, 0, :5].tanh(), 0.5, 3, peers)
        return {"loss": (assignments * views.tokens[:, 1, :5]).sum(dim=1).mean()}

    results["nt_xent"] = measured(views, nt_xent_alone, nn.Module())
    results["info_nce"] = measured(views, info_nce_alone, nn.Module())
    results["sinkhorn"] = measured(views, sinkhorn_alone, nn.Module())

    torch.manual_seed(0)
    norm = synchronize_batch_norm(nn.BatchNorm1d(SITE.embed_dim), peers, "cpu").double()
    nn.init.normal_(norm.weight)

    def batch_norm_alone(views: EncodedViews) -> dict[str, Tensor]:
        return {"loss": norm(views.tokens[:, 0]).pow(3).sigmoid().mean()}

    results["batch_norm"] = measured(views, batch_norm_alone, norm)

    for case, settings in CASES.items():
        name = case.partition(" ")[0]
        spec = TASKS[name]
        torch.manual_seed(0)
        task = spec.task(spec.config(**settings), SITE).double()
        task = ready(name, synchronize_batch_norm(task, peers, "cpu"))

        def run_task(views: EncodedViews, task: nn.Module = task, name: str = name) -> dict[str, Tensor]:
            output = task(suited(name, views), peers)
            return {"loss": output.loss, **output.metrics}

        results[case] = measured(views, run_task, task)
    return results


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    peers = cluster.peers(cluster.Cluster(rank, WORLD, rank, WORLD))
    torch.save(measure_all(rows_of(whole_batch(), rows_of_rank(rank)), peers), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank() -> Results:
    return measure_all(whole_batch(), ALONE)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("two_ranks")
    fork_server.context()
    mp.start_processes(run_rank, (folder,), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "sinkhorn", "batch_norm", *CASES])
def test_two_ranks_match_one_at_the_same_global_batch(
    name: str, one_rank: Results, two_ranks: list[Results]
) -> None:
    """T-A-1 and T-NT-6: means over ranks of losses, metrics and gradients equal those of the whole batch.
    T-MC-1 and T-DI-3: queues, pointers and the centre are the same on all ranks, and as with one."""
    whole, halves = one_rank[name], [rank[name] for rank in two_ranks]
    assert set(whole) == set(halves[0])
    for what, expected in whole.items():
        if what == "tokens":
            actual = torch.empty_like(expected)
            for rank, half in enumerate(halves):
                actual[rows_of_rank(rank)] = half[what] / WORLD
            assert expected.any()
        elif what.startswith("buffer"):
            actual = halves[0][what]
            torch.testing.assert_close(halves[1][what], actual)
        else:
            actual = torch.stack([half[what] for half in halves]).mean(dim=0)
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=1e-12, check_dtype=False, msg=lambda m, w=what: f"{w}: {m}"
        )
