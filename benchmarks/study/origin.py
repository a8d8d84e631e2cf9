"""Where results come from: what was measured, how its runs were made, on what, and what they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.records import Results
from study.words import at, duration, markdown, plain

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results/study"
BUDGETS = {
    "images": "equal images: every variant saw the same images in the same order",
    "compute": "equal compute: steps x seconds per step are the same for every variant",
    "flops": "equal compute: every variant trains for the same FLOPs, counted from its config",
    "as_given": "lengths as the study gives them, not made equal",
}


class Origin:
    """What the template can say of that, by the name of a study."""

    results: Mapping[str, Results]

    def measured(self, study: str, *variants: str) -> bool:
        """Whether there is any record of the study, and one of each of these variants."""
        return study in self.results and all(name in self.results[study].runs for name in variants)

    def not_measured(self, study: str) -> str:
        """One sentence with the command that would change it."""
        config = f"configs/studies/{study}.yaml"
        if not (ROOT / config).exists():
            return f"Not measured yet: `{study}`, whose study is not written."
        return f"Not measured yet: `pretrain sweep {config} --results {RESULTS}`"

    def pending(self, studies: Sequence[str]) -> str:
        """Which of these are not measured, in short; the commands stand at the end of the page."""
        names = [f"`{name}`" for name in studies]
        return f"Not measured yet: {', '.join(names)} ([commands](#commands-and-cost))." if names else ""

    def seeds(self, study: str) -> str:
        found = sorted({record["seed"] for record in self.results[study].records})
        return ", ".join(map(str, found))

    def num_seeds(self, study: str, *variants: str) -> int:
        """The least of any of these variants, or of all."""
        runs = self.results[study].runs
        return min(len(runs.get(name, {})) for name in variants or runs)

    def hardware(self, study: str) -> str:
        return "; ".join(sorted({record["hardware"] for record in self.results[study].records}))

    def commit(self, study: str) -> str:
        """Short, every one that a run was made with; told where the code was not all in its commit."""
        found = {
            (str(record["commit"] or "unknown")[:12], bool(record.get("uncommitted")))
            for record in self.results[study].records
        }
        return ", ".join(f"`{sha}`" + (" with changes" if changed else "") for sha, changed in sorted(found))

    def commands(self, study: str) -> list[str]:
        """As they were typed, with the threads that a process on a CPU had."""
        found = set()
        for record in self.results[study].records:
            is_cpu = "CPU" in record["hardware"] and record.get("threads")
            threads = f"OMP_NUM_THREADS={record['threads']} " if is_cpu else ""
            found.add(f"{threads}{record['command']} --results {RESULTS}")
        return sorted(found)

    def setting(self, study: str, path: str) -> str:
        """A setting of the runs, with what differs between variants: `600 (contrastive: 900)`."""
        by_variant: dict[str, list[str]] = {}
        for variant, by_seed in self.results[study].runs.items():
            texts = {plain(at(record["config"], path)) for record in by_seed.values()}
            for text in texts:
                by_variant.setdefault(text, []).append(variant)
        usual = max(by_variant, key=lambda text: len(by_variant[text]))
        others = [f"{', '.join(names)}: {text}" for text, names in by_variant.items() if text != usual]
        return usual + (f" ({'; '.join(others)})" if others else "")

    def setup(self, study: str) -> str:
        """Markdown table of how its runs were made."""
        results = self.results[study]
        first = results.records[0]
        model = first["config"]["model"]
        side = model["img_px"] // model["patch_px"]
        depth = ", ".join(f"{name} {value}" for name, value in (model["args"] or {}).items())
        versions = sorted({_versions(record["versions"]) for record in results.records} - {""})
        dates = sorted(record["date"][:10] for record in results.records if record.get("date"))
        threads = sorted({str(record["threads"]) for record in results.records if record.get("threads")})
        rows = [
            ("budget", BUDGETS["flops" if results.study.cost == "flops" else results.study.budget]),
            ("backbone", f"{model['name']}{f' ({depth})' if depth else ''}"),
            ("tokens", f"{side * side} patches of {model['patch_px']} px of a view of {model['img_px']} px"),
            ("data", self.setting(study, "data.shards")),
            ("steps", self._range(study, "steps")),
            ("images a step", self.setting(study, "batch.global_size")),
            ("images in all", self._range(study, "images")),
            ("optimizer", self.setting(study, "optim.name")),
            (
                "base learning rate",
                f"{self.setting(study, 'optim.base_lr')} per {self.setting(study, 'optim.lr_batch')} images",
            ),
            ("balance of the losses", self.setting(study, "balance.kind")),
            ("weights that it starts from", self._task_weights(study)),
            ("labelled images", self._labelled(study)),
            ("seeds", self.seeds(study)),
            ("hardware", self.hardware(study)),
            ("threads of a process", ", ".join(threads)),
            ("precision", self.setting(study, "engine.precision")),
            ("versions", "; ".join(versions)),
            ("commit", self.commit(study)),
            ("dates", f"{dates[0]} to {dates[-1]}" if dates else ""),
        ]
        return markdown(["of its runs", study], [row for row in rows if row[1]])

    def _task_weights(self, study: str) -> str:
        """Of every task that a run has: `contrastive 1, inpainting 10`."""
        records = self.results[study].records
        tasks = dict.fromkeys(task for record in records for task in record["config"]["tasks"])
        found = {
            task: sorted(
                {one["weight"] for one in (record["config"]["tasks"].get(task) for record in records) if one}
            )
            for task in tasks
        }
        return ", ".join(
            f"{task} {' or '.join(map(plain, values))}" for task, values in found.items() if values
        )

    def _labelled(self, study: str) -> str:
        """How many images the probes learn from and are tested on."""
        told = set()
        for record in self.results[study].records:
            for name, left in record["read_outs"].items():
                if left["asked"]["kind"] != "probes" or left["asked"]["weights"] == "untrained":
                    continue
                result = left["result"]
                shares = result[result["features"][0]]["linear"]
                learned = ", ".join(f"{one['num_train']:,}" for one in shares.values())
                told.add(f"{name}: {learned} to learn from, {result['num_test']:,} to test on")
        return "; ".join(sorted(told))

    def _range(self, study: str, column: str) -> str:
        results = self.results[study]
        found = sorted(value for name in results.runs for value in results.values(name, column).values())
        return f"{found[0]:,.0f}" if found[0] == found[-1] else f"{found[0]:,.0f} to {found[-1]:,.0f}"

    def _hours(self, study: str) -> dict[str, tuple[float, float]]:
        """What it ran on -> hours of training, with its start, and of everything after it, of all runs."""
        found: dict[str, tuple[float, float]] = {}
        for record in self.results[study].records:
            after = sum(one["seconds"] for one in record["read_outs"].values())
            after += record["stage_seconds"].get("export", 0.0)
            # of a process that was interrupted, only the steps are known
            training = max(record["stage_seconds"].get("train", 0.0), record["train_seconds"])
            before = found.get(_place(record), (0.0, 0.0))
            found[_place(record)] = before[0] + training / 3600, before[1] + after / 3600
        return found

    def cost(self, study: str) -> str:
        """`3.1 process hours on 2 CPU cores: 2.1 hours of training, 58 minutes of export and read-outs`."""
        return "; ".join(
            f"{duration(sum(hours), 'process ')} on {place}: {duration(hours[0])} of training, "
            f"{duration(hours[1])} of export and read-outs"
            for place, hours in self._hours(study).items()
        )

    def costs(self) -> str:
        """Every study that was run."""
        rows = [
            [f"`{name}`", str(len(results.records)), duration(sum(hours), "process "), place]
            for name, results in self.results.items()
            for place, hours in self._hours(name).items()
        ]
        return markdown(["study", "runs", "took", "on"], rows) if rows else "Nothing was run yet."


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "timm") if name in versions)


def _place(record: Mapping[str, Any]) -> str:
    threads = record.get("threads")
    each = f", {threads} thread{'s' if threads > 1 else ''} each" if threads else ""
    return f"{record['hardware']}{each if 'CPU' in record['hardware'] else ''}"
