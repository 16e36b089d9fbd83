# Thin lines over `gptloop`: each option of a command is a variable of its target.
# Only variables on make's command line count. Their values may hold quotes, dollar signs and line breaks, so they go through
# the environment, never through a command line; deploy/make.py reads them there.

INSTALLATION := ACCELERATOR PYTHON SHELL
GIVEN := $(filter-out $(INSTALLATION),$(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword \
  $(origin $(name)))),$(name)))))
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name)))$(eval export $(name)))
export GPTLOOP_GIVEN := $(GIVEN)

# cpu, cuda or macos: the one in .venv, otherwise the one for this system.
INSTALLED := $(patsubst .venv/installed-%,%,$(firstword $(wildcard .venv/installed-*)))
ACCELERATOR ?= $(or $(INSTALLED),$(if $(filter Darwin,$(shell uname -s)),macos,cpu))
PACKAGES := .venv/installed-$(ACCELERATOR)
VENV := .venv/bin/gptloop
RUN := .venv/bin/python -m
COMMAND = @$(RUN) deploy.make $@
# Refuses variables that a target without a command does not take.
TAKES = @$(foreach name,$(filter-out $(1),$(GIVEN)),$(error $(name) is not a variable of `make $@`, which takes \
  $(or $(1),none)))

GENERATED := inference/v1/inference training/v1/training
PROTOC = $(RUN) grpc_tools.protoc -Ishared/pb=proto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
  $(GENERATED:%=shared/pb/%.proto)

TARGETS := help demo up down status service train sweep distill eval stories runs history jobs watch cancel data checkpoints verify disk \
  prune backup restore import export generate chat info test bench bench-serve soak soak-serve soak-swap soak-replicas \
  soak-ranks fuzz check fix proto lock
.PHONY: $(TARGETS)
# Checks all targets before the first one runs.
$(foreach goal,$(filter-out $(TARGETS) .venv/% requirements/%,$(MAKECMDGOALS)),\
  $(error There is no target "$(goal)": `make help` lists the targets))

help: ## List the targets.
	$(call TAKES)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { \
	  line = sprintf("make %-12s", $$1); words = split($$2, word, " "); \
	  for (i = 1; i <= words; i++) { \
	    if (length(line " " word[i]) > 79) { print line; line = sprintf("%17s", "") } \
	    line = line " " word[i] } \
	  print line }' Makefile

demo: $(VENV) ## Show the whole loop: train, serve, swap, measure (two to four minutes on two cores).
	$(COMMAND) demo

up: $(VENV) ## Start Redis, trainer, worker and inference server; return when all are healthy.
	$(COMMAND) up

down: $(VENV) ## Stop what `make up` started.
	$(COMMAND) down

status: $(VENV) ## Show the state of each process.
	$(COMMAND) status

service: $(VENV) ## Let launchd or systemd keep the processes running: ACTION=install, uninstall or status; JSON=1
	$(COMMAND) service

train: $(VENV) ## Train: PRESET= DATASET= VALIDATION= RESUME=<version> SET="max_steps=500 …" NAME= NOTES= AFTER=<jobs> FOLLOW=0
	$(COMMAND) train

sweep: $(VENV) ## Try a grid of values: TRY="learning_rate=1e-3,3e-3 dropout=0,0.1" PRESET= DATASET= SET= NAME= RUNGS=2 KEEP=1/3 FOLLOW=0
	$(COMMAND) sweep

distill: $(VENV) ## Teach and judge: TEACHER="3 7" or GENERATIONS= or STORIES=<name>; PRESET= RESUME=<version> PROMOTE=1 FORCE=1 SET= …
	$(COMMAND) distill

eval: $(VENV) ## Evaluate and compare versions: VERSIONS="3 7" DATASET= VALIDATION= PAIRS= SPEED=0 AGAIN=1 JUDGE=<dollars> AFTER=<jobs> FOLLOW=0
	$(COMMAND) eval

stories: $(VENV) ## Pay a large teacher for stories: COUNT=2000 MAX_COST=<dollars> NAME= AFTER=<jobs> FOLLOW=0
	$(COMMAND) stories

runs: $(VENV) ## List the runs with the values in which they differ: NAME=<runs> JSON=1
	$(COMMAND) runs

history: $(VENV) ## Show what a run has reported: RUN=<name> CSV=1 JSON=1 TENSORBOARD=<folder>
	$(COMMAND) history

jobs: $(VENV) ## List the jobs: JSON=1
	$(COMMAND) jobs

watch: $(VENV) ## Follow a job: JOB=<id>
	$(COMMAND) watch

cancel: $(VENV) ## Ask a job to end after its step: JOB=<id>
	$(COMMAND) cancel

data: $(VENV) ## Prepare a data set and show a sample: PRESET= DATASET= VALIDATION= SET=
	$(COMMAND) prepare

checkpoints: $(VENV) ## List the versions in the registry: JSON=1
	$(COMMAND) checkpoints

verify: $(VENV) ## Compare every file of every version and state with its hash.
	$(COMMAND) verify

disk: $(VENV) ## Show how much disk space each kind of file takes.
	$(COMMAND) disk

prune: $(VENV) ## Remove the versions and states that no rule keeps: DRY_RUN=1 only lists them.
	$(COMMAND) prune

backup: $(VENV) ## Write registry, jobs and paid stories into one file, while everything runs: FILE=<new file>
	$(COMMAND) backup

restore: $(VENV) ## Restore a backup into a new GPTLOOP_VAR and an empty Redis: FILE=
	$(COMMAND) restore

import: $(VENV) ## Make a version of a GPT-2 folder in Hugging Face's layout: DIR= DATASET= VALIDATION=
	$(COMMAND) import

