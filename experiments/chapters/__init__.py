"""One room for each chapter: its trials, and what else it measures."""
