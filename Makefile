# make demo   a fresh machine to pictures: environment, a grid from the trained student, a short training, its score
# make test   environment and tests
# The same steps stand in README.md as plain commands.

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

test: .venv/installed
	$(PY) -m pytest

lint: .venv/installed
	$(PY) -m ruff check .

demo: .venv/installed
	rm -rf runs/demo
	$(PY) sample.py "a photo of a green circle" "a photo of a square and a star" "a photo of three red triangles" \
	    "a photo of a blue star left of a red circle" "a photo of a red circle above a blue square" \
	    "a photo of a yellow circle and a black triangle" --n 6 --model assets/zoo/fm \
	    --decoder assets/zoo/decoder --seed 0 --out runs/demo/zoo.png
	$(PY) decoder.py --evaluate assets/zoo/decoder --out runs/demo/decoder
	$(PY) evaluate.py assets/zoo/fm --no-novel --out runs/demo/zoo-score
	$(PY) train_fm.py --steps 600 --pictures 10000 --save-every 150 --out runs/demo/fm
	$(PY) evaluate.py runs/demo/fm --no-novel --out runs/demo/fm-score
	@echo
	@echo "Done. Look at:"
	@echo "  runs/demo/zoo.png                   what the fully trained student of stage 1 draws"
	@echo "  runs/demo/decoder/compare.png       original, teacher's decoder, tiny decoder; strangers.png: what it has never seen"
	@echo "  runs/demo/fm/samples/progress.png   your own student learning: one row every 150 steps, the same noise"
	@echo "  runs/demo/fm/loss.png, log.csv      its loss, by timestep"
	@echo "  runs/demo/zoo-score/table.txt       mini-GenEval of the trained student, with its pictures beside it"
	@echo "  runs/demo/fm-score/table.txt        the same for yours, after a few minutes of training"

clean:
	rm -rf .venv runs/cache runs/demo
