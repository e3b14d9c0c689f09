# make quickstart   everything on a laptop CPU: environment, corpus, VAE, language model, wavs, pictures, figures
# make check        the papers' equations (tests/papers), under two minutes on two cores
# make test         the tests, under 8 minutes on two cores
# make test-all     also those that take ten seconds and more each, 3 minutes more
# make gpu-day      tools.gpu_day at toy size on the CPU, about 10 minutes
# make faults       kills, damaged files, full disks, NaN: ten minutes on two cores, tried and survived
PYTHON ?= python3
BIN = .venv/bin

quickstart: .venv/ready
	$(BIN)/python train.py --config configs/quickstart.toml
	$(BIN)/python evaluate.py --run out/quickstart --repeats 3 --limit 30 --wavs out/quickstart/samples --json out/quickstart/figures.json

check: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/papers

# every command of a GPU day at toy size, so that no minute of a GPU is spent on a typing error
gpu-day: .venv/test-ready
	for part in correct bench train; do OMP_NUM_THREADS=1 $(BIN)/python -m tools.gpu_day $$part --toy || exit 1; done

test: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not long" tests

test-all: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

faults: .venv/test-ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --minutes 10

# One venv, made once; made again when the pins change. torch comes from wherever pip is set up to find it.
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv out

.PHONY: quickstart check test test-all gpu-day faults clean
