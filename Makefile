# Everything happens in .venv; `make quickstart` and `make test` set it up by themselves.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/neox-jax
OUT := runs/quickstart

.PHONY: quickstart test docs lint clean libtpu

$(VENV)/.installed: setup.py constraints.txt neox_jax/neox_jax_lm_eval.pth
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[data,viz]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# The TPU compiler, which compiles for absent TPUs too. In a folder of its own that only those tests and
# benchmarks/estimate_tpu.py put on PYTHONPATH: in .venv every start of jax would look for a TPU. Where there is no libtpu
# for the platform the tests that need it are skipped, and say so.
.libtpu/.installed: constraints.txt | $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .libtpu libtpu \
		&& touch $@ || echo "libtpu could not be installed: tests/test_tpu.py will skip what needs it"

libtpu: .libtpu/.installed

# Each step's files stay, so that an interrupted quickstart goes on where it was.
$(OUT)/corpus/train.jsonl: | $(VENV)/.installed
	$(RUN) corpus $(OUT)/corpus

$(OUT)/tokenizer.json: $(OUT)/corpus/train.jsonl
	$(RUN) train-tokenizer $(OUT)/corpus/train.jsonl --vocab-size 4096 --output $@

$(OUT)/data/%.idx: $(OUT)/tokenizer.json
	$(RUN) tokenize $(OUT)/corpus/$*.jsonl --tokenizer $(OUT)/tokenizer.json --append-eod --output $(OUT)/data/$*

quickstart: $(OUT)/data/train.idx $(OUT)/data/heldout.idx
	$(RUN) train --config configs/quickstart.py --workdir $(OUT)/run
	@echo; echo "The same held-out text, from beginning to end:"
	@echo "neox_jax   $$($(RUN) eval --model $(OUT)/run --text $(OUT)/corpus/heldout.txt)"
	@echo "gzip -9    $$(gzip -9 -c $(OUT)/corpus/heldout.txt | wc -c | awk -v n=$$(wc -c < $(OUT)/corpus/heldout.txt) '{printf "%.4f bits per byte", 8 * $$1 / n}')"
	@rm -rf $(OUT)/hf
	@$(RUN) convert $(OUT)/run $(OUT)/hf --to hf
	@echo; echo "What to do next:"
	@echo "  $(RUN) generate --model $(OUT)/run --prompt 'def read(' --temperature 0.8 --top-p 0.95"
	@echo "  transformers.AutoModelForCausalLM.from_pretrained('$(OUT)/hf')      # the same model in PyTorch"
	@echo "  $(RUN) train --config configs/quickstart.py --workdir $(OUT)/longer --config.train.steps=5000"

test: $(VENV)/.installed-test .libtpu/.installed
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

docs: $(VENV)/.installed-docs
	$(VENV)/bin/mkdocs build --quiet
	@echo "open site/index.html"

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(OUT) site .jax_cache .pytest_cache
