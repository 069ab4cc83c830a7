"""Tests mirror the modules: `unit`, `scenarios` (the pure core), `e2e` (real processes), `cluster` (a real Slurm)."""