export: $(VENV) ## Write a version as such a folder: VERSION= DIR=<new or empty folder>
	$(COMMAND) export

generate: $(VENV) ## Stream text: PROMPT= or PROMPTS=<file>, VERSION= SEED= TEMPERATURE= MAX_TOKENS= TOP_K= …
	$(COMMAND) generate

chat: $(VENV) ## Continue what you type, line by line: VERSION= SEED= TEMPERATURE= TOP_P= MAX_TOKENS=
	$(COMMAND) chat

info: $(VENV) ## Show the device, its memory, and its threads or its speed.
	$(COMMAND) info

test: $(VENV) ## Run all tests (a quarter of an hour on two cores): FAST=1 leaves out the slow ones (one minute)
	$(call TAKES,FAST)
	@$(RUN) pytest -n 2 --dist loadfile $(if $(filter-out 0 no false,$(FAST)),-m 'not slow')

bench: .venv/benchmarks ## Compare training and decoding with PyTorch and mlx-lm, side by side (a quarter of an hour).
	$(call TAKES)
	@$(RUN) tests.benchmarks.train
	@$(RUN) tests.benchmarks.decode

bench-serve: .venv/benchmarks ## Compare generating and serving with mlx-lm and CTranslate2 (half an hour).
	$(call TAKES)
	@$(RUN) tests.benchmarks.engine
	@$(RUN) tests.benchmarks.latency
	@$(RUN) tests.benchmarks.serve

soak: $(VENV) ## Kill publishers and training repeatedly and check that nothing is lost (seven minutes).
	$(call TAKES)
	@$(RUN) tests.soak.publish
	@$(RUN) tests.soak.kills

soak-serve: $(VENV) ## Load a server, break and pause it, and check that nothing leaks (ten minutes).
	$(call TAKES)
	@$(RUN) tests.soak.serve

soak-swap: $(VENV) ## Swap a hundred versions under 64 streams and check that no stream changes (ten minutes).
	$(call TAKES)
	@$(RUN) tests.soak.swap

soak-replicas: $(VENV) .venv/validators ## Drain, restart and rotate two replicas under 64 streams and check that no call fails (ten minutes).
	$(call TAKES)
	@$(RUN) tests.soak.replicas

soak-ranks: $(VENV) ## Kill the ranks of a run and check that nothing is lost (ten minutes).
	$(call TAKES)
	@$(RUN) tests.soak.ranks

fuzz: $(VENV) ## Feed odd inputs to every edge of live services (seven minutes).
	$(call TAKES)
	@$(RUN) tests.soak.fuzz

check: $(VENV) ## Verify format, types, imports, contracts, pages and what other programs read; edit nothing.
	$(call TAKES)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) mypy
	.venv/bin/python .venv/bin/lint-imports
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(call PROTOC,"$$folder") && \
	for name in $(GENERATED); do for kind in _pb2.py _pb2.pyi _pb2_grpc.py; do \
	  cmp "$$folder/shared/pb/$$name$$kind" "shared/pb/$$name$$kind" || \
	    { echo 'shared/pb does not match proto: run make proto.' >&2; exit 1; }; \
	done; done; echo 'shared/pb matches proto.'
	$(RUN) pytest -q tests/test_readme.py
	@$(RUN) deploy.validate

fix: $(VENV) ## Format, and fix what ruff can fix.
	$(call TAKES)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

proto: $(VENV) ## Generate shared/pb from proto.
	$(call TAKES)
	$(call PROTOC,.)

lock: $(VENV) ## Resolve requirements/*.txt again.
	$(call TAKES)
	@requirements/lock

# The command `gptloop`, an editable install: it runs the code of this checkout.
$(VENV): $(PACKAGES) pyproject.toml requirements/gptloop
	@$(RUN) pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@install -m 755 requirements/gptloop $@

# A virtual environment of the first Python that MLX runs on.
$(PACKAGES): requirements/$(ACCELERATOR).txt requirements/dev.txt requirements/redis.txt
	@requirements/install "$(ACCELERATOR)" "$(PYTHON)"
	@touch $@

.venv/benchmarks: $(PACKAGES) requirements/benchmarks.txt
	$(RUN) pip install --disable-pip-version-check --quiet --require-hashes -r requirements/benchmarks.txt
	$(RUN) pip install --disable-pip-version-check --quiet torch==2.13.0
	@touch $@

# Sends traces by OpenTelemetry.
.venv/traces: $(PACKAGES) requirements/traces.txt
	$(RUN) pip install --disable-pip-version-check --quiet --require-hashes -r requirements/traces.txt
	@touch $@

# Reaches a registry in object storage.
.venv/object-storage: $(PACKAGES) requirements/object-storage.txt
	$(RUN) pip install --disable-pip-version-check --quiet --require-hashes -r requirements/object-storage.txt
	@touch $@

# A real S3 server for the tests.
.venv/object-storage-tests: $(PACKAGES) requirements/object-storage-tests.txt
	$(RUN) pip install --disable-pip-version-check --quiet --require-hashes -r requirements/object-storage-tests.txt
	@touch $@

# Drives an installed Chromium in the tests of the page.
.venv/web-tests: $(PACKAGES) requirements/web-tests.txt
	$(RUN) pip install --disable-pip-version-check --quiet --require-hashes -r requirements/web-tests.txt
	@touch $@

# What `make check` validates files with, besides .venv, so that none of its pins meets ours.
.venv/validators: requirements/validators.txt | $(PACKAGES)
	$(RUN) venv --clear $@
	$@/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements/validators.txt
	@touch $@

requirements/%.txt:
	@echo 'ACCELERATOR is "$(ACCELERATOR)", but must be cpu, cuda or macos.' >&2; exit 1
