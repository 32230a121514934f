"""Reports of runs: tables for the terminal, a loss curve, an HTML page."""
