"""The basis of all other folders: errors, files, locks, processes, the machine, and Jittor."""
