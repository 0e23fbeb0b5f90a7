# make demo      set up .venv, then pre-train MaPeT (or OBJECTIVE=beit ...) on a small rendered set
# make test      set up .venv, then run the whole test suite
# make quick     set up .venv, then run the fast tests: two minutes on two cores
# make lint      set up .venv, then run ruff and pyright
# make drill     set up .venv, then let faults happen for forty minutes or so: docs/reliability.md
# make gpu       set up .venv, then try all once on this machine's GPUs, for an hour or so: docs/first_day.md
# make gpu_path  set up .venv, then run every recipe's first steps on a CUDA device that runs nothing
# make site      set up .venv, then build the documents as a site: build/site/index.html
# make clean     remove .venv and the demo's run

PYTHON ?= python3
RUN ?= runs/demo
TRIAL ?= runs/trial
OBJECTIVE ?= mapet
OBJECTIVES = mapet beit mvp saim conmim mae cae
PYTEST = .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1

demo: objective .venv/installed
	.venv/bin/python tools/demo.py $(RUN) $(OBJECTIVE)

objective:
	@test $(words $(OBJECTIVE)) = 1 -a -n "$(filter $(OBJECTIVE),$(OBJECTIVES))" || \
		{ echo "OBJECTIVE=$(OBJECTIVE) is none of $(OBJECTIVES)."; exit 2; }

test: .venv/dev
	$(PYTEST)

quick: .venv/dev
	$(PYTEST) -m "not slow and not drill"

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

gpu: .venv/dev
	.venv/bin/python tools/trial.py gpu $(TRIAL)

drill: .venv/dev
	.venv/bin/python -m pytest -m drill -v

gpu_path: .venv/dev
	.venv/bin/python -m pytest --numprocesses 2 tests/test_gpu_path.py -m ''

site: .venv/docs
	.venv/bin/mkdocs build --strict

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: .venv/installed
	.venv/bin/pip install --quiet -e '.[dev]'
	touch $@

.venv/docs: .venv/installed
	.venv/bin/pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf .venv runs/demo

.PHONY: demo objective test quick lint gpu drill gpu_path site clean
