"""The course: a page for each stage, exercises that check themselves, a report of your runs, a demonstration."""
