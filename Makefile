# make demo | test | lint [STACK=openmmlab] [PYTHON=python3.12] [TORCH_INDEX=address of an index with other builds of torch]
# make demo TASK=multi, or TASK=seg or det DENSE=1: on scenes of digits [SEEDS=1]
# make test DENSE=1: with mmsegmentation and mmdetection, whose tests are skipped without them
# make test TRITON=1: with Triton (200 MB, Linux alone), without which the tests of the loss's kernels are skipped
# make test CLUSTER=1: with submitit and Optuna, without which the tests of sweeps on Slurm and of a search are skipped
# make test WORKERS=0: in one process, as a debugger needs it
# make test CUDA=0 PYTEST_ARGS="-k cuda": what needs a GPU; all else is tested on the CPU
# make gpu SECONDS=540 [DATA=folder with cifar-100-python] [TEACHERS=folder with published teachers] [OUT=folder]: on a GPU,
# the tests, benchmarks and runs that need one, most valuable first, within a limit; REHEARSE=1: at tiny sizes on the CPU
# make gpu EPOCHS=240 SECONDS=3600 PARTS=runs: the runs with all epochs of the paper's recipe, in place of 40
# make gpu PARTS="tests loss=80 step": those alone of tests, loss, step and runs, the loss for 80 seconds at most
# make gpu WHEELS=folder PYTHON=python3.12: on a machine without network whose Python has torch; no .venv is made
# make docs: the site, in build/docs; whatever Sphinx warns of is an error
# make test-mmrazor SOURCE=clone of github.com/open-mmlab/mmrazor: MMRazor's own tests of distillation, on this stack
STACK ?= onedl
PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= auto
CUDA ?=
DENSE ?=
TRITON ?=
CLUSTER ?=
SECONDS ?= 540
DATA ?= data/cifar100
TEACHERS ?= checkpoints
OUT ?= work_dirs/gpu/results
PARTS ?=
EPOCHS ?=
WHEELS ?=
REHEARSE ?=
TASK ?=
SEEDS ?=
SOURCE ?=

VENV := .venv$(if $(filter-out onedl,$(STACK)),-$(STACK))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SITE := $(VENV)/.installed-docs
INSTALLED := $(VENV)/.installed$(if $(DENSE),-dense)$(if $(TRITON),-triton)$(if $(CLUSTER),-cluster)

# in this order: the tests of distillers take a loss from the registry that those of algorithms put there
MMRAZOR := test_models/test_losses test_core/test_recorders test_core/test_delivers \
    $(addprefix test_models/test_algorithms/test_,single_teacher_distill.py self_distill.py datafree_distill.py ofd_algo.py) \
    test_models/test_distillers
# they need a process group that nobody starts, and torch.load as it was before torch 2.6
FAILING := test_models/test_losses/test_distillation_losses.py::TestLosses::test_dafl_loss \
    test_core/test_recorders/test_func_inputs_recorder.py::TestFuncInputsRecorder::test_ema_hook \
    test_core/test_delivers/test_function_outputs_deliver.py::TestFuncOutputsDeliver::test_ema_hook

.PHONY: demo test test-mmrazor gpu lint docs install clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# torch and torchvision from one index, or the compiled half of torchvision does not load: TORCH_INDEX has nothing else. Files
# are compared with their hashes, but for these two, of which there are several builds
$(INSTALLED): setup.py requirements/$(STACK).txt requirements/$(STACK)-hashes.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    v in ((3, 11), (3, 12)) or sys.exit("Python 3.11 or 3.12 is needed, this is %d.%d; try make PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes --no-deps --requirement requirements/$(STACK)-hashes.txt
	$(PIP) --constraint requirements/$(STACK).txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(if $(DENSE),$(PIP) --require-hashes --no-deps --requirement requirements/$(STACK)-dense-hashes.txt)
	$(if $(TRITON),$(PIP) --require-hashes --no-deps --requirement requirements/triton.txt)
	$(if $(CLUSTER),$(PIP) --require-hashes --no-deps --requirement requirements/cluster.txt)
	$(PIP) --no-deps --editable .
	@$(BIN)/python -c 'import torchvision' 2> /dev/null || echo "torchvision was built for another torch than pip \
	found here. mmwsl works all the same; a script that imports mmpretrain without mmwsl needs both from one index: \
	make clean, then make install TORCH_INDEX=INDEX"
	touch $@

$(SITE): $(INSTALLED) requirements/docs.txt
	$(PIP) --require-hashes --no-deps --requirement requirements/docs.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py $(if $(TASK),--task $(TASK)) $(if $(SEEDS),--seeds $(SEEDS))

test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES=$(CUDA) $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

test-mmrazor: $(INSTALLED)
	@test -d "$(SOURCE)/tests" || { echo "$(SOURCE)/tests is not there: make test-mmrazor SOURCE=clone of MMRazor"; exit 1; }
	cd $(SOURCE) && $(abspath $(BIN))/python -P -m pytest -p mmwsl.registry -p no:cacheprovider --disable-warnings \
	    $(addprefix tests/,$(MMRAZOR)) $(addprefix --deselect=tests/,$(FAILING))

gpu: $(if $(WHEELS),,$(INSTALLED))
	$(if $(WHEELS),$(PYTHON),$(BIN)/python) tools/gpu.py --seconds $(SECONDS) --data $(DATA) --teachers $(TEACHERS) \
	    --out $(OUT) $(if $(PARTS),--parts $(PARTS)) $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(filter-out 0,$(REHEARSE)),--rehearse)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(SITE)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -d build/doctrees docs build/docs
	@echo build/docs/index.html

clean:
	rm -rf .venv .venv-* build *.egg-info mmwsl/.mim
