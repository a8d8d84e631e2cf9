"""What each rank measures of itself: its time, its memory and what it reads. Costs a step next to nothing."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pretrain.metrics import names
from pretrain.metrics.exporter import Exporter
from pretrain.metrics.server import Health
from pretrain.read_counts import ReadCounts

PUBLISH_SECONDS = 1.0  # Prometheus asks less often than this, so what is in between need not be published


class RankMeter:
    """Every rank has one. Counters of a process begin at 0, as Prometheus expects."""

    def __init__(self, exporter: Exporter, health: Health, device: torch.device) -> None:
        self.exporter = exporter
        self.health = health
        self.device = device
        self._wait_seconds = 0.0
        self._counted: dict[tuple[str, ...], float] = defaultdict(float)
        self._published = -PUBLISH_SECONDS

    def record(
        self,
        step: int,
        seconds: float,
        wait_seconds: float,
        sections: Mapping[str, float],
        read: ReadCounts,
        process_ids: Sequence[int],
        calls: Mapping[str, float],
    ) -> None:
        """Take in a finished step, whose number is counted from 1.

        read: so far, of the data that are open. calls: encoder passes so far, by 'backbone' and 'teacher'.
        """
        self.health.progressed(step)
        publish = self.exporter
        publish.observe(names.STEP_SECONDS, seconds)
        for section, spent in sections.items():
            publish.observe(names.SECTION_SECONDS, spent, section)
        self._wait_seconds += wait_seconds
        now = time.monotonic()
        if now - self._published < PUBLISH_SECONDS:
            return
        self._published = now
        publish.set(names.LAST_STEP_TIME, time.time())
        self._count_up(names.DATA_WAIT, self._wait_seconds)
        self._count_up(names.BACKBONE_CALLS, calls.get("backbone", 0.0))
        self._count_up(names.TEACHER_CALLS, calls.get("teacher", 0.0))
        self._publish_reads(read)
        self._publish_memory(process_ids)

    def section(self, name: str, seconds: float, step: int) -> None:
        """A checkpoint or an evaluation between two steps has ended."""
        self.exporter.observe(names.SECTION_SECONDS, seconds, name)
        self.health.progressed(step)

    def publish_speed(self, work_seconds: float, speed_ratio: float) -> None:
        self.exporter.set(names.WORK_SECONDS, work_seconds)
        self.exporter.set(names.RANK_SPEED, speed_ratio)

    def _publish_reads(self, read: ReadCounts) -> None:
        self._count_up(names.STORAGE_RETRIES, read.num_retries)
        self._count_up(names.SHARDS_OPENED, read.num_shards_opened)
        self._count_up(names.CACHE_READS, read.num_cache_hits, "hit")
        self._count_up(names.CACHE_READS, read.num_cache_misses, "miss")
        for reason, number in read.bad_by_reason.items():
            self._count_up(names.SKIPPED_SAMPLES, number, reason)

    def _count_up(self, metric: names.Metric, so_far: float, *labels: str) -> None:
        """Raise a counter to what was counted elsewhere, which may begin at 0 again, as after going back."""
        key = (metric.name, *labels)
        before = self._counted[key]
        self.exporter.add(metric, so_far - before if so_far >= before else so_far, *labels)
        self._counted[key] = so_far

    def _publish_memory(self, process_ids: Sequence[int]) -> None:
        self.exporter.set(names.RESIDENT_MEMORY, resident_bytes(os.getpid()), "trainer")
        if process_ids:
            self.exporter.set(names.RESIDENT_MEMORY, sum(map(resident_bytes, process_ids)), "loader")
        if self.device.type == "cuda":
            stats = torch.cuda.memory_stats(self.device)
            for kind, name in (("allocated", "allocated"), ("reserved", "reserved")):
                now = stats.get(f"{name}_bytes.all.current", 0)
                self.exporter.set(names.DEVICE_MEMORY, now, kind)
            self.exporter.set(names.DEVICE_MEMORY, stats.get("allocated_bytes.all.peak", 0), "peak")
            total = torch.cuda.get_device_properties(self.device).total_memory
            self.exporter.set(names.DEVICE_MEMORY, total, "total")


def resident_bytes(process_id: int) -> int:
    """Memory of a process that is in RAM; 0 where the system does not say or it is gone."""
    try:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
