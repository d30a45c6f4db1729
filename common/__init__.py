"""What every stage leans on and no lesson opens: run folders, ranks, frozen encoders, data sets, figures, flags."""
