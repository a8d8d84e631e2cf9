# Every target installs what it needs first. `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NPROC ?= 2
MINUTES ?= 30
export SLURM_TEST_CLUSTER ?= ../shared/cluster
SAMPLE := data_shards/sample
STEP_PEERS := $(VENV)/step-peers

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cluster test-cluster-slow chaos gpu-check bench bench-overhead \
	bench-checkpoint bench-data bench-metrics bench-plan bench-export bench-evaluate bench-gpu protocol study study-report check format shards pretrain export evaluate report \
	doctor plan pages clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(READY) ## make .venv and install pretrain with the tested versions into it

# DeepSpeed looks for torch while it is built, so it is built against this environment
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $(READY)

shards: $(SAMPLE)/index.json ## render the embedded sample as shards

$(SAMPLE)/index.json: $(READY)
	$(BIN)/python data_shards/embedded_sample.py $(SAMPLE)

demo: $(READY) shards ## train and evaluate on the embedded sample: under ten minutes on two CPU cores
	rm -rf runs/demo
	$(BIN)/pretrain train configs/demo.yaml --nproc $(NPROC) --output-dir runs/demo
	$(BIN)/pretrain evaluate summary runs/demo --train $(SAMPLE) --test $(SAMPLE)

pretrain: $(READY) ## train CONFIG=configs/x.yaml on NPROC ranks
	$(BIN)/pretrain train $(CONFIG) --nproc $(NPROC) $(ARGS)

export: $(READY) ## write the weights of RUN (the newest) to OUT (RUN/exported) for timm, or as ARGS="--format onnx" says
	$(BIN)/pretrain export $(RUN) $(if $(OUT),--out $(OUT)) $(ARGS)

evaluate: $(READY) ## k-NN and linear accuracy of RUN (runs/demo); TRAIN and TEST are folders of shards
	$(BIN)/pretrain evaluate knn $(or $(RUN),runs/demo) --train $(TRAIN) --test $(TEST)
	$(BIN)/pretrain evaluate linear $(or $(RUN),runs/demo) --train $(TRAIN) --test $(TEST)

report: $(READY) ## one HTML file of RUN (runs/demo); ARGS="--train DIR --eval DIR" adds what needs labels
	$(BIN)/pretrain report $(or $(RUN),runs/demo) $(ARGS)

doctor: $(READY) ## what is wrong with RUN (runs/demo), live or dead, and what to do
	$(BIN)/pretrain doctor $(or $(RUN),runs/demo) $(ARGS)

plan: $(READY) ## memory, time, data rate and scaling of CONFIG=configs/x.yaml on NODES (8) of GPUS (8), as predicted
	$(BIN)/pretrain plan $(or $(CONFIG),configs/imagenet_vitb16_multitask.yaml) --nodes $(or $(NODES),8) \
		--gpus-per-node $(or $(GPUS),8) $(ARGS)

pages: $(READY) ## what is written from code: dashboards, the table of metrics, the reference, the study
	$(BIN)/python -m pretrain.metrics.dashboards
	$(BIN)/python -m pretrain.plan.schema
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_speed.py
	$(BIN)/python benchmarks/study/report.py

test: $(READY) ## lint, types and all tests but the slow ones: a quarter of an hour on two cores
	$(MAKE) --no-print-directory check
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: $(READY) shards ## the tests that take longer
	$(BIN)/pytest -q -m "slow and not cluster" --timeout 1800

test-cluster: $(READY) ## jobs on a Slurm cluster on this machine; SLURM_TEST_CLUSTER is the folder with its up.sh
	$(BIN)/pytest -q -rs -m "cluster and not slow" --timeout 900 tests/cluster

test-cluster-slow: $(READY) ## those that take longer: time limits, cut networks
	$(BIN)/pytest -q -rs -m "cluster and slow" --timeout 1800 tests/cluster

