"""A prediction as text."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.plan.memory import RESERVE_BYTES, Memory
from pretrain.plan.predict import Prediction, fits
from pretrain.plan.timing import JITTER_RATIO

GIB = 2**30
SHORT_SECONDS = 0.03


def told(found: Prediction) -> str:
    """All of it, by subject."""
    parts = [_head(found), _parameters(found), _memory(found), _flops(found), _step(found)]
    parts += [_feeding(found), _length(found), _saving(found), _scaling(found)]
    if _is_measured(found):
        parts.insert(1, _basis(found))
    return "\n\n".join(parts)


def _head(found: Prediction) -> str:
    of = found.layout
    return (
        f"PREDICTION, {_standing(found)}: {found.model} on {of.nodes} x {of.gpus_per_node} {found.gpu}"
        f"\n{_count(of.nodes, 'node')}, {_count(of.ranks, 'rank')}; global batch {of.global_batch} = micro "
        f"{of.micro_batch} x accumulation {of.accumulation_steps} x ranks {of.ranks}; ZeRO-{of.stage}, "
        f"{of.precision}, recompute {_yes(of.recompute)}"
    )


def _is_measured(found: Prediction) -> bool:
    return any(figure.is_measured for figure in found.basis)


def _standing(found: Prediction) -> str:
    return "from numbers of which some were measured" if _is_measured(found) else "nothing here was measured"


def _basis(found: Prediction) -> str:
    rows = [
        [figure.name, figure.value, f"{'measured' if figure.is_measured else 'ASSUMED'}: {figure.source}"]
        for figure in found.basis
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {source}" for name, value, source in rows]
    return "rests on\n" + "\n".join(lines)


def _parameters(found: Prediction) -> str:
    of = found.parameters
    heads = ", ".join(f"{name} {_elements(count)}" for name, count in of.heads.items() if count)
    return (
        f"parameters: student {_elements(of.student)} = backbone {_elements(of.backbone)} + heads "
        f"{_elements(sum(of.heads.values()))} + others {_elements(of.others)}; trained "
        f"{_elements(of.trained)}; teacher {_elements(of.teacher)}\n  heads: {heads}"
    )


def _memory(found: Prediction) -> str:
    stages = zip(found.memory, found.memory_other, strict=True)
    recompute = found.layout.recompute
    rows = []
    for plain, other in stages:
        without, with_ = (other, plain) if recompute else (plain, other)
        for is_recomputed, of in ((False, without), (True, with_)):
            mark = "*" if of.stage == found.layout.stage and is_recomputed == recompute else ""
            columns = (
                of.weights, of.gradients, of.optimizer, of.teacher, of.buffers, of.inputs, of.activations,
                of.working, of.peak,
            )  # fmt: skip
            fit = _yes(fits(of, found.gpu_memory_bytes))
            rows.append([f"{of.stage}{mark}", _yes(is_recomputed), *map(_gib, columns), fit])
    header = [
        "ZeRO", "recompute", "weights", "gradients", "optimizer", "teacher", "buffers", "inputs",
        "activations", "working", "peak", "fits",
    ]  # fmt: skip
    return "\n".join(
        [
            f"memory of a rank in GiB (* the config; of the {_gib(found.gpu_memory_bytes)} of the GPU "
            f"{_gib(RESERVE_BYTES)} are left to CUDA, NCCL and gaps; {_memory_standing(found)})",
            _aligned(header, rows),
            "the peak is below the sum of its row: gradients come while activations go"
            + (
                f"; attention is the fused kind, without it {_gib(found.unfused_attention_bytes)} GiB more "
                "activations are kept"
                if found.unfused_attention_bytes
                else ""
            ),
            f"use: {_advice(found)}",
            *(f"  {line}" for line in found.advice.more),
        ]
    )


def _memory_standing(found: Prediction) -> str:
    error = found.memory_error_ratio
    return "unmeasured on a GPU" if error is None else f"peaks within {100 * error:.0f} % on a GPU"


def _advice(found: Prediction) -> str:
    advice, of = found.advice, found.layout
    if advice.stage is None:
        return advice.why
    changes = []
    if advice.stage != of.stage:
        changes.append(f"engine.deepspeed.zero_optimization.stage={advice.stage}")
    if advice.recompute != of.recompute:
        changes.append("engine.recompute=true")
    if advice.accumulation_steps != of.accumulation_steps:
        changes.append(f"batch.accumulation_steps={advice.accumulation_steps}")
    if changes:
        return f"{' '.join(changes)} ({advice.why})"
    spare = found.gpu_memory_bytes - RESERVE_BYTES - _as_set(found).peak
    return f"{advice.why}, with {_gib(spare)} GiB to spare"


def _as_set(found: Prediction) -> Memory:
    return found.memory[found.layout.stage]


def _flops(found: Prediction) -> str:
    of = found.flops
    rows = [
        [name, f"{flops / 1e9:.2f}", f"{100 * flops / of.train:.1f} %"]
        for name, flops in sorted(of.by_part.items(), key=lambda item: -item[1])
    ]
    counted = " (backbone counted on the module)" if found.is_counted else ""
    return (
        f"model GFLOP an image: {of.train / 1e9:.1f} in training = student forward "
        f"{of.student_forward / 1e9:.1f}, backward "
        f"{(of.train - of.student_forward - of.teacher_forward) / 1e9:.1f}, teacher forward "
        f"{of.teacher_forward / 1e9:.1f}{counted}\n" + _aligned(["part", "GFLOP", "share"], rows)
    )


def _step(found: Prediction) -> str:
    step, talk = found.step, found.communication
    moved = f"{_gb(talk.reduced_bytes)} of gradients summed"
    if talk.gathered_bytes:
        moved += f", {_gb(talk.gathered_bytes)} of weights collected"
    lines = [
        f"a step: {_ms(step.total)} = compute {_ms(step.compute)} at {100 * found.utilisation:.0f} % of "
        f"{found.peak} + waiting for the slowest rank {_ms(step.jitter)} (jitter "
        f"{100 * JITTER_RATIO:.0f} %) + exposed communication {_ms(step.exposed)} + optimizer "
        f"{_ms(step.optimizer)}"
    ]
    if found.layout.ranks > 1:
        lines.append(
            f"  communication {_ms(step.communication)}: {moved}, at {talk.rate / 1e9:.0f} GB/s "
            f"({found.network if found.layout.nodes > 1 else 'inside the node'}); "
            + (
                "sums hide under the backward pass"
                if talk.overlaps
                else "nothing overlaps: overlap_comm is off"
            )
        )
    lines.append(f"  {found.images_per_second:,.0f} images/s")
    if found.layout.precision == "fp32":
        lines.append(
            "  engine.precision=fp32: products take many times as long as in bf16, which this assumes; "
            "set bf16, or give --mfu as measured"
        )
    if step.total < SHORT_SECONDS and not _has_measured_utilisation(found):
        lines.append(
            "  so short a step waits for kernels to be launched, which is not in this: a lower bound"
        )
    return "\n".join(lines)


def _feeding(found: Prediction) -> str:
    of = found.feeding
    return (
        f"decoding: {of.per_gpu:,.0f} images/s a GPU, {of.per_node:,.0f} a node; {of.cores_per_gpu:.1f} CPU "
        f"cores a GPU at {of.images_per_core_second:g} images/s a core (`pretrain shards bench DIR` measures "
        f"yours; --images-per-core-second), and data.decode_threads={of.decode_threads}"
    )


def _length(found: Prediction) -> str:
    of = found.length
    images = f" over {of.num_images:,} images" if of.num_images else ""
    return (
        f"the run: {of.num_steps:,} steps{images}, {_duration(of.seconds)}, {of.gpu_hours:,.0f} GPU-hours "
        "(training alone: without saving, failures and evaluation)"
    )


def _saving(found: Prediction) -> str:
    of = found.saving
    minutes = of.best_every_steps * found.step.total / 60
    return (
        f"checkpoints: {_gb(of.checkpoint_bytes)} each, {of.write_seconds:.1f} s to write, a pause of "
        f"{of.pause_seconds:.2f} s; a node fails every {of.mean_hours_to_failure:,.0f} hours\n"
        f"  Young-Daly: save every {of.best_every_steps:,} steps ({minutes:.1f} minutes), which costs "
        f"{100 * of.lost_ratio:.2f} % of the time; checkpoint.every_steps={of.every_steps:,} costs "
        f"{100 * of.lost_ratio_as_set:.2f} %"
    )


def _scaling(found: Prediction) -> str:
    rows = [
        [
            str(row.ranks),
            str(row.nodes),
            f"{row.weak_images_per_second:,.0f}",
            f"{100 * row.weak_efficiency:.1f} %",
            "-" if row.strong_micro_batch is None else str(row.strong_micro_batch),
            "-" if row.strong_images_per_second is None else f"{row.strong_images_per_second:,.0f}",
            "-" if row.strong_efficiency is None else f"{100 * row.strong_efficiency:.1f} %",
        ]
        for row in found.scaling
    ]
    header = ["GPUs", "nodes", "weak images/s", "efficiency", "strong micro", "images/s", "efficiency"]
    return (
        f"scaling: weak with {found.layout.micro_batch} images a GPU, strong with the global batch "
        f"{found.layout.global_batch} (- where batch or data.lanes cannot be shared equally); "
        f"{_of_small_batches(found)}\n" + _aligned(header, rows)
    )


def _has_measured_utilisation(found: Prediction) -> bool:
    """Of whole steps: launches and the optimizer are in it."""
    return any(figure.name == "utilisation" and figure.is_measured for figure in found.basis)


def _of_small_batches(found: Prediction) -> str:
    if _has_measured_utilisation(found):
        return "the utilisation follows the micro batch as measured, and is constant beyond what was"
    return "the utilisation is taken as the same for small micro batches, which flatters the last strong rows"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _elements(count: float) -> str:
    if count >= 1e5:
        return f"{count / 1e6:.2f} M"
    return f"{count / 1e3:.1f} k" if count else "0"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}" if num_bytes < 100 * GIB else f"{num_bytes / GIB:.1f}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 2 else f"{seconds / 60:.1f} minutes"
