"""What writes `results/`: run by hand, resumable, never imported by a chapter."""