chaos: $(READY) ## MINUTES of random kills, signals, cuts and full disks on that cluster, against an undisturbed run
	$(BIN)/python tests/cluster/chaos.py --minutes $(MINUTES) --out benchmarks/results/chaos.json

gpu-check: $(READY) ## the tests that need a CUDA device
	$(BIN)/pytest -q -m gpu

bench: $(READY) shards $(STEP_PEERS)/.ready ## step times beside each other and other libraries, as ratios: ten minutes
	PYTHONPATH=$(STEP_PEERS) $(BIN)/python benchmarks/step.py --out benchmarks/results/step-cpu.json $(ARGS)
	$(BIN)/python benchmarks/step.py --readme README.md

# without what they depend on, and where nothing else sees them; without a network their lines say they are absent
$(STEP_PEERS)/.ready: $(READY) benchmarks/step_peers.txt
	-$(BIN)/pip install --quiet --no-deps --upgrade --target $(STEP_PEERS) --requirement benchmarks/step_peers.txt && touch $@

bench-overhead: $(READY) shards ## what each task or decoder adds to a contrastive step
	$(BIN)/python benchmarks/overhead.py --out benchmarks/results/overhead-cpu.json

bench-checkpoint: $(READY) ## how long a checkpoint of ViT-B holds up the training, and how long it takes to write
	$(BIN)/python benchmarks/checkpoint.py --out benchmarks/results/checkpoint-cpu.json

bench-data: $(READY) ## images/s of the loader beside other loaders; PEERS is a python that has them (benchmarks/peers.txt)
	$(BIN)/python benchmarks/data.py --out benchmarks/results/data-cpu.json $(if $(PEERS),--peers-python $(PEERS))

bench-metrics: $(READY) ## what metrics, health of the features and gradient conflict cost a step
	$(BIN)/python benchmarks/metrics_cost.py --out benchmarks/results/metrics-cost-cpu.json

bench-plan: $(READY) ## memory of real ranks beside what `pretrain plan` predicts: a quarter of an hour
	$(BIN)/python benchmarks/plan_memory.py --out benchmarks/results/plan-memory-cpu.json

bench-export: $(READY) ## three short trainings, exported in every format: how far apart the features are
	$(BIN)/python benchmarks/export_parity.py --out benchmarks/results/export-parity.json

bench-evaluate: $(READY) ## memory of k-NN over a large bank, cost of a probe's sweep and of k-NN during training
	$(BIN)/python benchmarks/evaluate.py knn-memory --out benchmarks/results/knn-memory.json
	$(BIN)/python benchmarks/evaluate.py linear-sweep --out benchmarks/results/linear-sweep.json
	$(BIN)/python benchmarks/evaluate.py online-knn --out benchmarks/results/online-knn.json

bench-gpu: $(if $(BENCH_PYTHON),,$(READY)) ## utilisation, memory and peers on a GPU, slice by slice; the same command goes on
	$(or $(BENCH_PYTHON),$(BIN)/python) benchmarks/gpu --max-minutes 8.5 $(if $(OUT),--out $(OUT)) $(ARGS)

protocol: $(READY) ## CIFAR-10: pretrain, k-NN, linear, few labels, fine-tuning; eight minutes, the same command goes on
	$(BIN)/python benchmarks/cifar10_protocol.py --max-minutes 8 --out benchmarks/results/cifar10-protocol.json $(ARGS)

study: $(READY) ## runs of STUDY=configs/studies/x.yaml, eight minutes of them; the same command goes on
	$(BIN)/pretrain sweep $(or $(STUDY),configs/studies/core_cpu.yaml) \
		--results benchmarks/results/study --max-minutes 8 $(ARGS) || [ $$? = 75 ]

study-report: $(READY) ## docs/study.md and its figures, from the records under benchmarks/results/study
	$(BIN)/python benchmarks/study/report.py

check: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove runs and the rendered sample, keep .venv
	rm -rf runs $(SAMPLE)
