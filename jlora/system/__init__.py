"""What stands below all else: errors, files, locks, processes, the machine, and Jittor itself."""
