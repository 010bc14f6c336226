"""What every experiment uses: provenance, records, sweeps, trials, scores."""
