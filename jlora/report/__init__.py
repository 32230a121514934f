"""What a finished run looks like: tables for the terminal, a loss curve, one HTML page."""
