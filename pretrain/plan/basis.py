"""Which numbers of a prediction were measured and which are assumed."""

from __future__ import annotations

from pretrain.plan.measured import CEILINGS, LINKS, MEMORY, Figure, Results
from pretrain.plan.network import HIDDEN_RATIO, LATENCY_SECONDS, bus_rate
from pretrain.plan.recipe import Settings
from pretrain.plan.timing import JITTER_RATIO, Machine


def basis_of(
    settings: Settings,
    machine: Machine,
    results: Results | None,
    *,
    nodes: int,
    micro_batch: int,
    host_bytes_per_second: float,
) -> tuple[Figure, ...]:
    """results: None where nothing was measured."""
    gpu, network = machine.gpu, machine.network
    links = results.slices.get(LINKS, {}) if results else {}
    nccl = f"links.json: {links.get('source', 'no source given')}"
    figures = [_utilisation(settings, machine, results, micro_batch)]
    if not machine.measured:
        has = results is not None and results.rate("copy, device to device") is not None
        figures.append(
            Figure(
                "memory of the GPU",
                _rate(gpu.memory_bytes_per_second),
                has,
                f"{CEILINGS}.json, a copy on the device, read and written" if has else "datasheet",
            )
        )
    if machine.gpus_per_node > 1:
        has = bool(gpu.bus_bytes_per_second)
        inside = bus_rate(gpu, network, 1, machine.gpus_per_node)
        figures.append(
            Figure("ring inside a node", _rate(inside), has, nccl if has else "links of the datasheet")
        )
    has = "between_nodes_bytes_per_second" in links
    between_nodes = network.node_rate(machine.gpus_per_node)
    figures.append(
        Figure("ring between nodes", _rate(between_nodes), has, nccl if has else f"90 % of {network.name}")
    )
    figures.append(
        Figure("latency of a collective", f"{1e6 * LATENCY_SECONDS:.0f} µs", False, "usual of NCCL")
    )
    figures.append(
        Figure(
            "spread of a rank's step time",
            f"{100 * JITTER_RATIO:.0f} %",
            False,
            "1 to 2 % explain what NeMo keeps on 128 GPUs",
        )
    )
    figures.append(
        Figure("hidden under backward", f"{100 * HIDDEN_RATIO:.0f} %", False, "where overlap_comm is on")
    )
    has = results is not None and results.rate("copy, device to pinned host") is not None
    figures.append(
        Figure(
            "copy to the host",
            _rate(host_bytes_per_second),
            has,
            f"{CEILINGS}.json" if has else "a round number",
        )
    )
    error = results.memory_error_ratio if results else None
    figures.append(
        Figure(
            "memory",
            "as computed" if error is None else f"within {100 * error:.0f} %",
            error is not None,
            "not checked on a GPU" if error is None else f"{MEMORY}.json, computed beside measured peaks",
        )
    )
    return tuple(figures)


def _utilisation(settings: Settings, machine: Machine, results: Results | None, micro_batch: int) -> Figure:
    value = f"{100 * machine.utilisation_at(micro_batch):.1f} %"
    if not machine.measured or results is None:
        return Figure("utilisation", value, False, "by the model's width, or --mfu")
    batches = ", ".join(str(batch) for batch, _ in machine.measured)
    _, file = results.utilisation_curve(settings)
    where = f"{file}, whole steps of {batches} images, views and optimizer in it"
    smallest, largest = machine.measured[0][0], machine.measured[-1][0]
    if not smallest <= micro_batch <= largest:
        where += f"; that of {smallest if micro_batch < smallest else largest} for {micro_batch}"
    return Figure("utilisation", value, True, where)


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:,.0f} GB/s"
