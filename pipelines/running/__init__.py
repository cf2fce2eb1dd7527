"""What every job needs while it runs: reports, Ray, progress, metrics, interruptions."""
