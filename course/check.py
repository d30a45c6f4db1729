"""Check your answers to the exercises of the course.

    python -m course.check                  # the list, and which of yours are right python -m course.check 2b
    # the first time: copies the exercise to answers/2b.py; then: checks your answer python -m course.check 2b
    --solution    # checks ours, in course/solutions; try yourself first

An answer is compared with our solution, by what it computes. If it is not right yet there is a hint. Where
the exercise is a piece of the project, the project's own tests run with your code in its place. Exit status
1: not right yet (the list, and the first copy, end with 0).
"""

import re
import shutil
from pathlib import Path

from common.arguments import Parser
from course.checks import decoder, distillation, few_steps, flow_matching, phone, unet
from course.exercise import Hint, check, exercise_file, load_answer

PAGES = (unet, flow_matching, decoder, distillation, few_steps, phone)
EXERCISES = {number: exercise for page in PAGES for number, exercise in page.EXERCISES.items()}
ANSWERS = Path("answers")


def parse_arguments(argv=None):
    p = Parser(__doc__, "python -m course.check 2b")
    p.add_argument("number", metavar="NUMBER", nargs="?", help="the exercise, such as 2b; without it, the "
                                                               "list of all")
    p.add_argument("--solution", action="store_true", help="check the course's solution instead of yours")
    return p.parse_args(argv)


def verdict(number):
    """Of the list: whether there is an answer, and whether it is right; questions about trainings, too."""
    path = ANSWERS / f"{number}.py"
    if not path.is_file():
        return ""
    try:
        check(number, EXERCISES[number], load_answer(path), path)
    except Exception:  # one answer that stops in an unforeseen way must not end the list
        return "not yet"
    return "right"


def main(argv=None):
    args = parse_arguments(argv)
    if args.number is None:
        for number, exercise in EXERCISES.items():
            print(f"{number}  {exercise.title:58}{verdict(number)}".rstrip(), flush=True)
        return
    number = args.number.lower()
    if number not in EXERCISES:
        raise SystemExit(f"there is no exercise {args.number!r}; there are {', '.join(EXERCISES)}.")
    path = exercise_file(number, "solutions") if args.solution else ANSWERS / f"{number}.py"
    if not path.is_file():
        ANSWERS.mkdir(exist_ok=True)
        shutil.copy(exercise_file(number), path)
        print(f"{number}  {EXERCISES[number].title}\n\nwrote {path}: read it, fill it in, and run this "
              f"command again.")
        return
    try:
        check(number, EXERCISES[number], load_answer(path), path)
    except Hint as hint:
        sentence = re.sub(r"\s+", " ", str(hint))
        raise SystemExit(f"{number}: not yet. {sentence}") from None
    print(f"{number}: right.")


if __name__ == "__main__":
    main()
