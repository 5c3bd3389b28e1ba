# make setup | demo | demo-scores | notebooks | test | lint. Everything runs in .venv, which the first of them makes.
PYTHON ?= python3

bin := .venv/bin
vlm := $(bin)/python -m cli
trained := runs/llava_1_5_demo
judge := $(vlm) test -c configs/eval/demo.yaml
configs := $(addprefix configs/llava_1_5/,model.yaml 2_finetune.yaml demo/model.yaml demo/2_finetune.yaml)
# the options of the judge come last and win
untrained := $(addprefix -c ,$(configs)) -c configs/eval/demo.yaml --trainer.default_root_dir $(trained)/2_finetune
stamp := .venv/.installed

WORKERS ?= 2
# on both cores, one thread each: some tests start several processes. A worker takes over tests from the end of the other's
# list, so that most files, and what they share, stay with one
pytest := OMP_NUM_THREADS=1 $(bin)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: setup demo demo-scores notebooks test test-slow lint clean
setup: $(stamp)

# One pip command with all pins: a later one that is not pinned may replace torch by one that torchvision was not made for.
$(stamp): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed and $(PYTHON) is not; try: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# Both stages of LLaVA-1.5 at laptop size on the embedded data, and once more without the first; then what they know of
# pictures they were not trained on, and answers about ordinary files. Started again after a stop, it goes on.
demo: $(stamp)
	$(vlm) demo-data runs/demo_data
	$(vlm) fit --recipe llava_1_5 --demo
	$(vlm) fit --recipe llava_1_5 --demo --skip 1_align
	$(judge) --weights $(trained) --evaluation.name trained
	$(judge) --weights $(trained) --evaluation.name shuffled --data.init_args.shuffle_images true
	$(judge) --weights runs/llava_1_5_demo_without_1_align --evaluation.name without_1_align
	$(judge) --weights untrained $(untrained) --evaluation.name untrained
	@echo
	@echo "Held-out pictures: things on a colour at a place where no training picture has them"
	@$(vlm) scores trained=$(trained)/2_finetune/evaluation/trained \
		shuffled_images=$(trained)/2_finetune/evaluation/shuffled \
		without_1_align=runs/llava_1_5_demo_without_1_align/2_finetune/evaluation/without_1_align \
		untrained=$(trained)/2_finetune/evaluation/untrained
	@echo
	$(vlm) predict --weights $(trained) --image runs/demo_data/pictures --prompt "Describe the image concisely." \
		--out runs/demo_answers/answers.jsonl --pictures runs/demo_answers/pictures --resume --max_new_tokens 72
	@cat runs/demo_answers/answers.jsonl
	@echo
	@echo "the trained stages    $(trained)/*/artefact"
	@echo "losses and pictures   $(bin)/tensorboard --logdir runs"
	@echo "answers, drawn        runs/demo_answers/pictures"
	@echo "your own picture      $(bin)/vlm predict --weights $(trained) --image FILE --prompt TEXT"

# What every system's demo knows and how long it takes, into docs/demo_scores.md; hours for all of them. Started again, it
# goes on. SYSTEMS="fuyu vila" takes these alone.
demo-scores: $(stamp)
	$(bin)/python -m benchmarks.demo_scores $(SYSTEMS)

# Executes the notebooks and writes what they show into docs/notebooks; they themselves stay without outputs.
notebooks: $(stamp)
	OMP_NUM_THREADS=1 $(bin)/python -m notebooks.render $(NOTEBOOKS)

test: $(stamp)
	$(pytest)

# the tests that take minutes: kills at every moment, and every demo recipe shortened to two steps a stage
test-slow: $(stamp)
	$(pytest) -m slow

lint: $(stamp)
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
