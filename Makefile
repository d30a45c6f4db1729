# make demo   a fresh machine to pictures: environment, a grid from the trained student, a short training, its score
# make lab    the lab hour: your own student through every stage, from random weights to packages; goes on where it was stopped
# make test   environment and tests; those of the web page where npm and a Chromium are
# make web    the student in a web page: exported, verified and served, with its address for a phone beside this machine
# Without make: the commands below, one after the other; README.md shows the first few.

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo lab test web lint clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

# The browser's runtime, as package-lock.json pins it. Without npm the tests that need it say so.
web/node_modules/installed: web/package-lock.json
	npm ci --prefix web --ignore-scripts --no-audit --no-fund
	touch $@

test: .venv/installed
	command -v npm > /dev/null && $(MAKE) web/node_modules/installed || true
	$(PY) -m pytest

web: .venv/installed web/node_modules/installed
	$(PY) -m web.export --serve 8000

lint: .venv/installed
	$(PY) -m ruff check .

demo: .venv/installed
	rm -rf runs/demo
	$(PY) sample.py "a photo of a green circle" "a photo of a square and a star" "a photo of three red triangles" \
	    "a photo of a blue star left of a red circle" "a photo of a red circle above a blue square" \
	    "a photo of a yellow circle and a black triangle" --n 6 --model assets/zoo/fm \
	    --decoder assets/zoo/decoder --seed 0 --out runs/demo/zoo.png
	$(PY) -m studies.decoder --evaluate assets/zoo/decoder --out runs/demo/decoder
	$(PY) evaluate.py assets/zoo/fm --no-novel --per-family 50 --out runs/demo/zoo-score
	$(PY) train_fm.py --steps 600 --pictures 10000 --save-every 150 --out runs/demo/fm
	$(PY) evaluate.py runs/demo/fm --no-novel --per-family 50 --out runs/demo/fm-score
	$(PY) distill.py --init runs/demo/fm --steps 100 --pictures 10000 --save-every 50 --out runs/demo/distill
	$(PY) -m studies.losses --compare assets/zoo/fm assets/zoo/distill --out runs/demo/students
	$(PY) step_distill.py --init assets/zoo/distill --steps 30 --pictures 10000 --save-every 15 --watch 5 --ramp 0 --out runs/demo/step_distill
	$(PY) -m studies.few_steps --compare assets/zoo/step_distill --out runs/demo/few-steps
	$(PY) evaluate.py assets/zoo/step_distill --no-novel --per-family 50 --out runs/demo/few-steps-score
	$(PY) export_coreml.py --model assets/zoo/step_distill --decoder assets/zoo/decoder --out runs/demo/build
	$(PY) latency.py runs/demo/build
	@echo
	@echo "Done. Look at:"
	@echo "  runs/demo/zoo.png                   what the fully trained student of stage 1 draws"
	@echo "  runs/demo/decoder/compare.png       original, teacher's decoder, tiny decoder; out_of_domain.png: what it has never seen"
	@echo "  runs/demo/fm/samples/progress.png   your own student learning: one row every 150 steps, the same noise"
	@echo "  runs/demo/fm/loss.png, log.csv      its loss, by timestep"
	@echo "  runs/demo/distill/loss.png          your student with a teacher: three losses, and how far both agree"
	@echo "  runs/demo/students/compare.png      teacher | student of stage 1 | of stage 2, fully trained, from the same noise"
	@echo "  runs/demo/step_distill/gan.png      30 steps of adversarial step distillation; the zoo's student had 2,500"
	@echo "  runs/demo/few-steps/compare.png     teacher | 28 guided steps | 4 | after stage 3: 8, 4, 2, 1, fully trained"
	@echo "  runs/demo/build/pictures.png        drawn by the Core ML packages, op by op; verification.json: how exact they are"
	@echo "  runs/demo/zoo-score/table.txt       mini-GenEval of the trained student, with its pictures beside it"
	@echo "  runs/demo/few-steps-score/table.txt the same for four steps without guidance"
	@echo "  runs/demo/fm-score/table.txt        the same for your own, after a few minutes of training"

lab: .venv/installed
	$(PY) -m studies.lab --resume $(LAB)

clean:
	rm -rf .venv runs/cache runs/demo web/node_modules
