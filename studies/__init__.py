"""Questions asked of trained models and of this machine: tables, ablations, comparisons, speed. No stage needs them to run."""
